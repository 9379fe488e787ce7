"""Reads JSONL and CSV files row by row, and reports all rows that cannot be read at once. No torch."""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from dpokit.errors import DataError

LINE_BYTES = 64 << 20  # the longest context of any model, 10 million tokens, has about 40 MB
# A packed file may expand to FREE_BYTES, and a large one to MOST_EXPANSION times its size: text rarely packs to 1/50.
FREE_BYTES = 1 << 30
MOST_EXPANSION = 100
MOST_DEPTH = 48  # levels of lists and objects in a row; Arrow reads about 60
SHOWN = 5  # bad rows that an error describes; it counts the others
KINDS = {str: "a text", bool: "a number", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass
class Findings:
    """What a file's rows have.

    Attributes:
        rows: the number of rows, bad ones included.
        bad: the problem of each bad line, by its number.
        mixed: a row for each kind of value of the columns, if a column has values of several kinds; else empty.
    """

    rows: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    mixed: list[dict[str, Any]] = field(default_factory=list)


def find_limit(path: Path) -> int:
    """Returns the most bytes that a packed file may expand to."""
    return max(FREE_BYTES, MOST_EXPANSION * path.stat().st_size)


def open_file(path: Path) -> IO[bytes]:
    """Opens a file for its bytes, unpacked."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]  # reads bytes


def check_lines(path: Path, builder: str, *, skip_bad: bool = False, name: Path | None = None) -> Findings:
    """Reads a JSONL or CSV file once.

    Args:
        builder: json or csv.
        skip_bad: whether bad rows are allowed.
        name: the file of which `path` is a copy.

    Raises:
        DataError: the file is empty, cut off or too large, or has rows that cannot be read; it names their lines.
    """
    findings, number = Findings(), 0
    values: dict[tuple[str, type], dict[str, Any]] = {}
    try:
        for number, row, problem in read_rows(path, builder):
            findings.rows += row is not None or problem is not None
            if problem is not None:
                findings.bad[number] = problem
            elif isinstance(row, dict):
                for column, value in row.items():
                    if (column, type(value)) not in values:
                        values[column, type(value)] = row
    except (EOFError, gzip.BadGzipFile) as error:
        problem = f"the gzip data is cut off or broken after line {number}"
        raise refuse(path, problem, "download or pack it again") from error
    if number == 0:
        raise refuse(path, "the file is empty", "name another file")
    if findings.bad and not skip_bad:
        raise _refuse_rows(path, findings)
    if len(findings.bad) == findings.rows or (builder == "json" and not values):
        raise refuse(name or path, "the file has no rows", "name another file")
    kinds = Counter(name for name, _ in {(name, KINDS.get(kind)) for name, kind in values if kind is not type(None)})
    if any(number > 1 for number in kinds.values()):
        findings.mixed = list({id(row): row for row in values.values()}.values())
    return findings


def write_good_rows(path: Path, builder: str, target: Path) -> None:
    """Writes a copy in which each bad row is an empty one, so that the rows keep their numbers."""
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        width = 0
        for _, row, problem in read_rows(path, builder):
            if builder == "csv":
                width = width or len(row)
                # A row of one empty cell would be a blank line, which readers skip.
                writer.writerow([""] * width if problem else row)
            elif problem or row is not None:
                file.write(json.dumps({} if problem else row) + "\n")


def read_rows(path: Path, builder: str) -> Iterator[tuple[int, Any, str | None]]:
    """Yields the number of each line, its row, and its problem if it has one. A blank line of JSONL has no row."""
    return _read_csv(path) if builder == "csv" else _read_json(path)


def _read_json(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    for number, line in _numbered_lines(path):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows writes a byte order mark
            row = json.loads(text, object_pairs_hook=build_object) if text.strip() else None
            check_row(row, text)
        except UnicodeDecodeError as error:
            yield number, None, f"is not UTF-8 ({error.reason})"
        except RecursionError:
            yield number, None, "is nested too deeply"
        except ValueError as error:
            yield number, None, f"is broken JSON: {error}"
        else:
            is_row = (row is None and not text.strip()) or isinstance(row, dict)
            yield number, row, None if is_row else "is not an object of columns"


def check_row(row: Any, text: str) -> None:
    """Raises ValueError or RecursionError for a row that Arrow cannot read, though Python can."""
    if text.count("[") + text.count("{") > MOST_DEPTH and _measure_depth(row) > MOST_DEPTH:
        raise RecursionError
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}") from error


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The hook of `json` for an object. Raises: ValueError if a name is there twice, of which Python keeps the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {name} is there twice")
    return row


def _measure_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
    return depth


def _read_csv(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    bad: dict[int, str] = {}

    def decode() -> Iterator[str]:
        for number, line in _numbered_lines(path):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad[number] = f"is not UTF-8 ({error.reason})"
                yield line.decode(errors="replace")

    csv.field_size_limit(LINE_BYTES)
    reader = csv.reader(decode())
    header: list[str] = []
    begin = 1
    for row in reader:
        end = reader.line_num
        problem = next((bad.pop(number) for number in range(begin, end + 1) if number in bad), None)
        if not header:
            header = row
            problem = problem or _find_header_problem(header)
            if problem is not None:
                raise refuse(path, f"line {end} {problem}", "correct its first line, the names of the columns")
        elif len(row) > len(header):
            problem = problem or f"has {len(row)} cells, and there are {len(header)} columns"
        yield begin, row or None, problem
        begin = end + 1


def _find_header_problem(names: list[str]) -> str | None:
    repeated = [name for name, number in Counter(names).items() if number > 1 and name]
    if repeated:
        return f"names the column {repeated[0]} twice"
    other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    return None if other is None else f"separates columns with {other!r}, not with a comma"


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, because Python decodes a text file in blocks, and an error in a block names no line.
    limit = find_limit(path) if path.suffix == ".gz" else None
    with open_file(path) as file:
        for number in count(1):
            line = file.readline(LINE_BYTES + 1)
            if not line:
                return
            if len(line) > LINE_BYTES:
                problem = f"line {number} is longer than {LINE_BYTES >> 20} MiB"
                raise refuse(path, problem, f"correct line {number}, or delete it")
            if limit is not None and file.tell() > limit:
                raise too_large(path, limit)
            yield number, line


def _refuse_rows(path: Path, findings: Findings) -> DataError:
    described = [f"line {number} {problem}" for number, problem in list(findings.bad.items())[:SHOWN]]
    if len(findings.bad) == 1:
        number = next(iter(findings.bad))
        return refuse(path, described[0], f"correct line {number}, or drop it: --skip_bad_rows")
    more = f"; and {len(findings.bad) - SHOWN:,} more" if len(findings.bad) > SHOWN else ""
    problem = f"{len(findings.bad):,} of {findings.rows:,} rows cannot be read: {'; '.join(described)}{more}"
    return refuse(path, problem, "correct these lines, or drop them: --skip_bad_rows")


def too_large(path: Path, limit: int, do: str = "if you trust it, unpack it first") -> DataError:
    """Returns the error for a file that expands beyond its limit."""
    return refuse(path, f"its {path.stat().st_size:,} bytes expand to more than {limit:,}", do)


def refuse(path: Path, problem: str, do: str) -> DataError:
    """Returns the error for a file that cannot be read."""
    return DataError(f"{path}: {problem}", expected="a complete file with one row per line, or in Parquet", do=do)
