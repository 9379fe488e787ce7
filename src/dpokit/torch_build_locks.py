"""Removes stale locks of torch's compilations at run time (DeepSpeed's optimizers and CPU collectives).

torch (2.13) guards a compilation by a file named `lock`. A killed process leaves the file behind, and all later runs of
the user wait for it silently and forever. Delete when `torch.utils.file_baton` holds a lock that ends with its process.
"""

import os
import time
from pathlib import Path

import psutil
from torch._appdirs import user_cache_dir

from dpokit.console import say

# Longer than a compiler needs for any file of DeepSpeed; while it compiles one file, nothing in the folder changes.
DEAD_AFTER_SECONDS = 300.0
LONG_DEAD_SECONDS = 86_400.0  # compared with file times, which another machine's clock may have set


def find_build_folder() -> Path:
    """Returns torch's folder of compilations.

    Its own function for this (`torch.utils.cpp_extension.get_default_build_root`) is in a module that imports
    setuptools, which takes 4 % of the time of a run's imports.
    """
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache_dir("torch_extensions"))


def remove_dead_locks(dead_after_seconds: float = DEAD_AFTER_SECONDS) -> None:
    """Removes the locks of killed compilations; called before anything may compile.

    A lock that a process of this machine has open is left to torch. Any other lock may belong to a machine that shares
    the home folder: it is removed once no file beside it has changed for `dead_after_seconds`.
    """
    for lock in sorted(find_build_folder().glob("**/lock")):
        reported = False
        changes, since = None, time.monotonic()
        while (times := _find_changes(lock)) is not None and not _is_held(lock):
            if times != changes:
                changes, since = times, time.monotonic()
            age = time.time() - max(times) / 1e9
            if time.monotonic() - since >= dead_after_seconds or age >= LONG_DEAD_SECONDS:
                lock.unlink(missing_ok=True)
                say(f"removed {lock}: the process that compiled there was killed")
                break
            if not reported:
                say(
                    f"{lock} exists, but no process of this machine compiles; waiting up to {dead_after_seconds:.0f} s "
                    "for a process of another machine. If no run starts on another machine, remove the file."
                )
            reported = True
            time.sleep(0.5)


def _find_changes(lock: Path) -> list[int] | None:
    """Times of last change of the files in the lock's folder, in nanoseconds since 1970; None once the lock is gone."""
    changes = []
    for file in (lock, *sorted(lock.parent.iterdir())):
        try:
            changes.append(file.stat().st_mtime_ns)
        except FileNotFoundError:
            if file == lock:
                return None
    return changes


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the lock open, as a compiling process does until it is done."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        try:
            if any(file.path == path for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # the process is another user's, or has ended
            continue
    return False
