"""No decision depends on a clock that changes, on a machine that sleeps, or on file times that a copy changed."""

import json
import os
import shutil
import socket
import time

import pytest
from run_folders import add_evaluation, make_run, make_steps

from dpokit.bounded_http import read_retry_after
from dpokit.checkpoint.preempt import Notice
from dpokit.report.read import load_run
from dpokit.rundir import RunDir
from dpokit.sweep.trial import TrialRun
from dpokit.torch_build_locks import remove_dead_locks

HOUR = 3600.0
# Changes of the clock while a program runs, in seconds.
STEPS = {"an hour ahead": HOUR, "an hour back": -HOUR, "to 1970": -time.time(), "ten years ahead": 10 * 8766 * HOUR}


@pytest.fixture(params=STEPS)
def set_clock(request, monkeypatch):
    """Changes the clock of this process, as an operator or a time server changes that of a machine."""
    real = time.time
    return lambda: monkeypatch.setattr(time, "time", lambda: real() + STEPS[request.param])


def set_times(folder, *, reverse: bool) -> None:
    """Sets ascending or descending file times, like a copy or an archive."""
    for at, path in enumerate(sorted(folder.rglob("*"), reverse=reverse)):
        os.utime(path, (at, at))


@pytest.fixture
def run(tmp_path) -> RunDir:
    """A copy of a finished run that was evaluated and merged."""
    folder = make_run(tmp_path / "run", make_steps(6, every=3))
    add_evaluation(folder)
    run = RunDir(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    for made in (run.model, run.merged):
        made.mkdir()
        (made / "model.safetensors").touch()
    run.merge_json.write_text(json.dumps({"end": run.find_end()}))
    return run


@pytest.mark.parametrize("reverse", [False, True])
def test_a_copy_keeps_its_merge_and_its_evaluation(reverse, run):
    set_times(run.path, reverse=reverse)
    assert run.find_whole() == run.merged
    assert load_run(run.path, name="run").notes == []


@pytest.mark.parametrize("reverse", [False, True])
def test_a_copy_of_a_resumed_run_has_an_outdated_merge(reverse, run):
    run.take_possession(6)
    run.write_run(state="finished")
    set_times(run.path, reverse=reverse)
    assert run.find_whole() == run.model
    (note,) = load_run(run.path, name="run").notes
    assert "left out: eval/pairs.json, eval/answers.json (" in note


def test_the_silence_of_a_trial_does_not_depend_on_the_clock(set_clock, tmp_path):
    trial = TrialRun(0, {}, RunDir(tmp_path / "trial-0"))
    trial.log.touch()
    assert trial.count_silent_seconds() < HOUR / 2
    set_clock()
    assert trial.count_silent_seconds() < HOUR / 2
    os.utime(trial.log, (0, 0))
    assert trial.count_silent_seconds() < HOUR / 2


def test_a_time_limit_does_not_depend_on_the_clock(set_clock, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 2 * HOUR)))
    notice = Notice(0, save_before_seconds=60)
    set_clock()
    assert not notice.is_given()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * HOUR)
    assert notice.is_given()


@pytest.mark.parametrize("seconds", [-HOUR, HOUR / 2, HOUR])
def test_a_lock_with_the_time_of_another_clock_is_waited_for(seconds, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "answer" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - seconds,) * 2)
    began = time.monotonic()
    remove_dead_locks(dead_after_seconds=1.0)
    assert time.monotonic() - began >= 1.0
    assert not lock.exists()


@pytest.fixture
def search(tmp_path):
    pytest.importorskip("optuna")
    from dpokit.sweep.space import load_space
    from dpokit.sweep.study import Search

    space = tmp_path / "space.yaml"
    space.write_text("recipe: dpo_gpt2\nparameters: {beta: [0.1, 0.2]}\n")
    return Search(load_space(space), tmp_path / "sweep", storage=None, name="own")


def test_a_local_worker_is_recognised_with_any_clock(search, set_clock):
    set_clock()
    assert search._is_alive(search.worker)
    host, pid, start = search.worker.split(":")
    assert not search._is_alive(f"{host}:{pid}:{int(start) + 1}")


def test_a_remote_worker_is_alive_while_its_beat_changes(search, set_clock, monkeypatch):
    worker = f"not-{socket.gethostname()}:12:34"
    sign = search.folder / "workers" / f"not-{socket.gethostname()}-12"
    assert not search._is_alive(worker)
    now = time.monotonic()
    alive = []
    for minutes, beat in ((0, 1), (1, 1), (2.5, 2), (4, 2), (5, 2)):
        sign.write_text(json.dumps({"beat": beat}))
        os.utime(sign, (0, 0))
        monkeypatch.setattr(time, "monotonic", lambda minutes=minutes: now + 60 * minutes)
        alive.append(search._is_alive(worker))
        set_clock()
    assert alive == [True, True, True, True, False]


WAITS = {
    "seconds": ({"retry-after": "7"}, 7.0),
    "a date by the server's clock": (
        {"retry-after": "Tue, 01 Jan 1980 00:01:00 GMT", "date": "Tue, 01 Jan 1980 00:00:30 GMT"},
        30.0,
    ),
    "a date that is over": ({"retry-after": "Tue, 01 Jan 1980 00:00:00 GMT"}, 0.0),
    "a date alone, ahead": ({"retry-after": "Tue, 01 Jan 2999 00:00:00 GMT", "date": "no date"}, None),
    "no end": ({"retry-after": "inf"}, None),
    "less than nothing": ({"retry-after": "-5"}, None),
    "no number": ({"retry-after": "soon"}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("case", WAITS)
def test_a_retry_date_is_compared_with_the_servers_clock(case):
    headers, seconds = WAITS[case]
    assert read_retry_after(headers) == seconds
