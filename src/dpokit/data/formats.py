"""Turns rows of published layouts into `Pair`s. A layout is recognised by its rows, not by a name. No torch."""

import json
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dpokit.data.messages import (
    SAYINGS,
    Messages,
    UnusableError,
    describe_value,
    is_plain,
    is_turns,
    parse_turns,
    read_template_kwargs,
    read_tools,
    read_turns,
    read_turns_text,
)
from dpokit.data.unused_columns import looks_like_content, suggest_columns
from dpokit.errors import DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}  # other roles keep their names
# Columns that any layout may have beside its own. A system column is used only if --columns names it.
TOOLS, TEMPLATE_KWARGS, SYSTEM = "tools", "chat_template_kwargs", "system"
CONTEXT = frozenset((TOOLS, TEMPLATE_KWARGS, SYSTEM))
PARTS = ("prompt", "chosen", "rejected")
VOTES = ("tie", "both_bad", "base", "tuned")  # the first two prefer no answer
SYSTEM_ROLES = ("system", "developer")
SPOKEN = ("role", "content", "name", "tool_call_id")  # keys of messages that templates write, beside SAYINGS
COMMON_BEGINNING = "implicit, plain"

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
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Format:
    """A published layout.

    Attributes:
        name: for data.json and the screen.
        looks: a description of its rows.
        columns: its columns by the names that `matches` and `to_pair` use, each with the names that it may have in the
            rows; the first one that is there is read.
        of_messages: whether columns hold messages; `to_pair` then gets them as `read_turns` returns them.
        matches: a test for a row.
        to_pair: the conversion of a row to a pair. Raises: UnusableError.
    """

    name: str
    looks: str
    columns: Mapping[str, tuple[str, ...]]
    of_messages: bool
    matches: Callable[[Row], bool]
    to_pair: Callable[[Row], Pair]


@dataclass(frozen=True)
class Layout:
    """A format, and the columns of a dataset that it reads.

    Attributes:
        form: the format.
        columns: the column, or the dotted path in one, of each of the format's columns.
        readers: the conversion of a column's values, for columns that are not read as they are.
        unused: the columns that hold only ids, scores and other metadata.
        is_direct: whether `form` reads the rows themselves: the columns have its own names, and no reader.
        has_context: whether the rows have tools, arguments for the chat template, or a system column.
    """

    form: Format
    columns: Mapping[str, str]
    readers: Mapping[str, Callable[[Any], Any]]
    unused: tuple[str, ...] = ()
    is_direct: bool = field(init=False)
    has_context: bool = field(init=False)

    def __post_init__(self) -> None:
        direct = not self.readers and all(name == path for name, path in self.columns.items())
        object.__setattr__(self, "is_direct", direct)
        object.__setattr__(self, "has_context", bool(self.columns.keys() & CONTEXT))

    @property
    def name(self) -> str:
        """The format's name."""
        return self.form.name

    def to_pair(self, row: Row) -> Pair:
        """Returns the pair of a row. Raises: UnusableError with the reason why the row has none."""
        if self.is_direct:
            return self.form.to_pair(row)
        values = {name: row[path] if path in row else _find_value(row, path) for name, path in self.columns.items()}
        for name, read in self.readers.items():
            values[name] = read(values[name])
        pair = self.form.to_pair(values)
        return _add_context(pair, values) if self.has_context else pair


def find_format(
    rows: Sequence[Row],
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    unpadded: Collection[str] = (),
    ignored: Collection[str] = (),
) -> Layout:
    """Returns the layout of more than half of the sampled rows, so that a few broken rows do not matter.

    Args:
        rows: the first rows.
        source: the dataset's name, for errors.
        columns: the value of `--columns`: the column, or the dotted path in one, by the name of a format's column.
        unpadded: the columns whose objects have only the keys of their own row, so that a None in them is a value.
        ignored: the value of `--ignore_columns`; of keys of an object, dotted paths.

    Raises: DataError if no layout fits; it shows the first row and all layouts. Or if a column that the layout does not
        use looks like content, or a column of `columns` is missing.
    """
    columns = columns or {}
    _check_columns(columns, rows, source)
    for form in FORMATS:
        layout = _fit(form, rows, columns, unpadded)
        if layout is not None:
            return replace(layout, unused=_check_unused(layout, rows, source, ignored))
    raise _refuse_rows(rows, columns, source)


def _fit(form: Format, rows: Sequence[Row], mapping: Mapping[str, str], unpadded: Collection[str]) -> Layout | None:
    """Returns the layout if more than half of the rows match the format, else None."""
    present = {name for row in rows for name in row}
    columns = {name: next((n for n in names if n in present), None) for name, names in form.columns.items()}
    columns |= {name: name for name in (TOOLS, TEMPLATE_KWARGS) if name in present}
    paths = {name: path for name, path in {**columns, **mapping}.items() if path is not None}
    if not paths.keys() <= form.columns.keys() | CONTEXT:
        return None  # --columns names a column that the format does not have
    samples = [{name: _find_value(row, path) for name, path in paths.items()} for row in rows]
    as_json = {name for name in paths.keys() & PARTS if _is_most(parse_turns(row[name]) is not None for row in samples)}
    for row in samples:
        row.update({name: parse_turns(row[name]) for name in as_json})
    if not _is_most(form.matches(row) for row in samples):
        return None
    readers: dict[str, Callable[[Any], Any]] = {}
    for name, path in paths.items():
        padded = path.partition(".")[0] not in unpadded
        if name in as_json:
            readers[name] = partial(read_turns_text, column=name)
        elif name in PARTS and form.of_messages:
            readers[name] = partial(read_turns, column=name, padded=padded)
        elif name == TOOLS:
            readers[name] = partial(read_tools, column=name, padded=padded)
        elif name == TEMPLATE_KWARGS:
            readers[name] = partial(read_template_kwargs, column=name)
        elif name == SYSTEM:
            readers[name] = _read_system
    return Layout(form, paths, readers)


def _is_most(votes: Iterable[bool]) -> bool:
    """Whether more than half of the values are true."""
    values = list(votes)
    return sum(values) * 2 > len(values)


def _find_value(row: Row, path: str) -> Any:
    """Returns the value of a column, or of a dotted path in one; None if it is missing."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check_columns(columns: Mapping[str, str], rows: Sequence[Row], source: str) -> None:
    """Raises DataError for a column of `--columns` that no sampled row has."""
    names = dict.fromkeys(name for row in rows for name in row)
    for name, path in columns.items():
        if path in names or any(_find_value(row, path) is not None for row in rows):
            continue
        values = [row[path.partition(".")[0]] for row in rows if path.partition(".")[0] in row]
        keys = dict.fromkeys(
            f"{path.partition('.')[0]}.{key}" for value in values if isinstance(value, Mapping) for key in value
        )
        raise DataError(
            f"--columns {name}={path}: {source} has no column {path}",
            expected="one of " + ", ".join(keys or names),
            do=f"correct --columns {name}=...",
        )


def _check_unused(layout: Layout, rows: Sequence[Row], source: str, ignored: Collection[str]) -> tuple[str, ...]:
    """Returns the columns, and the keys beside a dotted path, that the layout does not use.

    Raises: DataError if one of them looks like content.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    objects = {path.rpartition(".")[0] for path in layout.columns.values() if path not in names}
    used = {*layout.columns.values(), *(path.partition(".")[0] for path in objects), *ignored}
    keys = {
        f"{path}.{key}": None
        for path in sorted(objects)
        for value in (_find_value(row, path) for row in rows)
        if isinstance(value, Mapping)
        for key in value
    }
    unused = tuple(name for name in {**names, **keys} if name not in used and name not in objects)
    parts = [layout.columns[name] for name in layout.columns if name in PARTS]
    content = []
    for name in unused:
        repeats = all(_repeats(_find_value(row, name), [_find_value(row, path) for path in parts]) for row in rows)
        values = [_find_value(row, name) for row in rows]
        if not repeats and looks_like_content(name, values, any_text=layout.form.name == COMMON_BEGINNING):
            content.append(name)
    if not content:
        return unused
    columns = suggest_columns(content, layout.columns)
    if not columns and layout.form.name == COMMON_BEGINNING:  # rather a column of prompts than no prompt at all
        columns = {"prompt": content[0]}
    use = ",".join(f"{part}={name}" for part, name in columns.items())
    others = ",".join(name for name in content if name not in columns.values())
    use = f"--columns {shlex.quote(use)}" + (f" --ignore_columns {shlex.quote(others)}" if others else "")
    ignore = f"--ignore_columns {shlex.quote(','.join(content))}"
    raise DataError(
        f"{source} has columns that look like content and that the layout {layout.name!r} does not use: "
        + ", ".join(content),
        expected="columns that the layout uses, or that hold only ids, scores and other metadata",
        do=f"to use them: {use}; to leave them out: {ignore}" if columns else f"to leave them out: {ignore}",
    )


def _repeats(value: Any, parts: Sequence[Any]) -> bool:
    """Whether a value is one of the pair's own values, or a list of them."""
    return value in parts or (isinstance(value, (list, tuple)) and len(value) > 0 and all(v in parts for v in value))


def _refuse_rows(rows: Sequence[Row], columns: Mapping[str, str], source: str) -> DataError:
    """Returns the error for rows of no known layout; it names the first value that is neither text nor messages."""
    paths = {name: columns.get(name, name) for name in PARTS}
    present = {name for row in rows for name in row}
    values = ((number, path, row[path]) for number, row in enumerate(rows, 1) for path in paths.values() if path in row)
    wrong = next((v for v in values if not isinstance(v[2], str) and not is_turns(v[2])), None)
    shown = json.dumps(dict(rows[0]), default=str)[:400] if rows else "no row at all"
    if wrong is not None and {paths["chosen"], paths["rejected"]} <= present:
        return DataError(
            f"{source} holds preference pairs of no known form: in row {wrong[0]}, {wrong[1]} is "
            f"{describe_value(wrong[2])}; its first row is {shown}",
            expected="texts or messages in more than half of the first rows",
            do="write texts or messages, leave out rows without an answer, or name other columns: --columns "
            f"{'chosen' if wrong[1] not in paths else wrong[1]}=NAME",
        )
    return DataError(
        f"{source} holds preference pairs of no known form; its first row is {shown}",
        expected="one of\n" + "\n".join(f"    {form.name}: {form.looks}" for form in FORMATS),
        do="name the columns: --columns prompt=NAME,chosen=NAME,rejected=NAME; or build them in one of these forms "
        "(prompt, chosen, rejected is the simplest)",
    )


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


def _read_system(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise UnusableError("missing_text", f"system is {describe_value(value)}")
    return (value or "").strip()


def _add_context(pair: Pair, row: Row) -> Pair:
    """Returns the pair with the row's system turn, tools and arguments for the chat template.

    With a system column, every prompt of the dataset becomes messages, also that of a row without a system text.
    """
    prompt = pair.prompt
    if SYSTEM in row:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UnusableError("empty_prompt")
            prompt = parse_transcript(prompt)
        turn = {"role": "system", "content": row[SYSTEM]}
        if turn["content"] and prompt[:1] != [turn]:
            if prompt and prompt[0]["role"] in SYSTEM_ROLES:
                raise UnusableError("second_system_turn")
            prompt = [turn, *prompt]
    return replace(pair, prompt=prompt, tools=row.get(TOOLS), template_kwargs=row.get(TEMPLATE_KWARGS) or {})


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


def _split_transcript(text: str) -> tuple[str, str]:
    before, mark, answer = text.rpartition(ASSISTANT)
    if not mark or HUMAN in answer:
        raise UnusableError("no_answer_turn", "user")
    return before + mark, answer


def _pair_from_transcripts(row: Row) -> Pair:
    # Each transcript is split at its own last turn. TRL splits at the end of their common beginning: inside the answers
    # in the 19 % of HH rows whose answers begin alike.
    prompt, chosen = _split_transcript(_text(row, "chosen"))
    other_prompt, rejected = _split_transcript(_text(row, "rejected"))
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


def _columns(*names: str, **renamed: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Returns `Format.columns`: each name alone, and the given names for others."""
    return {name: (name,) for name in names} | renamed


FORMATS = (
    Format(
        "dpokit votes",
        "prompt, chosen, rejected: lists of {role, content}; vote, answers (`dpokit serve`)",
        _columns(*PARTS, "vote", "answers"),
        True,
        lambda row: row.get("vote") in VOTES and _has(row, is_turns, *PARTS),
        _pair_from_vote,
    ),
    Format(
        "HH prompt",
        'prompt, response, chosen, rejected: strings, the prompt ending with "\\n\\nAssistant:" (Dahoas/full-hh-rlhf)',
        _columns(*PARTS, "response"),
        False,
        lambda row: _has(row, _is_text, *PARTS) and "response" in row and row["prompt"].rstrip(" ").endswith(ASSISTANT),
        _pair_from_texts,
    ),
    Format(
        "explicit, plain",
        "prompt, chosen, rejected: strings",
        _columns(*PARTS),
        False,
        lambda row: _has(row, _is_text, *PARTS),
        _pair_from_texts,
    ),
    Format(
        "explicit, conversational",
        "prompt (or messages, conversations): list of {role, content}; chosen, rejected: such a list, one message or a "
        "string",
        _columns("chosen", "rejected", prompt=("prompt", "messages", "conversations", "conversation")),
        True,
        lambda row: _has(row, is_turns, "prompt") and _has(row, _is_answer, "chosen", "rejected"),
        _pair_from_messages,
    ),
    Format(
        "UltraFeedback",
        "prompt: string; chosen, rejected: lists of {role, content} with the prompt in them",
        _columns(*PARTS),
        True,
        lambda row: _has(row, _is_text, "prompt") and _has(row, is_turns, "chosen", "rejected"),
        _pair_from_text_and_turns,
    ),
    Format(
        "implicit, conversational",
        "chosen, rejected: lists of {role, content} that begin alike",
        _columns(*PARTS),
        True,
        lambda row: "prompt" not in row and _has(row, is_turns, "chosen", "rejected"),
        lambda row: _pair_from_turns([], _as_turns(row["chosen"]), _as_turns(row["rejected"])),
    ),
    Format(
        "HH transcript",
        'chosen, rejected: strings with "\\n\\nHuman:" and "\\n\\nAssistant:" turns (Anthropic/hh-rlhf)',
        _columns(*PARTS),
        False,
        lambda row: (
            "prompt" not in row
            and _has(row, _is_text, "chosen", "rejected")
            and ASSISTANT in row["chosen"]
            and ASSISTANT in row["rejected"]
        ),
        _pair_from_transcripts,
    ),
    Format(
        COMMON_BEGINNING,
        "chosen, rejected: strings; the prompt is their common beginning, up to a word",
        _columns(*PARTS),
        False,
        lambda row: "prompt" not in row and _has(row, _is_text, "chosen", "rejected"),
        _pair_from_common_beginning,
    ),
)
