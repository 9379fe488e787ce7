"""Recognises the layout of a dataset by its first rows, and reads the columns of the layout. No torch."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dpokit.data.formats import FORMATS, PARTS, SYSTEM_ROLES, Format, Pair, Row
from dpokit.data.messages import (
    UnusableError,
    describe_value,
    is_turns,
    parse_turns,
    read_template_kwargs,
    read_tools,
    read_turns,
    read_turns_text,
)
from dpokit.data.transcripts import parse_transcript
from dpokit.data.unused_columns import find_unused_columns, find_value, split_path
from dpokit.errors import DataError

# Columns that any layout may have beside its own. A system column is used only if --columns names it.
TOOLS, TEMPLATE_KWARGS, SYSTEM = "tools", "chat_template_kwargs", "system"
CONTEXT = frozenset((TOOLS, TEMPLATE_KWARGS, SYSTEM))


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
        values = {name: row[path] if path in row else find_value(row, path) for name, path in self.columns.items()}
        for name, read in self.readers.items():
            values[name] = read(values[name])
        pair = self.form.to_pair(values)
        return _add_context(pair, values) if self.has_context else pair


def match_layout(
    rows: Sequence[Row],
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    unpadded: Collection[str] = (),
    ignored: Collection[str] = (),
    form: str | None = None,
) -> Layout:
    """Returns the layout of more than half of the sampled rows, so that a few broken rows do not matter.

    Args:
        rows: the first rows.
        source: the dataset's name, for errors.
        columns: the value of `--columns`: the column, or the dotted path in one, by the name of a format's column.
        unpadded: the columns whose objects have only the keys of their own row, so that a None in them is a value.
        ignored: the value of `--ignore_columns`; of keys of an object, dotted paths.
        form: the value of `--format`: no other layout is tried.

    Raises: DataError if no layout fits; it shows the first row and all layouts. Or if a column that the layout does not
        use looks like content, or a column of `columns` is missing.
    """
    columns = columns or {}
    _check_columns(columns, rows, source)
    for candidate in _find_formats(form):
        layout = _fit(candidate, rows, columns, unpadded)
        if layout is not None:
            return replace(layout, unused=find_unused_columns(candidate, layout.columns, rows, source, ignored))
    raise _refuse_rows(rows, columns, source, form)


def _find_formats(name: str | None) -> list[Format]:
    """Returns the formats to try, or the one that `--format` names. Raises: DataError for an unknown name."""
    if name is None:
        return [form for form in FORMATS if not form.by_name]
    if formats := [form for form in FORMATS if form.flag == name]:
        return formats
    raise DataError(
        f"--format {name}: there is no layout of this name",
        expected="one of " + ", ".join(form.flag for form in FORMATS),
        do="correct --format, or leave it out",
    )


def _fit(form: Format, rows: Sequence[Row], mapping: Mapping[str, str], unpadded: Collection[str]) -> Layout | None:
    """Returns the layout if more than half of the rows match the format, else None."""
    present = {name for row in rows for name in row}
    columns = {name: next((n for n in names if n in present), None) for name, names in form.columns.items()}
    columns |= {name: name for name in (TOOLS, TEMPLATE_KWARGS) if name in present}
    paths = {name: path for name, path in {**columns, **mapping}.items() if path is not None}
    if not paths.keys() <= form.columns.keys() | CONTEXT:
        return None  # --columns names a column that the format does not have
    samples = [{name: find_value(row, path) for name, path in paths.items()} for row in rows]
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


def _check_columns(columns: Mapping[str, str], rows: Sequence[Row], source: str) -> None:
    """Raises DataError for a column of `--columns` that no sampled row has."""
    names = dict.fromkeys(name for row in rows for name in row)
    paths = [(name, part) for name, path in columns.items() for part in split_path(path, names)]
    for name, path in paths:
        if path in names or any(find_value(row, path) is not None for row in rows):
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


def _refuse_rows(rows: Sequence[Row], columns: Mapping[str, str], source: str, form: str | None) -> DataError:
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
    if form is not None:
        return DataError(
            f"--format {form} does not fit {source}; its first row is {shown}",
            expected="".join(f"{layout.name}: {layout.looks}" for layout in FORMATS if layout.flag == form),
            do="leave --format out, or name the columns: --columns prompt=NAME,chosen=NAME,rejected=NAME",
        )
    if paths["prompt"] not in present and {paths["chosen"], paths["rejected"]} <= present:
        others = [name for name in present - {*paths.values()} if any(isinstance(row.get(name), str) for row in rows)]
        prompt = "|".join(sorted(others)) or "NAME"
        return DataError(
            f"{source} has {paths['chosen']} and {paths['rejected']} as texts, but no prompt; its first row is {shown}",
            expected='a column with the prompt, or HH transcripts with "\\n\\nHuman:" and "\\n\\nAssistant:" turns',
            do=f"name the prompt's column: --columns prompt={prompt}; or, if both texts begin with the prompt: "
            "--format implicit_plain",
        )
    return DataError(
        f"{source} holds preference pairs of no known form; its first row is {shown}",
        expected="one of\n" + "\n".join(f"    {form.name}: {form.looks}" for form in FORMATS),
        do="name the columns: --columns prompt=NAME,chosen=NAME,rejected=NAME; or build them in one of these forms "
        "(prompt, chosen, rejected is the simplest)",
    )


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
