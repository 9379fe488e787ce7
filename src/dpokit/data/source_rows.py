"""Loads the rows of each source of a run, and recognises their layouts."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset, LargeList, List

from dpokit.data.encode_rows import check_reading
from dpokit.data.layouts import ONE_PAIR, Layout, match_layout
from dpokit.data.ranking import PairChoice
from dpokit.data.sources import get_split, load_splits
from dpokit.data.tally import Tally
from dpokit.data.text_columns import Rows
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments, parse_columns, read_columns
from dpokit.settings.mixture import HUB_FILE, READERS, DataSource, name_keys

SAMPLE_ROWS = 32
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # with an owner


@dataclass
class SourceRows:
    """The rows of one source of a split, not yet encoded."""

    source: DataSource
    rows: Rows
    layout: Layout
    tally: Tally


def load_sources(data: DataArguments, *, streaming: bool) -> list[tuple[DataSource, dict[str, Rows]]]:
    """Returns the splits of each source. Raises: DataError that names the source."""
    sources = data.sources()
    if not sources:
        load_splits(None, None, streaming=streaming)  # raises
    loaded = []
    for number, source in enumerate(sources, 1):
        with naming_source(source, number, len(sources)):
            _check_files(source)
            columns = None if source.columns is None else read_columns(source.columns)
            is_in_hub = source.data_files is not None and HUB_ID.fullmatch(source.path) and not _is_folder(source)
            splits = load_splits(
                [f"{HUB_FILE}{place}" for place in source.locations] if is_in_hub else source.location,
                source.name or data.dataset_config,
                streaming=streaming,
                ignore=_list_ignored(data, source),
                keep=columns if isinstance(columns, list) else None,
                skip_bad=data.skip_bad_rows,
            )
        loaded.append((source, splits))
    return loaded


def _check_files(source: DataSource) -> None:
    """Raises DataError for files below a dataset of the Hub, and for the name of a reader without files."""
    has_files = source.data_files is not None or source.data_dir is not None
    if source.path in READERS:
        if not has_files and not Path(source.path).exists():
            raise DataError(
                f"the path {source.path} reads the files of data_files, which is missing",
                expected="data_files beside it",
                do="name the file: path: FILE",
            )
    elif has_files and not _is_folder(source):
        if source.data_files is not None and ("://" in source.path or HUB_ID.fullmatch(source.path)):
            return
        raise DataError(
            f"data_dir and data_files are below {source.path}, which is no folder of this machine",
            expected="a folder, or data_files below a dataset of the Hub",
            do="correct path; for a folder of the Hub name its files: data_files: [data/train.parquet, ...]",
        )


def _is_folder(source: DataSource) -> bool:
    try:
        return Path(source.path).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, or ~nobody
        return False


@contextmanager
def naming_source(source: DataSource, number: int, of: int) -> Iterator[None]:
    """Names the source of a mixture in the DataErrors inside."""
    try:
        yield
    except DataError as error:
        problem = name_keys(error.seen, source)
        if of > 1:
            problem = problem if problem.startswith(source.place) else f"{source.title}: {problem}"
            problem = f"source {number} of {of}, {problem}"
        raise DataError(problem, expected=error.expected, do=name_keys(error.do, source)) from error


def choose_rows(
    data: DataArguments, loaded: Sequence[tuple[DataSource, dict[str, Rows]]], *, training: bool
) -> list[SourceRows]:
    """Returns the rows of a split of each source. Raises: DataError that names the source."""
    flag = "dataset_train_split" if training else "dataset_test_split"
    if not training and any(source.test_split for source, _ in loaded):
        loaded = [entry for entry in loaded if entry[0].test_split]  # the others are not evaluated on
    if not training:
        loaded = _leave_out_repeated(loaded, data.dataset_test_split)
    most = data.max_train_samples if training else data.max_eval_samples
    chosen = []
    for number, (source, splits) in enumerate(loaded, 1):
        named = source.split if training else source.test_split
        split = named or getattr(data, flag)
        with naming_source(source, number, len(loaded)):
            rows = get_split(splits, split, ("split:" if training else "test_split:") if named else flag)
            rows = rows if most is None else _take(rows, most)
            name = f"{source.title}, split {split}"
            layout = _find_layout_for(data, source, rows, name)
        chosen.append(SourceRows(source, rows, layout, Tally(name, layout.name)))
    return chosen


def _leave_out_repeated(
    loaded: Sequence[tuple[DataSource, dict[str, Rows]]], test_split: str
) -> list[tuple[DataSource, dict[str, Rows]]]:
    """Returns the sources whose held-out pairs no earlier one has: several may be training splits of one dataset."""
    by_rows: list[tuple[Any, ...]] = []
    kept = []
    for source, splits in loaded:
        rows = source.identify_rows(source.test_split or test_split)
        # Other columns or another ranking make other pairs of the same rows.
        key = (*rows, source.columns, source.format, source.ranked, source.min_score_gap)
        if key not in by_rows:
            by_rows.append(key)
            kept.append((source, splits))
    return kept


def _take(rows: Rows, number: int) -> Rows:
    return rows.take(number) if isinstance(rows, IterableDataset) else rows.select(range(min(number, len(rows))))


def _list_ignored(data: DataArguments, source: DataSource) -> tuple[str, ...]:
    names = source.ignore_columns
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    return tuple(data.ignore_columns or () if names is None else names)


def _find_layout_for(data: DataArguments, source: DataSource, rows: Rows, name: str) -> Layout:
    """Returns the layout of a source, by its own keys and else by the flags."""
    columns = parse_columns(data.columns) if source.columns is None else read_columns(source.columns)
    gap = data.min_score_gap if source.min_score_gap is None else source.min_score_gap
    choice = PairChoice(source.ranked or data.ranked, gap)
    mapping = columns if isinstance(columns, dict) else {}
    return find_layout(rows, name, mapping, _list_ignored(data, source), source.format or data.format, choice)


def find_layout(
    rows: Rows,
    name: str,
    columns: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
    form: str | None = None,
    choice: PairChoice = ONE_PAIR,
) -> Layout:
    """Returns the layout of the first rows, with the columns of `--columns` in place of its own.

    Raises: DataError if there are no rows, if no known layout fits, or if an unused column looks like content.
    """
    first = islice(check_reading(rows, name), 10 * SAMPLE_ROWS)  # some of them may be bad rows, which are empty
    sample = list(islice((row for row in first if any(value is not None for value in row.values())), SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{name} has no rows", expected="preference pairs", do="name another dataset or split")
    features: Features = rows.features or {}
    unpadded = [column for column, feature in features.items() if not _has_structs(feature)]
    return match_layout(sample, name, columns, unpadded=unpadded, ignored=ignored, form=form, choice=choice)


def _has_structs(feature: Any) -> bool:
    """Whether a column has Arrow structs, which have the keys of all rows; the objects of a JSON column do not."""
    return isinstance(feature, Mapping) or (isinstance(feature, (List, LargeList)) and _has_structs(feature.feature))
