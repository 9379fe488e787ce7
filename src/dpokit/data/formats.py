"""Turns rows of published layouts into `Pair`s. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpokit.data.messages import SAYINGS, Messages, UnusableError, describe_value, is_plain, is_turns
from dpokit.data.transcripts import ASSISTANT, HUMAN, parse_transcript, split_transcript

PARTS = ("prompt", "chosen", "rejected")
VOTES = ("tie", "both_bad", "base", "tuned")  # the first two prefer no answer
MARGIN = "margin"  # a column with the number by which the chosen answer is better
SYSTEM_ROLES = ("system", "developer")
SPOKEN = ("role", "content", "name", "tool_call_id")  # keys of messages that templates write, beside SAYINGS
# The names that columns have in published data. Plus signs join columns, and dots lead into objects.
PROMPTS = (
    *("prompt", "instruction+input", "instruction", "question", "query", "problem", "request", "input.messages"),
    *("input", "messages", "conversations", "conversation"),
)
CHOSEN = (
    *("chosen", "chosen_response", "chosen_answer", "chosen_messages", "response_chosen", "answer_chosen", "accepted"),
    *("preferred", "preferred_output", "preferred_response", "better_response", "better_answer", "response_j"),
)
REJECTED = (
    *("rejected", "rejected_response", "rejected_answer", "rejected_messages", "response_rejected", "answer_rejected"),
    *("reject", "non_preferred", "non_preferred_output", "dispreferred", "dispreferred_response", "worse_response"),
    *("worse_answer", "response_k"),
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """One preference: two answers to one prompt.

    A message has a `role`, a `content` (text, or None beside tool calls or reasoning) and all further keys of its row
    that have a value, such as `tool_calls`, `reasoning_content`, `name` and `tool_call_id`. The arguments of a tool
    call are a mapping, unless their text is no JSON object.

    Attributes:
        prompt: plain text (an HH transcript ends with its `\\n\\nAssistant:`), or chat messages. If the last message is
            the assistant's, the answers continue it.
        chosen, rejected: the answers' text; after a plain prompt, with the space that separates them. Or both are the
            messages after the prompt, the first and the last one the assistant's: if several messages differ, or if a
            message has more than a text.
        tools: JSON schemas of the tools that the model may call; None without tools.
        template_kwargs: the row's own arguments for the chat template, such as `enable_thinking`.
        source: dataset, split and row.
        margin: how much better the chosen answer is: the row's `margin`, or the difference of the scores; None if the
            row has neither.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    margin: float | None = None


@dataclass(frozen=True)
class Named:
    """A layout with a name, for data.json and the screen."""

    name: str

    @property
    def flag(self) -> str:
        """The value of `--format` that names it."""
        return self.name.lower().replace(",", "").replace(" ", "_").replace("-", "_")


@dataclass(frozen=True)
class Format(Named):
    """A layout whose rows have a prompt, or begin with it, and two answers.

    Attributes:
        looks: a description of its rows.
        columns: its columns by the names that `matches` and `to_pair` use, each with the names that it may have in the
            rows; the first one that is there is read.
        of_messages: whether columns hold messages; `to_pair` then gets them as `read_turns` returns them.
        matches: a test for a row.
        to_pair: the conversion of a row to a pair. Raises: UnusableError.
        by_name: whether rows have this layout only if `--format` names it.
    """

    looks: str
    columns: Mapping[str, tuple[str, ...]]
    of_messages: bool
    matches: Callable[[Row], bool]
    to_pair: Callable[[Row], Pair]
    by_name: bool = False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_answer(value: Any) -> bool:
    return isinstance(value, str) or is_turns(value)


def _has(row: Row, kind: Callable[[Any], bool], *names: str) -> bool:
    return all(name in row and kind(row[name]) for name in names)


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise UnusableError("missing_text", f"{name} is {describe_value(value)}")
    return value


def _pair_from_transcripts(row: Row) -> Pair:
    # Each transcript is split at its own last turn. TRL splits at the end of their common beginning: inside the answers
    # in the 19 % of HH rows whose answers begin alike.
    prompt, chosen = split_transcript(_text(row, "chosen"))
    other_prompt, rejected = split_transcript(_text(row, "rejected"))
    if prompt != other_prompt:
        raise UnusableError("different_prompts")
    return Pair(prompt, chosen, rejected)


def _pair_from_texts(row: Row) -> Pair:
    prompt, chosen, rejected = (_text(row, name) for name in PARTS)
    if len(prompt.split()) > 1 and chosen.startswith(prompt) and rejected.startswith(prompt):  # both repeat it
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return Pair(prompt, chosen, rejected)


def _pair_from_common_beginning(row: Row) -> Pair:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    length = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        length += 1
    # Back to the last word boundary, so that the answers begin with the space before a whole word.
    length = max((i for i in range(length) if chosen[i].isspace()), default=0)
    return Pair(chosen[:length], chosen[length:], rejected[length:])


def _pair_from_messages(row: Row) -> Pair:
    """Returns the pair of a prompt as messages, and answers as texts or as messages."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(chosen, str) and isinstance(rejected, str):
        return Pair(prompt, chosen, rejected)
    chosen, rejected = _as_turns(chosen), _as_turns(rejected)
    if prompt in (chosen, rejected):  # a column that repeats a whole conversation
        prompt = []
    if chosen[0]["role"] != "assistant":
        chosen = _after(prompt, chosen)
    if rejected[0]["role"] != "assistant":
        rejected = _after(prompt, rejected)
    return _pair_from_turns(prompt, chosen, rejected)


def _pair_from_vote(row: Row) -> Pair:
    if row["vote"] in VOTES[:2]:
        raise UnusableError(row["vote"])
    return _pair_from_messages(row)


def _pair_from_text_and_turns(row: Row) -> Pair:
    """Returns the pair of conversations beside a prompt text, which repeats one of their questions or precedes them."""
    chosen, rejected = _as_turns(row["chosen"]), _as_turns(row["rejected"])
    question = parse_transcript(_text(row, "prompt")) if row["prompt"].strip() else []
    questions = [turn["content"] or "" for turn in chosen if turn["role"] == "user"]
    if not questions and not any(turn["role"] == "user" for turn in rejected):
        return _pair_from_turns([], _insert(question, chosen), _insert(question, rejected))
    if question and not any(question[-1]["content"] in content for content in questions):
        raise UnusableError("different_prompts", "the prompt is in neither conversation")
    return _pair_from_turns([], chosen, rejected)


def _pair_from_turns(prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
    """Returns the pair of a prompt and the messages after it; the messages with which both begin join the prompt."""
    for turns in (chosen, rejected):
        if turns[-1]["role"] != "assistant":
            raise UnusableError("no_answer_turn", turns[-1]["role"])
    shorter = min(len(chosen), len(rejected))
    place = next((i for i in range(shorter) if not _says_same(chosen[i], rejected[i])), None)
    if place is None:  # equal answers, or one conversation goes on where the other ends
        if len(chosen) != len(rejected):
            raise UnusableError("different_prompts")
        place = shorter - 1
    if chosen[place]["role"] != "assistant" or rejected[place]["role"] != "assistant":
        raise UnusableError("different_prompts")
    prompt, chosen, rejected = prompt + chosen[:place], chosen[place:], rejected[place:]
    if len(chosen) == len(rejected) == 1 and is_plain(chosen[0]) and is_plain(rejected[0]):
        return Pair(prompt, chosen[0]["content"], rejected[0]["content"])
    return Pair(prompt, chosen, rejected)


def _says_same(message: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two messages are equal, apart from ids, scores and other keys that no template writes."""
    return message == other or all(message.get(key) == other.get(key) for key in (*SPOKEN, *SAYINGS))


def _as_turns(answer: str | Messages) -> Messages:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _insert(question: Messages, turns: Messages) -> Messages:
    """Returns the turns with the question before them, but after a system turn."""
    place = int(turns[0]["role"] in SYSTEM_ROLES)
    return [*turns[:place], *question, *turns[place:]]


def _after(prompt: Messages, turns: Messages) -> Messages:
    """Returns the messages after the prompt; an answer may repeat the prompt, or its end.

    Raises: UnusableError if an answer begins with another question, or with another part of the prompt.
    """
    for size in range(min(len(prompt), len(turns) - 1), 0, -1):
        if all(map(_says_same, prompt[-size:], turns[:size])):
            return turns[size:]
    if not prompt:
        return turns
    *questions, last = prompt
    if last["role"] == "assistant" and len(turns) > len(questions) and all(map(_says_same, questions, turns)):
        first = turns[len(questions)]  # it repeats the beginning of the answer, too
        beginning, content = str(last["content"]), first["content"]
        if questions and first["role"] == "assistant" and isinstance(content, str) and content.startswith(beginning):
            return [{**first, "content": content[len(beginning) :]}, *turns[len(questions) + 1 :]]
    is_question = len(turns) > 1 and turns[0]["role"] == last["role"] == "user"
    if is_question or turns[0]["role"] in SYSTEM_ROLES or any(_says_same(turns[0], message) for message in prompt):
        raise UnusableError("different_prompts")
    return turns


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith(HUMAN.strip()) and ASSISTANT in text


def _is_plain(row: Row) -> bool:
    """Whether a row has texts; not if its answers are transcripts, which have another prompt than the prompt's column.

    A row with a prompt in both places would otherwise train the question as a part of the answer.
    """
    if not _has(row, _is_text, *PARTS):
        return False
    answers = (row["chosen"], row["rejected"])
    return not all(map(_is_transcript, answers)) or all(answer.startswith(row["prompt"]) for answer in answers)


COLUMNS = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}


FORMATS = (
    Format(
        "dpokit votes",
        "prompt, chosen, rejected: lists of {role, content}; vote, answers (`dpokit serve`)",
        COLUMNS | {"vote": ("vote",), "answers": ("answers",)},
        True,
        lambda row: row.get("vote") in VOTES and _has(row, is_turns, *PARTS),
        _pair_from_vote,
    ),
    Format(
        "HH prompt",
        'prompt, response, chosen, rejected: strings, the prompt ending with "\\n\\nAssistant:" (Dahoas/full-hh-rlhf)',
        COLUMNS | {"response": ("response",)},
        False,
        lambda row: _has(row, _is_text, *PARTS) and "response" in row and row["prompt"].rstrip(" ").endswith(ASSISTANT),
        _pair_from_texts,
    ),
    Format(
        "explicit, plain",
        "prompt (or instruction, question, query, ...), chosen, rejected: strings",
        COLUMNS,
        False,
        _is_plain,
        _pair_from_texts,
    ),
    Format(
        "explicit, conversational",
        "prompt (or messages, conversations): list of {role, content}; chosen, rejected: such a list, one message or a "
        "string",
        COLUMNS,
        True,
        lambda row: _has(row, is_turns, "prompt") and _has(row, _is_answer, "chosen", "rejected"),
        _pair_from_messages,
    ),
    Format(
        "UltraFeedback",
        "prompt: string; chosen, rejected: lists of {role, content} with the prompt in them",
        COLUMNS,
        True,
        lambda row: _has(row, _is_text, "prompt") and _has(row, is_turns, "chosen", "rejected"),
        _pair_from_text_and_turns,
    ),
    Format(
        "implicit, conversational",
        "chosen, rejected: lists of {role, content} that begin alike",
        COLUMNS,
        True,
        lambda row: "prompt" not in row and _has(row, is_turns, "chosen", "rejected"),
        lambda row: _pair_from_turns([], _as_turns(row["chosen"]), _as_turns(row["rejected"])),
    ),
    Format(
        "HH transcript",
        'chosen, rejected: strings with "\\n\\nHuman:" and "\\n\\nAssistant:" turns (Anthropic/hh-rlhf)',
        {"chosen": CHOSEN, "rejected": REJECTED},
        False,
        lambda row: (
            _has(row, _is_text, "chosen", "rejected") and ASSISTANT in row["chosen"] and ASSISTANT in row["rejected"]
        ),
        _pair_from_transcripts,
    ),
    Format(
        "implicit, plain",
        "chosen, rejected: strings; the prompt is their common beginning, up to a word",
        COLUMNS,
        False,
        lambda row: "prompt" not in row and _has(row, _is_text, "chosen", "rejected"),
        _pair_from_common_beginning,
        by_name=True,
    ),
)
