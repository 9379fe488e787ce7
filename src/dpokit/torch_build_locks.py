"""Code that torch compiles when a run first needs it (DeepSpeed's optimizers and CPU collectives), and its locks.

torch (2.13) guards a compilation by a file, `lock`, that whoever is killed leaves behind; all later runs of the user
then wait for it without a word and without end. Delete when `torch.utils.file_baton` holds a lock that dies with its
holder.
"""

import os
import time
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

from dpokit.console import say

# No single file of DeepSpeed's takes a compiler so long, and while it works on one nothing in the folder changes.
DEAD_AFTER_SECONDS = 300.0
LONG_DEAD_SECONDS = 86_400.0  # by the times of files, which another machine's clock may have set


def pass_dead_locks(dead_after_seconds: float = DEAD_AFTER_SECONDS) -> None:
    """Removes the locks of compilations that were killed. To be called before anything may compile.

    A lock that a process of this machine has open is left to torch. Another may belong to a machine with the same home:
    it is waited for, and removed where nothing beside it has changed for `dead_after_seconds`.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted(root.glob("**/lock")):
        told = False
        changes, since = None, time.monotonic()
        while (found := _find_changes(lock)) is not None and not _is_held(lock):
            if found != changes:
                changes, since = found, time.monotonic()
            age = time.time() - max(found) / 1e9
            if time.monotonic() - since >= dead_after_seconds or age >= LONG_DEAD_SECONDS:
                lock.unlink(missing_ok=True)
                say(f"removed {lock}: the process that compiled there was killed")
                break
            if not told:
                say(
                    f"{lock} says that another process compiles, and none of this machine does; waiting up to "
                    f"{dead_after_seconds:.0f} s. Where no run starts on another machine, remove it."
                )
            told = True
            time.sleep(0.5)


def _find_changes(lock: Path) -> list[int] | None:
    """When each file of the lock's folder last changed, in nanoseconds since 1970; None once the lock is gone."""
    changes = []
    for file in (lock, *sorted(lock.parent.iterdir())):
        try:
            changes.append(file.stat().st_mtime_ns)
        except FileNotFoundError:
            if file == lock:
                return None
    return changes


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the lock open, as its maker has until it is done."""
    wanted = str(lock.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == wanted for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # another user's, or gone by now
            continue
    return False
