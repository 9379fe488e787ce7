"""Reads JSON within a limit; writes files and folders so that a reader finds them whole or not at all. No torch."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_RECORD_BYTES = 2**26


def read_record(path: Path) -> Any:
    """A file's JSON. Raises: OSError; ValueError if it is malformed or too large; RecursionError."""
    with path.open("rb") as file:
        content = file.read(MOST_RECORD_BYTES + 1)
    if len(content) > MOST_RECORD_BYTES:
        raise ValueError(f"it has more than {MOST_RECORD_BYTES:,} bytes")
    return json.loads(content)


def write_json(path: Path, record: Any) -> None:
    """Writes JSON with `write_whole`."""
    write_whole(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader finds the old or the new content whole, even after a power failure."""
    part = path.with_name(f".{path.name}.part-{threading.get_native_id()}")
    part.unlink(missing_ok=True)
    try:
        with part.open("xb") as file:  # x: does not write through a link of this name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flushes a folder's list of names to disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets its name only when the block succeeds, so no half-filled one is visible."""
    part = path.with_name(f".{path.name}.part")
    remove_tree(part)
    part.mkdir(parents=True)
    try:
        yield part
        remove_tree(path)
        part.replace(path)
    finally:
        remove_tree(part)


def remove_tree(path: Path) -> None:
    """Deletes a folder, ignoring errors; of a link, only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
