"""Requests to save and exit: by a signal, or by a known time limit."""

import os
import signal
import time

import pytest

from dpokit.checkpoint.preempt import SIGNALS, Notice, choose_signals, find_preempted_restart, find_time_limit
from dpokit.errors import SettingsError
from dpokit.interrupts import Interrupted
from dpokit.rundir import RunDir


def test_the_first_signal_is_recorded_and_none_ends_the_process():
    notice = Notice(rank=3)
    with notice.listen():
        assert not notice.is_given()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.is_given()
    assert notice.why == "SIGUSR1 on rank 3"


INT, TERM, NEVER = signal.SIGINT, signal.SIGTERM, None
# signals, moment, whether torchrun started the process; index of the signal that ends it at once
ENDS = {
    "Ctrl-C before the first step": ([INT], "start", False, 0),
    "Ctrl-C before the first step, with a launcher": ([INT, INT], "start", True, 0),
    "Ctrl-C while the reference is computed": ([INT], "reference", False, 0),
    "Ctrl-C once": ([INT], "training", False, NEVER),
    "Ctrl-C twice": ([INT, INT], "training", False, 1),
    "Ctrl-C after SIGTERM": ([TERM, INT], "training", False, 1),
    "SIGTERM after Ctrl-C": ([INT, TERM], "training", False, NEVER),
    "Ctrl-C twice, the second one as the launcher passes it on": ([INT, TERM], "training", True, 1),
    "SIGTERM before the first step": ([TERM], "start", False, 0),
    "SIGTERM while the reference is computed": ([TERM], "reference", False, NEVER),
    "SIGTERM twice": ([TERM, TERM], "training", True, NEVER),
}


@pytest.mark.parametrize("name", ENDS)
def test_which_signal_ends_a_run_without_a_save(name, monkeypatch):
    signals, moment, launched, ends = ENDS[name]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    notice = Notice(rank=0)
    notice.is_training, notice.checked_at_boundaries = moment == "training", moment != "start"
    now = time.monotonic()
    for place, number in enumerate(signals):
        monkeypatch.setattr(time, "monotonic", lambda place=place: now + 2 * place)
        if place == ends:
            with pytest.raises(Interrupted):
                notice.note(number)
            return
        notice.note(number)
    assert notice.is_given()


def test_a_signal_that_comes_twice_at_once_counts_once():
    notice = Notice(rank=0)
    notice.is_training = True
    notice.note(INT)
    notice.note(INT)
    notice.is_training = False
    before = Notice(rank=0)
    with pytest.raises(Interrupted):
        before.note(INT)
    before.note(INT)  # the first one is still being handled


def test_ctrl_c_named_as_preempt_signal_saves_like_it():
    notice = Notice(rank=0)
    with notice.listen(("SIGINT",)):
        os.kill(os.getpid(), INT)
    assert notice.is_given()


def test_the_former_signal_handlers_are_restored():
    before = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    with Notice(rank=0).listen():
        pass
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == before


@pytest.mark.parametrize(("flag", "names"), [(None, SIGNALS), ("USR2", ("SIGUSR2",)), ("sigint", ("SIGINT",))])
def test_a_signal_is_chosen_with_or_without_sig(flag, names):
    assert choose_signals(flag) == names


@pytest.mark.parametrize("flag", ["KILL", "STOP", "nonsense", ""])
def test_a_signal_that_cannot_be_caught_or_is_unknown_is_refused(flag):
    with pytest.raises(SettingsError, match="preempt_signal is"):
        choose_signals(flag)


@pytest.mark.parametrize(("count", "launcher", "ends"), [("0", 0, False), ("1", 0, True), ("1", 1, False)])
def test_a_launcher_does_not_restart_a_run_it_saw_preempted(count, launcher, ends, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    run = RunDir(tmp_path)
    run.take_possession(0)
    (start,) = run.read_run()["generations"]
    run.write_run(state="preempted", why="SIGTERM on rank 1")
    run.write_run(generations=[{**start, "launcher": launcher or start["launcher"]}])
    assert (find_preempted_restart(run) is not None) is ends


def test_a_time_limit_requests_a_save_some_seconds_ahead(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 100))
    assert Notice(rank=0, save_before_seconds=200).is_given()
    assert not Notice(rank=0, save_before_seconds=10).is_given()
    assert not Notice(rank=0).is_given()


def test_a_save_ahead_of_an_unknown_time_limit_is_refused(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SettingsError, match="no time limit is known"):
        Notice(rank=0, save_before_seconds=60)


def test_squeue_is_called_if_slurm_exports_no_time_limit(monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 2030-01-02T03:04:05\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert time.localtime(find_time_limit())[:5] == (2030, 1, 2, 3, 4)
    (tmp_path / "squeue").write_text("#!/bin/sh\necho N/A\n")
    assert find_time_limit() is None
