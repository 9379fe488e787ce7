"""The sha256 of files, computed once in a process while a file is unchanged. No torch."""

import hashlib
import os
import time
from pathlib import Path

# A file system may give two writes in a row one time stamp, so the hash of a file that has just changed is not kept.
SETTLED_NANOSECONDS = 2 * 10**9

_State = tuple[int, int, int, int, int]
_HASHES: dict[_State, str] = {}


def hash_file(path: Path) -> str:
    """The sha256 of a file, in hex; read again only if its inode, size or times have changed since the last call.

    A failing disk may change bytes but none of these, so `checkpoint.store` does not use it to verify checkpoints.

    Raises: OSError.
    """
    with path.open("rb") as file:
        state, changed = _read_state(file.fileno())
        kept = _HASHES.get(state)
        if kept is not None:
            return kept
        now = time.time_ns()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if now - changed >= SETTLED_NANOSECONDS and _read_state(file.fileno())[0] == state:
            _HASHES[state] = digest
        return digest


def _read_state(descriptor: int) -> tuple[_State, int]:
    """What identifies an unchanged file, and the time of its last change in nanoseconds since 1970."""
    stat = os.fstat(descriptor)
    state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return state, max(stat.st_mtime_ns, stat.st_ctime_ns)
