"""Turns rows of published layouts into `Pair`s. A layout is recognised by its rows, not by a name. No torch."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpokit.errors import DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # other roles keep their names

Messages = list[dict[str, Any]]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """One preference: two answers to one prompt.

    A message has a `role`, a `content` (text, a list of parts, or None) and all further keys of its row, such as
    `tool_calls`, `reasoning_content`, `name` and `tool_call_id`; keys without a value are left out.

    Attributes:
        prompt: plain text (an HH transcript ends with its `\\n\\nAssistant:`), or chat messages. If the last message is
            the assistant's, the answers continue it.
        chosen, rejected: the answers' text; after a plain prompt, with the space that separates them. Or the messages
            after the prompt, the last one the assistant's.
        tools: JSON schemas of the tools that the model may call; None without tools.
        template_kwargs: the row's own arguments for the chat template, such as `enable_thinking`.
        source: dataset, split and row.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


class UnusableError(Exception):
    """A row that is not a preference pair; the argument is the reason, a key of data.json."""


@dataclass(frozen=True)
class Format:
    """A layout: its name, a description of its rows, a test for a row, and the conversion of a row to a pair."""

    name: str
    looks: str
    matches: Callable[[Row], bool]
    to_pair: Callable[[Row], Pair]


def find_format(rows: Sequence[Row], source: str) -> Format:
    """Returns the layout of more than half of the sampled rows, so that a few broken rows do not matter.

    Raises: DataError if no layout fits; it shows the first row and all layouts.
    """
    for layout in FORMATS:
        if sum(layout.matches(row) for row in rows) * 2 > len(rows):
            return layout
    shown = json.dumps(dict(rows[0]), default=str)[:400] if rows else "no row at all"
    raise DataError(
        f"{source} holds preference pairs of no known form; its first row is {shown}",
        expected="one of\n" + "\n".join(f"    {layout.name}: {layout.looks}" for layout in FORMATS),
        do="rename or build the columns to one of these forms (prompt, chosen, rejected is the simplest)",
    )


def find_texts(value: Any) -> Iterator[str]:
    """Yields each text in nested lists and mappings; the keys of mappings are not texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from find_texts(part)


def count_letters(value: Any) -> int:
    """Counts the characters of all texts in nested lists and mappings; of messages, without their roles."""
    if isinstance(value, str):
        return len(value)
    count = 0
    for part in value:  # the usual case is fast: a message that has a text alone
        content = part.get("content") if isinstance(part, Mapping) and len(part) == 2 else None
        count += len(content) if isinstance(content, str) else sum(map(len, find_texts(part)))
    return count


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
    """Returns chat messages as an HH transcript that ends where the assistant's answer begins."""
    turns = [f"\n\n{ROLES.get(m['role'], m['role'].title())}: {m['content'].strip()}" for m in messages]
    return "".join(turns) + ASSISTANT


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in value)
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise UnusableError("missing_text")
    return value


def _messages(value: Any) -> Messages:
    if not _is_messages(value):
        raise UnusableError("missing_text")
    return [{"role": str(m["role"]), "content": _text(m["content"])} for m in value]


def _columns(row: Row, kind: Callable[[Any], bool], *names: str) -> bool:
    return all(name in row and kind(row[name]) for name in names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _split_transcript(text: str) -> tuple[str, str]:
    before, mark, answer = text.rpartition(ASSISTANT)
    if not mark or HUMAN in answer:
        raise UnusableError("no_answer_turn")
    return before + mark, answer


def _pair_from_transcripts(row: Row) -> Pair:
    # Each transcript is split at its own last turn. TRL splits at the end of their common beginning: inside the answers
    # in the 19 % of HH rows whose answers begin alike.
    prompt, chosen = _split_transcript(_text(row["chosen"]))
    other_prompt, rejected = _split_transcript(_text(row["rejected"]))
    if prompt != other_prompt:
        raise UnusableError("different_prompts")
    return Pair(prompt, chosen, rejected)


def _pair_from_texts(row: Row) -> Pair:
    return Pair(_text(row["prompt"]), _text(row["chosen"]), _text(row["rejected"]))


def _pair_from_common_beginning(row: Row) -> Pair:
    chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
    length = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        length += 1
    # Back to the last word boundary, so that the answers begin with the space before a whole word.
    length = max((i for i in range(length) if chosen[i].isspace()), default=0)
    return Pair(chosen[:length], chosen[length:], rejected[length:])


def _pair_from_conversations(prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
    """Returns the pair of two conversations that differ only in their last message, the assistant's."""
    if prompt + chosen[:-1] != prompt + rejected[:-1]:
        raise UnusableError("different_prompts")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise UnusableError("no_answer_turn")
    return Pair(prompt + chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _pair_from_messages(row: Row) -> Pair:
    if row.get("vote") == "tie":  # votes of `dpokit serve`
        raise UnusableError("tie")
    if row.get("vote") == "both_bad":
        raise UnusableError("both_bad")
    return _pair_from_conversations(_messages(row["prompt"]), _messages(row["chosen"]), _messages(row["rejected"]))


def _pair_from_ultrafeedback(row: Row) -> Pair:
    # The prompt string repeats the first user message, with which both lists usually begin.
    pair = _pair_from_conversations([], _messages(row["chosen"]), _messages(row["rejected"]))
    if len(pair.prompt) == 0:
        return Pair([{"role": "user", "content": _text(row["prompt"])}], pair.chosen, pair.rejected)
    return pair


FORMATS = (
    Format(
        "HH prompt",
        'prompt, response, chosen, rejected: strings, the prompt ending with "\\n\\nAssistant:" (Dahoas/full-hh-rlhf)',
        lambda row: (
            _columns(row, _is_text, "prompt", "chosen", "rejected")
            and "response" in row
            and row["prompt"].rstrip(" ").endswith(ASSISTANT)
        ),
        _pair_from_texts,
    ),
    Format(
        "explicit, plain",
        "prompt, chosen, rejected: strings",
        lambda row: _columns(row, _is_text, "prompt", "chosen", "rejected"),
        _pair_from_texts,
    ),
    Format(
        "explicit, conversational",
        "prompt, chosen, rejected: lists of {role, content}",
        lambda row: _columns(row, _is_messages, "prompt", "chosen", "rejected"),
        _pair_from_messages,
    ),
    Format(
        "UltraFeedback",
        "prompt: string; chosen, rejected: lists of {role, content} with the prompt in them",
        lambda row: _columns(row, _is_text, "prompt") and _columns(row, _is_messages, "chosen", "rejected"),
        _pair_from_ultrafeedback,
    ),
    Format(
        "implicit, conversational",
        "chosen, rejected: lists of {role, content} that differ in their last message",
        lambda row: "prompt" not in row and _columns(row, _is_messages, "chosen", "rejected"),
        lambda row: _pair_from_conversations([], _messages(row["chosen"]), _messages(row["rejected"])),
    ),
    Format(
        "HH transcript",
        'chosen, rejected: strings with "\\n\\nHuman:" and "\\n\\nAssistant:" turns (Anthropic/hh-rlhf)',
        lambda row: (
            "prompt" not in row
            and _columns(row, _is_text, "chosen", "rejected")
            and ASSISTANT in row["chosen"]
            and ASSISTANT in row["rejected"]
        ),
        _pair_from_transcripts,
    ),
    Format(
        "implicit, plain",
        "chosen, rejected: strings; the prompt is their common beginning, up to a word",
        lambda row: "prompt" not in row and _columns(row, _is_text, "chosen", "rejected"),
        _pair_from_common_beginning,
    ),
)
