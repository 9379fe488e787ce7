"""Checks a data file before a library reads it: complete, in UTF-8, and not too large to read."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpokit.data.check_lines import (
    LINE_BYTES,
    Findings,
    build_object,
    check_lines,
    check_row,
    find_limit,
    open_file,
    read_float,
    refuse,
    too_large,
)
from dpokit.data.file_kinds import check_kind
from dpokit.errors import DataError

LIST_BYTES = 1 << 30  # `datasets` reads a list of the Hub in one piece, which takes several times its size
BATCH_ROWS = 1_000
BLOCK_BYTES = 1 << 20
SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space
# The beginning of an object whose only key may hold the rows.
WRAPPER = re.compile(r'\{\s*"(data|rows|examples|instances|records|items|train|test)"\s*:\s*\[\s*[\{\]]')


def check_file(path: Path, builder: str, *, skip_bad: bool | None = False) -> Findings:
    """Checks a file by reading it once; returns the findings about rows in lines.

    Args:
        builder: the builder of `datasets` that reads it next: json, csv or parquet; text for lines of which only the
            encoding is checked. A packed Parquet file is checked after it is unpacked.
        skip_bad: whether bad rows of JSONL and CSV are allowed; None if `--skip_bad_rows` cannot allow them.

    Raises:
        DataError: the file is empty, cut off, not UTF-8 or too large. The error names the lines if it has some.
    """
    check_kind(path, builder)
    if builder == "parquet":
        _check_parquet(path)
    elif builder == "json" and is_list(path):
        for _ in read_list(path):
            pass
    elif builder == "json" and _first_bytes(path) in (b"{\n", b"{\r"):
        _check_object(path)
    else:
        return check_lines(path, builder, skip_bad=skip_bad)
    return Findings()


def is_list(path: Path) -> bool:
    """Whether a JSON file is one list of rows, alone or as `{"data": [...]}`, instead of one row per line."""
    start = _read_start(path)
    return start[:1] == b"[" or (WRAPPER.match(start.decode("utf-8", "replace")) is not None and not _is_row(path))


def _is_row(path: Path) -> bool:
    """Whether the first line is an object of several keys: a row that begins with a column named `data` or the like."""
    try:
        with open_file(path) as file:
            row = json.loads(file.readline(LINE_BYTES + 1))
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile):
        return False
    return isinstance(row, dict) and len(row) > 1


def read_list(path: Path) -> Iterator[str]:
    """Yields each row of a JSON list as JSON on one line; keeps about one row and one block in memory.

    Raises: DataError as `check_file`.
    """
    text = _ListText(path)
    is_wrapped = text.skip_space() == "{"
    text.open_list()
    letter = text.skip_space()
    if letter == "]":
        text.place += 1
    while letter != "]":
        yield text.read_row()
        letter = text.skip_space()
        if letter not in (",", "]"):
            raise text.refuse(text.place, "Expecting ',' delimiter")
        text.place += 1
    if is_wrapped:
        if text.skip_space() != "}":
            raise text.refuse(text.place, "a key follows the list of rows; write the rows alone")
        text.place += 1
    if text.skip_space():
        raise text.refuse(text.place, "Extra data")


def write_lines(path: Path, target: Path) -> None:
    """Writes the rows of a JSON list as one JSON object a line. Raises: DataError as `check_file`."""
    with target.open("w", encoding="utf-8") as file:
        file.writelines(row + "\n" for row in read_list(path))
        if file.tell() == 0:
            file.write("\n")  # an empty list becomes an empty line: the file is not empty


def unpack(path: Path, target: Path) -> None:
    """Unpacks a file of gzip or zstd. Raises: DataError if it expands beyond its limit or is broken."""
    is_zstd = path.suffix == ".zst"
    limit = find_limit(path)
    with target.open("wb") as plain, path.open("rb") as file:
        for block in _unpack_zstd(file, path) if is_zstd else _unpack_gzip(file, path):
            if plain.tell() + len(block) > limit:
                raise too_large(path, limit)
            plain.write(block)


def _unpack_gzip(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(file) as packed:
            while block := packed.read(BLOCK_BYTES):
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise refuse(path, "the gzip data is cut off or broken", "download or pack it again") from error


def _unpack_zstd(file: IO[bytes], path: Path) -> Iterator[bytes]:
    try:
        with pa.CompressedInputStream(file, "zstd") as packed:
            while block := packed.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        if error.errno:  # of the disk
            raise
        raise refuse(path, "the zstd data is cut off or broken", "download or pack it again") from error


def _first_bytes(path: Path) -> bytes:
    """Returns the first character of a text; after `{`, also the next one."""
    start = _read_start(path)
    return start[:1] if start[:1] != b"{" else start[:2]


def _read_start(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return b""  # the check of the lines reports it


class _ListText:
    """The text of a JSON list, read in blocks; parsed text is dropped.

    Attributes:
        place: position of the next character to parse in the text in memory.
    """

    def __init__(self, path: Path) -> None:
        self.place = 0
        self._path = path
        self._blocks = _read_blocks(path)
        self._text = ""
        self._decoder = json.JSONDecoder(object_pairs_hook=build_object, parse_float=read_float)
        self._line = 1  # line of the first character in memory

    def skip_space(self) -> str:
        """Moves to the next character that is not white space and returns it; "" at the end of the file."""
        while True:
            space = SPACE.match(self._text, self.place)
            self.place = self.place if space is None else space.end()
            if self.place < len(self._text):
                return self._text[self.place]
            if not self._grow():
                return ""

    def open_list(self) -> None:
        """Moves behind the bracket that opens the list, which is the next one."""
        while "[" not in self._text[self.place :] and self._grow():
            pass
        self.place = self._text.index("[", self.place) + 1

    def read_row(self) -> str:
        """Returns the next row as JSON on one line. Raises: DataError."""
        self.skip_space()
        while True:
            try:
                row, end = self._decoder.raw_decode(self._text, self.place)
                check_row(row, self._text[self.place : end])
            except json.JSONDecodeError as error:
                # A row that continues in the next block also fails to parse.
                if len(self._text) - self.place > LINE_BYTES:
                    problem = f"{error.msg}, or the row is longer than {LINE_BYTES >> 20} MiB"
                    raise self.refuse(error.pos, problem) from error
                if not self._grow():
                    raise self.refuse(error.pos, error.msg) from error
                continue
            except (ValueError, RecursionError) as error:
                raise _broken_json(self._path, self._find_line(self.place), error) from error
            if not isinstance(row, dict):
                problem = f"line {self._find_line(self.place)} has a row that is not an object of columns"
                raise refuse(self._path, problem, "write each row as a JSON object")
            if end - self.place > LINE_BYTES:
                problem = f"the row that ends in line {self._find_line(end)} is longer than {LINE_BYTES >> 20} MiB"
                raise refuse(self._path, problem, "leave the row out")
            line = self._text[self.place : end].replace("\n", " ").replace("\r", " ")
            self.place = end
            return line

    def refuse(self, place: int, problem: str) -> DataError:
        """Returns the error for broken JSON at a position of the text in memory."""
        line = self._find_line(place)
        return refuse(self._path, f"line {line} is broken JSON: {problem}", f"correct line {line}, or delete it")

    def _find_line(self, place: int) -> int:
        return self._line + self._text.count("\n", 0, place)

    def _grow(self) -> bool:
        """Drops the parsed text and reads more than the rest has; returns False at the end of the file."""
        rest = self._text[self.place :]
        parts, size = [rest], 0
        while size <= len(rest) and (block := next(self._blocks, "")):
            parts.append(block)
            size += len(block)
        if size:
            self._line = self._find_line(self.place)
            self._text, self.place = "".join(parts), 0
        return size > 0


def _read_blocks(path: Path) -> Iterator[str]:
    """Yields the text of a JSON list in blocks. Raises: DataError if it is too large, not UTF-8 or broken gzip data."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    limit = min(LIST_BYTES, find_limit(path))
    line, size = 1, 0
    try:
        with open_file(path) as file:
            while block := file.read(BLOCK_BYTES):
                size += len(block)
                if size > limit:
                    raise too_large(path, limit, "write one JSON object a line (JSONL)")
                text = decoder.decode(block)
                line += text.count("\n")
                if text:  # a block may hold only a part of a character
                    yield text
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise refuse(path, f"line {line} is not UTF-8 ({error.reason})", "save the file as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise refuse(path, "the gzip data is cut off or broken", "download or pack it again") from error


def _check_object(path: Path) -> None:
    """Checks one object over several lines, which `datasets` reads in one piece."""
    content = b""
    try:
        limit = min(LIST_BYTES, find_limit(path))
        with open_file(path) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise too_large(path, limit, "write one JSON object a line (JSONL)")
        json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise refuse(path, f"line {line} is not UTF-8 ({error.reason})", "save the file as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise refuse(path, "the gzip data is cut off or broken", "download or pack it again") from error
    except (ValueError, RecursionError) as error:
        raise _broken_json(path, getattr(error, "lineno", 1), error) from error


def _check_parquet(path: Path) -> None:
    limit = find_limit(path)
    with pq.ParquetFile(path) as file:
        record = file.metadata
        texts, size = [], 0
        for at in range(record.num_columns):
            column = record.schema.column(at)
            chunks = [record.row_group(group).column(at) for group in range(record.num_row_groups)]
            if column.physical_type == "BYTE_ARRAY":
                texts.append(column.path)
            for chunk in chunks:
                # Repeated numbers, and texts that begin like the previous text, take almost no bytes in the file.
                each = max(8, column.length or 0)
                if "DELTA_BYTE_ARRAY" in chunk.encodings:
                    each = max(each, chunk.total_uncompressed_size)
                size += max(chunk.total_uncompressed_size, chunk.num_values * each)
    if size > limit:
        raise too_large(path, limit)
    # Read as a dictionary, a repeated text is in memory only once, as in the file.
    size = 0
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=texts, use_threads=False):
            for part in batch.columns:
                size += _count_text(path, part)
            if size > limit:
                raise too_large(path, limit)


def _count_text(path: Path, array: pa.Array) -> int:
    """Returns the bytes of a column's texts, counting each repetition. Raises: DataError for a very long text."""
    if isinstance(array, pa.DictionaryArray):
        lengths = pc.binary_length(array.dictionary)
        longest = pc.max(lengths).as_py() or 0
        if longest > LINE_BYTES:
            problem = f"a row has a text of {longest:,} bytes"
            raise refuse(path, problem, f"leave out rows of more than {LINE_BYTES >> 20} MiB")
        return pc.sum(pc.cast(lengths.take(array.indices), pa.int64())).as_py() or 0
    if isinstance(array, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        return _count_text(path, array.flatten())
    if isinstance(array, pa.StructArray):
        return sum(_count_text(path, part) for part in array.flatten())
    return int(array.nbytes)


def _broken_json(path: Path, line: int, error: Exception) -> DataError:
    problem = "is nested too deeply" if isinstance(error, RecursionError) else f"is broken JSON: {error}"
    return refuse(path, f"line {line} {problem}", f"correct line {line}, or delete it")
