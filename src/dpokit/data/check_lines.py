"""Reads JSONL and CSV files row by row, and reports all rows that cannot be read at once. No torch."""

import csv
import gzip
import json
import math
import re
import zlib
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
OLD_LINE_END = re.compile(r"(?<=\r)(?!\n)(?!$)")  # of old Macs
SHOWN = 5  # bad rows that an error describes; it counts the others
KINDS = {str: "text", bool: "number", int: "number", float: "number", list: "list", dict: "object"}
MOST_WITNESSES = 1_000


@dataclass
class Findings:
    """What a file's rows have.

    Attributes:
        rows: the number of rows, bad ones included.
        bad: the problem of each bad line, by its number.
        mixed: rows with each kind of value that a column, or a key inside it, has; empty if each has only one kind.
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


def check_lines(path: Path, builder: str, *, skip_bad: bool | None = False, name: Path | None = None) -> Findings:
    """Reads a JSONL or CSV file once.

    Args:
        builder: json or csv.
        skip_bad: whether bad rows are allowed; None if `--skip_bad_rows` cannot allow them.
        name: the file of which `path` is a copy.

    Raises:
        DataError: the file is empty, cut off or too large, or has rows that cannot be read; it names their lines.
    """
    findings, shape, number = Findings(), _Shape(), 0
    try:
        for number, row, problem in read_rows(path, builder):
            findings.rows += row is not None or problem is not None
            if problem is not None:
                findings.bad[number] = problem
            elif isinstance(row, dict) and shape.learn(row) and len(findings.mixed) < MOST_WITNESSES:
                findings.mixed.append(row)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = f"the gzip data is cut off or broken after line {number}"
        raise refuse(path, problem, "download or pack it again") from error
    except csv.Error as error:
        raise refuse(path, f"after line {number}, {error}", "export the file again, or write JSONL") from error
    if number == 0:
        raise refuse(path, "the file is empty", "name another file")
    findings.rows -= builder == "csv"  # the header
    if findings.bad and not skip_bad:
        raise _refuse_rows(path, findings, can_skip=skip_bad is not None)
    if len(findings.bad) == findings.rows or (builder == "json" and not shape.keys):
        raise refuse(name or path, "the file has no rows", "name another file")
    if not shape.is_mixed():
        findings.mixed = []
    return findings


class _Shape:
    """The kinds of value at one place in the rows: a column, a key of an object, or the items of a list."""

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self.keys: dict[str, _Shape] = {}
        self.items: _Shape | None = None

    def learn(self, value: Any) -> bool:
        """Adds a value; returns whether it has a kind or a key that no earlier one had."""
        kind = type(value)
        is_new = kind not in self.kinds
        self.kinds.add(kind)
        if kind is dict:
            for key, part in value.items():
                shape = self.keys.get(key)
                if shape is None:
                    if len(self.keys) >= MOST_WITNESSES:
                        continue
                    shape = self.keys[key] = _Shape()
                    is_new = True
                is_new = shape.learn(part) or is_new
        elif kind is list and value:
            self.items = self.items or _Shape()
            for part in value:
                is_new = self.items.learn(part) or is_new
        return is_new

    def is_mixed(self) -> bool:
        """Whether there are values of several kinds at this place, or below it. Any kind is alone with null."""
        kinds = {KINDS[kind] for kind in self.kinds if kind in KINDS}
        below = [*self.keys.values(), *([] if self.items is None else [self.items])]
        return len(kinds) > 1 or any(shape.is_mixed() for shape in below)


def write_good_rows(path: Path, builder: str, target: Path) -> None:
    """Writes a copy in which each bad row is an empty one, so that the rows keep their numbers."""
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        width = 0
        for _, row, problem in read_rows(path, builder):
            if row is None and problem is None:
                continue
            if builder == "csv":
                width = width or len(row)
                # A row of one empty cell would be a blank line, which readers skip.
                writer.writerow([""] * width if problem else row)
            else:
                file.write(json.dumps({} if problem else row) + "\n")


def read_rows(path: Path, builder: str) -> Iterator[tuple[int, Any, str | None]]:
    """Yields the number of each line, its row, and its problem if it has one. A blank line has no row.

    Args:
        builder: json, csv, or text for lines of which only the encoding is checked.
    """
    if builder == "text":
        return _read_text(path)
    return _read_csv(path) if builder == "csv" else _read_json(path)


def _read_text(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    for number, line in _numbered_lines(path):
        try:
            yield number, line.decode(), None
        except UnicodeDecodeError as error:
            yield number, None, f"is not UTF-8 ({error.reason})"


def _read_json(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    for number, line in _numbered_lines(path):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows writes a byte order mark
            row = json.loads(text, object_pairs_hook=build_object, parse_float=read_float) if text.strip() else None
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
    if isinstance(row, _Repeating):
        raise ValueError(f"the name {row.name} is there twice")
    if text.count("[") + text.count("{") > MOST_DEPTH and _measure_depth(row) > MOST_DEPTH:
        raise RecursionError
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"half of a surrogate pair, {error.object[error.start]!a}") from error


class _Repeating(dict[str, Any]):
    """An object in which a name is there twice; Python keeps the last value.

    Attributes:
        name: the first such name.
    """

    name = ""


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The hook of `json` for an object, with which `check_row` sees repeated names."""
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    repeating = _Repeating(row)
    repeating.name = Counter(name for name, _ in pairs).most_common(1)[0][0]
    return repeating


def read_float(text: str) -> float:
    """The hook of `json` for a number. Raises: ValueError if it is larger than Arrow reads."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text} is too large")
    return number


def _measure_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
    return depth


def _read_csv(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    bad: dict[int, str] = {}
    lines: list[str] = []  # of the current row

    def decode() -> Iterator[str]:
        for number, line in _numbered_lines(path):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad[number] = f"is not UTF-8 ({error.reason})"
                text = line.decode(errors="replace")
            for part in OLD_LINE_END.split(text):
                lines.append(part)
                yield part

    csv.field_size_limit(LINE_BYTES)
    reader = csv.reader(decode())
    header: list[str] = []
    begin = 1
    for row in reader:
        end = reader.line_num
        problem = next((bad.pop(number) for number in range(begin, end + 1) if number in bad), None)
        if row and not header:
            header = row
            problem = problem or _find_header_problem(header)
            if problem is not None:
                raise refuse(path, f"line {end} {problem}", "correct its first line, the names of the columns")
        elif len(row) > len(header):
            problem = problem or f"has {len(row)} cells, and there are {len(header)} columns"
        elif len(lines) > 1 and not _is_complete(lines):
            problem = problem or "begins a quote that never ends"
        lines.clear()
        yield begin, row or None, problem
        begin = end + 1


def _is_complete(lines: list[str]) -> bool:
    """Whether every quote in the lines of a row ends; without a strict reader, the file's end ends it."""
    try:
        return bool(list(csv.reader(lines, strict=True)))
    except csv.Error as error:
        return "unexpected end of data" not in str(error)


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


def _refuse_rows(path: Path, findings: Findings, *, can_skip: bool) -> DataError:
    described = [f"line {number} {problem}" for number, problem in list(findings.bad.items())[:SHOWN]]
    drop = ", or drop them: --skip_bad_rows" if can_skip else ""
    if len(findings.bad) == 1:
        return refuse(path, described[0], f"correct line {next(iter(findings.bad))}{drop.replace('them', 'it')}")
    more = f"; and {len(findings.bad) - SHOWN:,} more" if len(findings.bad) > SHOWN else ""
    problem = f"{len(findings.bad):,} of {findings.rows:,} rows cannot be read: {'; '.join(described)}{more}"
    return refuse(path, problem, f"correct these lines{drop}")


def too_large(path: Path, limit: int, do: str = "if you trust it, unpack it first") -> DataError:
    """Returns the error for a file that expands beyond its limit."""
    return refuse(path, f"its {path.stat().st_size:,} bytes expand to more than {limit:,}", do)


def refuse(path: Path, problem: str, do: str) -> DataError:
    """Returns the error for a file that cannot be read."""
    return DataError(f"{path}: {problem}", expected="a complete file with one row per line, or in Parquet", do=do)
