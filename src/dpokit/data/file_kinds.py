"""Recognises what a file holds by its first bytes, where its name promises something else. No torch."""

import gzip
import zlib
from pathlib import Path

from dpokit.errors import DataError

ZSTD = b"(\xb5/\xfd"
# The first bytes, what they begin, and what to do.
KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself", "download the data: git lfs pull"),
    (b"\x1f\x8b", "packed with gzip", "give its name the ending .gz"),
    (b"PK\x03\x04", "a zip archive", "unzip it"),
    (ZSTD, "packed with zstd", "give its name the ending .zst"),
    (b"\xfd7zXZ\0", "packed with xz", "unpack it: xz -d"),
    (b"BZh", "packed with bzip2", "unpack it: bzip2 -d"),
    (b"PAR1", "a Parquet file", "give its name the ending .parquet"),
    (b"ARROW1", "an Arrow file", "name the folder that `save_to_disk` wrote, or write Parquet"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV or JSONL"),
    (b"\xff\xfe", "text in UTF-16", "save the file as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "save the file as UTF-8"),
    (b"<!DOCTYPE", "a web page", "download the file itself, not the page that shows it"),
    (b"<!doctype", "a web page", "download the file itself, not the page that shows it"),
    (b"<html", "a web page", "download the file itself, not the page that shows it"),
)
LONGEST = max(len(start) for start, _, _ in KINDS)


def check_kind(path: Path, builder: str) -> None:
    """Raises DataError if the first bytes are those of another kind of file than its name says.

    Args:
        builder: the builder of `datasets` that reads it next: json, csv or parquet.
    """
    with path.open("rb") as file:
        start = file.read(LONGEST)
    if path.suffix == ".zst":
        if ZSTD.startswith(start):
            raise _refuse(path, "cut off", "download or pack it again")
        if not start.startswith(ZSTD):
            raise _refuse(path, *(_describe(start) or ("not packed with zstd", "remove the ending .zst from its name")))
        return  # its content is checked after it is unpacked
    if path.suffix == ".gz":
        if not start.startswith(b"\x1f\x8b"):
            problem, do = _describe(start) or ("not packed with gzip", "remove the ending .gz from its name")
            raise _refuse(path, problem, do)
        try:
            with gzip.open(path) as packed:
                start = packed.read(LONGEST)
        except (EOFError, OSError, zlib.error):
            return  # the check of its content names the place
    described = None if start.startswith(b"PAR1") and builder == "parquet" else _describe(start)
    if described is None and start and builder == "parquet" and not start.startswith(b"PAR1"):
        described = ("not a Parquet file", "give its name the ending of what it holds, such as .jsonl")
    if described is not None:
        raise _refuse(path, *described)


def _describe(start: bytes) -> tuple[str, str] | None:
    return next(((kind, do) for first, kind, do in KINDS if start.startswith(first)), None)


def _refuse(path: Path, problem: str, do: str) -> DataError:
    return DataError(f"{path}: it is {problem}", expected="JSONL, JSON, CSV or Parquet, as its name says", do=do)
