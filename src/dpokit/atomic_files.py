"""Reads JSON within a limit; writes files and folders so that a reader finds them whole or not at all. No torch."""

import json
import os
import secrets
import shutil
import stat
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


def apply_umask(path: Path) -> None:
    """Gives a file, or the files below a folder, the permissions of any new file if only their owner can read them.

    safetensors writes a temporary file, which nobody else can read, and renames it.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    private = [file for file in files if stat.S_IMODE(file.stat().st_mode) == stat.S_IRUSR | stat.S_IWUSR]
    if not private:
        return
    # A new file shows the umask; to ask the kernel for it, a process must change it for all of its threads.
    probe = path.parent / f".umask-{secrets.token_hex(6)}"  # containers that share a folder may have equal pids
    probe.touch(exist_ok=False)
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in private:
        file.chmod(mode)


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
        apply_umask(part)
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
