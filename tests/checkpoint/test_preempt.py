"""What counts as being told to end: the signals, and a time limit that somebody knows."""

import os
import signal
import time

import pytest

from dpokit.checkpoint.preempt import SIGNALS, Notice, choose_signals, find_preempted_restart, find_time_limit
from dpokit.errors import SettingsError
from dpokit.rundir import RunDir


def test_a_signal_is_noted_once_and_kills_nothing():
    notice = Notice(rank=3)
    with notice.heard():
        assert not notice.is_given()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.is_given()
    assert notice.why == "SIGUSR1 on rank 3"


def test_afterwards_the_signals_mean_what_they_did_before():
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    with Notice(rank=0).heard():
        pass
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before


@pytest.mark.parametrize(("asked", "names"), [(None, SIGNALS), ("USR2", ("SIGUSR2",)), ("sigint", ("SIGINT",))])
def test_a_signal_is_chosen_by_either_of_its_names(asked, names):
    assert choose_signals(asked) == names


@pytest.mark.parametrize("asked", ["KILL", "STOP", "nonsense", ""])
def test_what_no_process_can_hear_is_refused(asked):
    with pytest.raises(SettingsError, match="preempt_signal is"):
        choose_signals(asked)


@pytest.mark.parametrize(("count", "launcher", "ends"), [("0", 0, False), ("1", 0, True), ("1", 1, False)])
def test_only_the_launcher_that_began_a_preempted_run_may_not_begin_it_again(
    count, launcher, ends, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    run = RunDir(tmp_path)
    run.take_possession(0)
    (start,) = run.read_run()["generations"]
    run.write_run(state="preempted", why="SIGTERM on rank 1")
    run.write_run(generations=[{**start, "launcher": launcher or start["launcher"]}])
    assert (find_preempted_restart(run) is not None) is ends


def test_a_time_limit_is_kept_so_many_seconds_ahead(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 100))
    assert Notice(rank=0, save_before_seconds=200).is_given()
    assert not Notice(rank=0, save_before_seconds=10).is_given()
    assert not Notice(rank=0).is_given()


def test_a_time_limit_that_nobody_knows_is_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SettingsError, match="no time limit is known"):
        Notice(rank=0, save_before_seconds=60)


def test_squeue_is_asked_where_slurm_exports_no_limit(monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 2030-01-02T03:04:05\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert time.localtime(find_time_limit())[:5] == (2030, 1, 2, 3, 4)
    (tmp_path / "squeue").write_text("#!/bin/sh\necho N/A\n")
    assert find_time_limit() is None
