"""Transcripts of the form of HH: read as chat messages, and written from them. No torch."""

import re

from dpokit.data.messages import SAYINGS, Messages, UnusableError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = re.compile(r"\n+(Human|Assistant):")
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # other roles keep their names


def separate_turns(text: str) -> str:
    """Returns a transcript that begins with "Human:" with the empty lines of HH before its turns."""
    return SPEAKERS.sub(r"\n\n\1:", "\n" + text) if text.startswith("Human:") else text


def parse_transcript(text: str) -> Messages:
    """Turns an HH transcript into chat messages; a plain text is one user message. Empty answers are left out."""
    text = separate_turns(text)
    if HUMAN not in text:
        return [{"role": "user", "content": text.strip()}]
    before, *parts = text.split(HUMAN)
    messages: Messages = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for part in parts:
        question, *answers = part.split(ASSISTANT)
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers if answer.strip()]
    return messages


def parse_prompt(prompt: str | Messages, *, is_raw: bool) -> Messages:
    """Returns a prompt as chat messages: a text as `parse_transcript` reads it; a raw one is one question as it is."""
    if not isinstance(prompt, str):
        return prompt
    return [{"role": "user", "content": prompt}] if is_raw else parse_transcript(prompt)


def render_transcript(messages: Messages) -> str:
    """Returns chat messages as an HH transcript that ends where the assistant's answer begins.

    Raises: UnusableError for a message that says more than its content, which a transcript cannot hold.
    """
    _check_contents(messages)
    turns = [f"\n\n{ROLES.get(m['role'], m['role'].title())}: {m['content'].strip()}" for m in messages]
    return "".join(turns) + ASSISTANT


def join_messages(messages: Messages) -> str:
    """Returns the texts of chat messages, with an empty line between two. Raises: as `render_transcript`."""
    _check_contents(messages)
    return "\n\n".join(message["content"] for message in messages)


def _check_contents(messages: Messages) -> None:
    for message in messages:
        key = next((key for key in SAYINGS if message.get(key)), "") if len(message) > 2 else ""
        if key:
            raise UnusableError("needs_template", key)


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
        return separate_turns(prompt), False
    return render_transcript(messages), True


def split_transcript(text: str) -> tuple[str, str]:
    """Returns a transcript up to its last answer, and that answer. Raises: UnusableError if it ends with none."""
    before, mark, answer = text.rpartition(ASSISTANT)
    if not mark or HUMAN in answer:
        raise UnusableError("no_answer_turn", "user")
    return before + mark, answer
