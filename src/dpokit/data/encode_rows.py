"""Encodes all rows of a dataset, and counts those that give no pair."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from dpokit.console import has_bars, say
from dpokit.data.columns import FEATURES, read_column
from dpokit.data.tally import Tally, find_remedies
from dpokit.data.tokens import Encoder
from dpokit.errors import DataError


def check_reading(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """Yields the rows. Raises: DataError: files of a stream are read only now, with errors of various types."""
    try:
        yield from rows
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{name} cannot be read: {' '.join(str(cause).split())[:300]}",
            expected="complete files with the same columns in every row",
            do="correct the file that the first line names, or name another",
        ) from error


def encode_rows(rows: Dataset, encoder: Encoder, tally: Tally, processes: int | None) -> Dataset:
    """Returns the usable pairs of the rows, with the columns of `FEATURES` but `dropped`; counts rows and reasons.

    Raises: DataError if no pair is usable.
    """
    began = time.time()
    several = encoder.layout.gives_several
    encoded = rows.map(
        encoder if several else encoder.encode_usable,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=FEATURES,
        num_proc=processes,
        desc=f"tokenising {tally.source}",
    )
    computed_now = any(Path(file["filename"]).stat().st_mtime >= began for file in encoded.cache_files)
    if computed_now and not has_bars():  # without a progress bar, a log gets one line
        say(f"tokenising {tally.source}: {len(rows):,} rows, {len(rows) / (time.time() - began):,.0f} rows/s")
    if several:  # the reason of a dropped pair cannot be told from the rows that are left
        reasons = read_column(encoded, "dropped")
        encoded = encoded.select([number for number, reason in enumerate(reasons) if not reason])
        tally.rows = len(encoded)
        for reason in filter(None, reasons):
            tally.add(reason)
    else:  # the cache keeps only usable rows, contiguous on disk; the few others are encoded again for their reason
        used = set(read_column(encoded, "row"))
        tally.rows = len(used)
        unusable = rows.select([row for row in range(len(rows)) if row not in used])
        for batch in unusable.iter(batch_size=1000):
            for reason in encoder(batch, range(len(next(iter(batch.values())))))["dropped"]:
                tally.add(reason)
    if not len(encoded):
        raise refuse_empty(tally)
    return encoded.remove_columns("dropped")


def refuse_empty(tally: Tally) -> DataError:
    """Returns the error for a source of which no pair is left, with the reasons."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.dropped.most_common())
    return DataError(
        f"no usable pair is left of the {tally.rows:,} rows of {tally.source} ({tally.layout}): {reasons}",
        expected="rows with a prompt and two different answers that fit the length limits",
        do=find_remedies(tally.dropped),
    )
