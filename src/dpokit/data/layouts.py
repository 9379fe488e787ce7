"""Recognises the layout of a dataset by its first rows, and reads the columns of the layout. No torch."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dpokit.data.formats import FORMATS, MARGIN, PARTS, SYSTEM_ROLES, Format, Pair, Row
from dpokit.data.messages import (
    UnusableError,
    describe_value,
    find_control_tokens,
    parse_turns,
    read_template_kwargs,
    read_tools,
    read_turns,
    read_turns_text,
)
from dpokit.data.published import PAIRED, Published, Ranking
from dpokit.data.ranking import PairChoice
from dpokit.data.refusals import check_columns, refuse_labels, refuse_rows
from dpokit.data.scored import RANKED
from dpokit.data.transcripts import parse_transcript
from dpokit.data.unused_columns import find_labels, find_unused_columns, find_value
from dpokit.errors import DataError

# Columns that any layout may have beside its own.
TOOLS, TEMPLATE_KWARGS, SYSTEM = "tools", "chat_template_kwargs", "system"
CONTEXT = {TOOLS: (TOOLS, "input.tools"), TEMPLATE_KWARGS: (TEMPLATE_KWARGS,), SYSTEM: (SYSTEM, "system_prompt")}
LAYOUTS = (*PAIRED, *FORMATS, *RANKED)  # in the order in which they are tried
ONE_PAIR = PairChoice()


@dataclass(frozen=True)
class Conversion:
    """A published layout, and the columns of a dataset that it reads.

    Attributes:
        published: the layout.
        columns: the column, or the dotted path in one, of each of its columns, and of tools and the like.
        is_ranked: whether its rows have answers with scores.
        choice: of pairs among them.
    """

    published: Published
    columns: Mapping[str, str]
    is_ranked: bool
    choice: PairChoice

    def convert(self, row: Row) -> list[Row]:
        """Returns a row with the names of `formats` for each pair. Raises: UnusableError."""
        values = {name: find_value(row, path) for name, path in self.columns.items()}
        converted = self.published.convert(values)
        rows = self.choice.build_rows(converted) if isinstance(converted, Ranking) else [converted]
        context = {name: values[name] for name in CONTEXT if name in values}
        return [{**pair, **context} for pair in rows]


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
        conversion: the conversion of rows before the format reads them; None for rows that it reads as they are.
    """

    form: Format
    columns: Mapping[str, str]
    readers: Mapping[str, Callable[[Any], Any]]
    unused: tuple[str, ...] = ()
    conversion: Conversion | None = None
    is_direct: bool = field(init=False)
    has_context: bool = field(init=False)

    def __post_init__(self) -> None:
        direct = not self.readers and all(name == path for name, path in self.columns.items())
        direct = direct and self.conversion is None  # a converted row may lack a value
        object.__setattr__(self, "is_direct", direct)
        object.__setattr__(self, "has_context", bool(self.columns.keys() & CONTEXT))

    @property
    def name(self) -> str:
        """The layout's name."""
        return self.form.name if self.conversion is None else self.conversion.published.name

    @property
    def gives_several(self) -> bool:
        """Whether a row may give several pairs."""
        return self.conversion is not None and self.conversion.is_ranked and self.conversion.choice.is_several

    def to_pairs(self, row: Row) -> list[Pair | UnusableError]:
        """Returns the pairs of a row; or, in place of a pair, the reason for dropping it."""
        pairs: list[Pair | UnusableError] = []
        if all(value is None for value in row.values()):
            return [UnusableError("empty_row")]
        try:
            rows = [row] if self.conversion is None else self.conversion.convert(row)
        except UnusableError as error:
            return [error]
        for values in rows:
            try:
                pair = self._read_pair(values)
                margin = values.get(MARGIN)
                if isinstance(margin, int | float) and not isinstance(margin, bool) and math.isfinite(margin):
                    pair = replace(pair, margin=float(margin))
                pairs.append(pair)
            except UnusableError as error:
                pairs.append(error)
        return pairs

    def to_pair(self, row: Row) -> Pair:
        """Returns the first pair of a row. Raises: UnusableError with the reason why the row has none."""
        first = self.to_pairs(row)[0]
        if isinstance(first, UnusableError):
            raise first
        return first

    def _read_pair(self, row: Row) -> Pair:
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
    choice: PairChoice = ONE_PAIR,
) -> Layout:
    """Returns the layout of more than half of the sampled rows, so that a few broken rows do not matter.

    Args:
        rows: the first rows.
        source: the dataset's name, for errors.
        columns: the value of `--columns`: the column, or the dotted path in one, by the name of a format's column.
        unpadded: the columns whose objects have only the keys of their own row, so that a None in them is a value.
        ignored: the value of `--ignore_columns`; of keys of an object, dotted paths.
        form: the value of `--format`: no other layout is tried.
        choice: of pairs among several answers.

    Raises: DataError if no layout fits; it shows the first row and all layouts. Or if a column that the layout does not
        use looks like content, or a column of `columns` is missing.
    """
    columns = columns or {}
    check_columns(columns, rows, source)
    doubt: DataError | None = None
    for candidate in _find_formats(form):
        fitting = _fit_format if isinstance(candidate, Format) else partial(_fit_published, choice=choice)
        names = _find_columns(candidate, rows, columns, ignored)
        layout = None if names is None else fitting(candidate, rows, names, unpadded)  # type: ignore[arg-type]  # each fits its own kind
        if layout is None:
            continue
        conversion = layout.conversion
        if choice != ONE_PAIR and not (conversion and conversion.is_ranked):
            raise DataError(
                f"--ranked {choice.ranked} --min_score_gap {choice.min_score_gap:g}, but the layout {layout.name!r} of "
                f"{source} has one pair in a row, without scores",
                expected="rows of several answers with scores or labels",
                do="leave --ranked and --min_score_gap out",
            )
        unused = find_unused_columns(layout.name, names or {}, rows, source, ignored)
        if form is None and isinstance(candidate, Published) and candidate.refuses_labels:
            labels = find_labels(unused)
            if labels:  # a later layout may read them
                doubt = doubt or refuse_labels(candidate, labels, source)
                continue
        return replace(layout, unused=unused)
    raise doubt or refuse_rows(rows, columns, source, form, LAYOUTS)


def _find_formats(name: str | None) -> list[Format | Published]:
    """Returns the formats to try, or the one that `--format` names. Raises: DataError for an unknown name."""
    if name is None:
        return [form for form in LAYOUTS if not form.by_name]
    if formats := [form for form in LAYOUTS if form.flag == name]:
        return formats
    raise DataError(
        f"--format {name}: there is no layout of this name",
        expected="one of " + ", ".join(form.flag for form in LAYOUTS),
        do="correct --format, or leave it out",
    )


def _find_columns(
    form: Format | Published, rows: Sequence[Row], mapping: Mapping[str, str], ignored: Collection[str]
) -> dict[str, str] | None:
    """Returns the path of each column of the format that the rows have, and of tools and the like.

    None if a column of a published layout is missing, or if `--columns` names a column that the format does not have.
    """
    names = {**form.columns, **(form.optional if isinstance(form, Published) else {}), **CONTEXT}
    if not mapping.keys() <= names.keys():
        return None
    present = {name: name for row in rows for name in row if name not in ignored}
    present = {name.lower(): name for name in present} | present  # the exact name comes first

    def find_path(path: str) -> str | None:
        if path in present:
            return present[path]
        if "+" in path:
            parts = [find_path(part) for part in path.split("+")]
            return None if None in parts else "+".join(map(str, parts))
        is_key = "." in path and path not in ignored and any(find_value(row, path) is not None for row in rows)
        return path if is_key else None

    paths = {name: next(filter(None, map(find_path, several)), None) for name, several in names.items()} | dict(mapping)
    if isinstance(form, Published) and any(paths[name] is None for name in form.columns):
        return None
    return {name: path for name, path in paths.items() if path is not None}


def _fit_published(
    form: Published, rows: Sequence[Row], paths: Mapping[str, str], unpadded: Collection[str], choice: PairChoice
) -> Layout | None:
    """Returns the layout if more than half of the rows can be converted into rows of `formats`, else None."""
    converted: list[Row] = []
    results: list[Row | Ranking] = []
    conversion = Conversion(form, paths, is_ranked=False, choice=choice)
    for row in rows:
        with suppress(UnusableError):
            results.append(form.convert({name: find_value(row, path) for name, path in paths.items()}))
            converted += replace(conversion, choice=ONE_PAIR).convert(row)
    if not converted or len(results) * 2 <= len(rows):
        return None
    conversion = replace(conversion, is_ranked=isinstance(results[0], Ranking))
    whole = PARTS if all(path.partition(".")[0] in unpadded for path in paths.values()) else ()
    for candidate in FORMATS:
        names = {name: name for name in candidate.columns if _is_most(name in row for row in converted)}
        names |= {name: name for name in CONTEXT if name in paths}
        layout = None if candidate.by_name else _fit_format(candidate, converted, names, whole)
        if layout is not None:
            return replace(layout, conversion=conversion)
    return None


def _fit_format(
    form: Format, rows: Sequence[Row], paths: Mapping[str, str], unpadded: Collection[str]
) -> Layout | None:
    """Returns the layout if more than half of the rows match the format, else None."""
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
            if row[SYSTEM] and find_control_tokens(prompt):
                raise UnusableError("rendered_prompt")
            prompt = parse_transcript(prompt)
        turn = {"role": "system", "content": row[SYSTEM]}
        if turn["content"] and prompt[:1] != [turn]:
            if prompt and prompt[0]["role"] in SYSTEM_ROLES:
                raise UnusableError("second_system_turn")
            prompt = [turn, *prompt]
    return replace(pair, prompt=prompt, tools=row.get(TOOLS), template_kwargs=row.get(TEMPLATE_KWARGS) or {})
