"""Installs programs that tests need from Debian's packages, if they are missing and the user is root."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def install(packages: tuple[str, ...], programs: tuple[str, ...]) -> str | None:
    """Installs missing programs; why they are not available, or None if they are."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        installed = all(map(shutil.which, programs))
        return None if installed else f"{', '.join(programs)}: not installed, and this is not root on Debian"
    command = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=5"]
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with (Path(tempfile.gettempdir()) / "dpokit-test-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a program exists before its package is complete: wait for its installation
        if all(map(shutil.which, programs)):
            return None
        for step in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run([*command, *step], capture_output=True, text=True, timeout=400, env=quiet)
            if done.returncode != 0:
                return f"apt-get {step[0]} failed: {done.stderr[-300:]}"
    return None


def skip_because(obstacle: str | None, *, unless: str) -> None:
    """Skips the test if there is an obstacle; fails it instead if the environment variable `unless` is 1."""
    if obstacle is not None and os.environ.get(unless) == "1":
        pytest.fail(obstacle)
    elif obstacle is not None:
        pytest.skip(obstacle)
