"""A disk that is soon full: a tmpfs, for tests that are root."""

import gc
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """The folder holds no more than `size` (200k) while the block runs; skips where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        unmount(folder)


def unmount(folder: Path) -> None:
    """Takes a disk away, once a process that is ending has closed its files there."""
    gc.collect()
    end = time.monotonic() + 30
    while subprocess.run(["umount", str(folder)], check=time.monotonic() > end).returncode:
        time.sleep(0.2)


def enlarge(folder: Path, size: str) -> None:
    """Gives a small disk room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
