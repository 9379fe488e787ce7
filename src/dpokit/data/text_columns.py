"""Leaves columns out of splits, and refuses columns that hold no text."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, List, Value
from datasets.features import Json

from dpokit.errors import DataError

Rows: TypeAlias = Dataset | IterableDataset


@dataclass(frozen=True)
class ColumnChoice:
    """The columns of a dataset that are read.

    Attributes:
        ignore: columns that are left out; of keys of an object, dotted paths, which stay in the rows.
        keep: the only columns that are read; None for all but those of `ignore`.
    """

    ignore: tuple[str, ...] = ()
    keep: tuple[str, ...] | None = None

    def find_kept(self, columns: Iterable[str]) -> list[str]:
        """Returns those of the columns that are read."""
        return [name for name in columns if name not in self.ignore and (self.keep is None or name in self.keep)]


def leave_out(name: str, splits: Mapping[str, Rows], choice: ColumnChoice) -> dict[str, Rows]:
    """Returns the splits with the chosen columns alone: decoding media may open a file or an address."""
    check_names(name, [rows.features for rows in splits.values() if rows.features is not None], choice)
    kept: dict[str, Rows] = {}
    for split, rows in splits.items():
        names = rows.column_names
        columns = choice.ignore if names is None else tuple(set(names).difference(choice.find_kept(names)))
        if columns and isinstance(rows, IterableDataset):
            rows = rows.decode(False)
        kept[split] = rows.remove_columns(sorted(columns)) if columns else rows
        if names is None and choice.keep is not None:
            kept[split] = kept[split].select_columns(list(choice.keep))
    return kept


def check_names(name: str, splits: Sequence[Features], choice: ColumnChoice) -> None:
    """Raises DataError for chosen columns that hold no text, and for named columns that no split has."""
    columns = {column: feature for features in splits for column, feature in features.items()}
    for flag, named in (("ignore_columns", choice.ignore), ("columns", choice.keep or ())):
        missing = [column for column in named if splits and column.partition(".")[0] not in columns]
        if missing:
            raise DataError(
                f"--{flag} {','.join(missing)}: {name} has no such column",
                expected="columns of the dataset: " + ", ".join(columns),
                do=f"correct --{flag}",
            )
    texts = {column for features in splits for column in _find_text_columns(features)}
    media = {column: columns[column] for column in choice.find_kept(columns) if column not in texts}
    if media:
        kinds = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in media.items())
        raise DataError(
            f"{name} has columns that hold no text: {kinds}",
            expected="a dataset of texts: only text models are trained",
            do=f"--ignore_columns {shlex.quote(','.join(media))} leaves them out, or name another dataset",
        )


def _find_text_columns(features: Features) -> list[str]:
    """Returns the columns of texts, numbers, and lists or objects of these."""

    def is_text(feature: Any) -> bool:
        if isinstance(feature, Mapping):
            return all(is_text(part) for part in feature.values())
        if isinstance(feature, (List, LargeList)):
            return is_text(feature.feature)
        return isinstance(feature, (ClassLabel, Json)) or (isinstance(feature, Value) and "binary" not in feature.dtype)

    return [name for name, feature in features.items() if is_text(feature)]
