"""A small disk that fills up quickly: a tmpfs, which needs root."""

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
    """Limits the folder to `size` (such as 200k) while the block runs; skips the test if mounting is not possible."""
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
    """Unmounts a disk; waits until ending processes have closed their files there."""
    gc.collect()
    end = time.monotonic() + 30
    while subprocess.run(["umount", str(folder)], check=time.monotonic() > end).returncode:
        time.sleep(0.2)


def enlarge(folder: Path, size: str) -> None:
    """Makes a small disk larger."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
