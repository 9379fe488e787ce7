"""Programs that tests need from Debian's packages: installed where they are missing and this is root."""

import os
import shutil
import subprocess

import pytest


def install(packages: tuple[str, ...], programs: tuple[str, ...]) -> str | None:
    """Why these programs cannot be had here; None where they can."""
    if all(map(shutil.which, programs)):
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{', '.join(programs)}: not installed, and this is not root on Debian"
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        done = subprocess.run(["apt-get", "-qq", *words], capture_output=True, text=True, timeout=400, env=quiet)
        if done.returncode != 0:
            return f"apt-get {words[0]} failed: {done.stderr[-300:]}"
    return None


def skip_because(obstacle: str | None, *, unless: str) -> None:
    """Skips the test where there is an obstacle; a failure where the environment says `unless`=1."""
    if obstacle is not None and os.environ.get(unless) == "1":
        pytest.fail(obstacle)
    elif obstacle is not None:
        pytest.skip(obstacle)
