"""Stale locks of killed torch compilations, with a real compiler and torch's own lock files."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from torch.utils.cpp_extension import get_default_build_root
from torch.utils.file_baton import FileBaton

from dpokit.torch_build_locks import find_build_folder, remove_dead_locks

COMPILE = """
import sys
from torch.utils.cpp_extension import load

from dpokit.torch_build_locks import remove_dead_locks

remove_dead_locks(dead_after_seconds=0)
load("answer", [sys.argv[1]], is_python_module=False)
print("compiled")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which only this test's torch compiles."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    made = tmp_path / "answer"
    made.mkdir()
    return made


def test_a_killed_compilation_does_not_block_the_next_one(folder, tmp_path):
    source, endless = tmp_path / "answer.cpp", tmp_path / "endless"
    source.write_text("int answer() { return 42; }\n")
    endless.write_text('#!/bin/sh\ncase "$*" in *answer.cpp*) touch compiling; exec sleep 600;; esac\nexec c++ "$@"\n')
    endless.chmod(0o755)
    command = [sys.executable, "-c", COMPILE, str(source)]

    killed = subprocess.Popen(command, env={**os.environ, "CXX": str(endless)})
    deadline = time.monotonic() + 300
    while not (folder / "compiling").exists():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for process in [killed, *psutil.Process(killed.pid).children(recursive=True)]:
        process.kill()
    killed.wait()
    assert (folder / "lock").exists(), "torch removes the lock itself now: delete dpokit.torch_build_locks"

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr
    assert f"removed {folder / 'lock'}" in done.stderr
    assert not (folder / "lock").exists()


def test_the_default_folder_is_the_one_of_torch(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert find_build_folder().resolve() == Path(get_default_build_root())


def test_a_lock_that_a_local_process_holds_is_kept(folder):
    baton = FileBaton(folder / "lock")
    assert baton.try_acquire()
    remove_dead_locks(dead_after_seconds=0)
    baton.release()  # raises if the lock is gone


def test_a_young_lock_of_another_machine_is_waited_for(folder, capfd):
    (folder / "lock").touch()
    far_away = threading.Timer(1.0, (folder / "lock").unlink)
    far_away.start()
    remove_dead_locks()
    assert not (folder / "lock").exists()
    far_away.join(5)
    assert not far_away.is_alive()
    log = capfd.readouterr().err
    assert log.count("waiting up to 300 s") == 1 and "removed" not in log
