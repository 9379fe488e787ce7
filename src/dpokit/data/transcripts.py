"""Transcripts of the form of HH: read as chat messages, and written from them. No torch."""

from dpokit.data.messages import SAYINGS, Messages, UnusableError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # other roles keep their names


def parse_transcript(text: str) -> Messages:
    """Turns an HH transcript into chat messages; a plain text is one user message. Empty answers are left out."""
    if HUMAN not in text:
        return [{"role": "user", "content": text.strip()}]
    before, *parts = text.split(HUMAN)
    messages: Messages = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for part in parts:
        question, *answers = part.split(ASSISTANT)
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers if answer.strip()]
    return messages


def render_transcript(messages: Messages) -> str:
    """Returns chat messages as an HH transcript that ends where the assistant's answer begins.

    Raises: UnusableError for a message that says more than its content, which a transcript cannot hold.
    """
    for message in messages:
        key = next((key for key in SAYINGS if message.get(key)), "") if len(message) > 2 else ""
        if key:
            raise UnusableError("needs_template", key)
    turns = [f"\n\n{ROLES.get(m['role'], m['role'].title())}: {m['content'].strip()}" for m in messages]
    return "".join(turns) + ASSISTANT


def open_transcript(prompt: str) -> tuple[str, bool]:
    """Returns a plain prompt as a transcript up to its answer, and whether the answer begins a turn.

    A prompt that ends as a transcript stays as it is, apart from white space at its end. Another text becomes a
    question; if its last turn is the assistant's, the answer continues it.
    """
    text = prompt.rstrip()
    if text.endswith(ASSISTANT):
        return text, True
    messages = parse_transcript(prompt)
    if messages[-1]["role"] == "assistant":
        return prompt, False
    return render_transcript(messages), True


def split_transcript(text: str) -> tuple[str, str]:
    """Returns a transcript up to its last answer, and that answer. Raises: UnusableError if it ends with none."""
    before, mark, answer = text.rpartition(ASSISTANT)
    if not mark or HUMAN in answer:
        raise UnusableError("no_answer_turn", "user")
    return before + mark, answer
