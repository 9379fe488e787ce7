"""Programs that tests need from Debian's packages: installed where they are missing and this is root."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def install(packages: tuple[str, ...], programs: tuple[str, ...]) -> str | None:
    """Why these programs cannot be had here; None where they can."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        there = all(map(shutil.which, programs))
        return None if there else f"{', '.join(programs)}: not installed, and this is not root on Debian"
    command = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=5"]
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with (Path(tempfile.gettempdir()) / "dpokit-test-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a program is there before its package is whole: wait for who installs it
        if all(map(shutil.which, programs)):
            return None
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=400, env=quiet)
            if done.returncode != 0:
                return f"apt-get {words[0]} failed: {done.stderr[-300:]}"
    return None


def skip_because(obstacle: str | None, *, unless: str) -> None:
    """Skips the test where there is an obstacle; a failure where the environment says `unless`=1."""
    if obstacle is not None and os.environ.get(unless) == "1":
        pytest.fail(obstacle)
    elif obstacle is not None:
        pytest.skip(obstacle)
