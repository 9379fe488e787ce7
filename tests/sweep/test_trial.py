"""One run of a trial: what its files say while they grow, which devices its processes have, when Slurm has it."""

import os
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.cluster.slurm import Job
from dpokit.rundir import MetricsFile, RunDir
from dpokit.sweep.slurm import Queue, QueuedRun
from dpokit.sweep.trial import TrialRun, find_best, follow

HOUR = 3600


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir(tmp_path / "trial-0")
    made.path.mkdir()
    made.take_possession(0)
    return made


def test_metrics_are_followed_while_they_grow_are_joined_and_are_written_anew(run):
    assert follow(run, "eval_loss") == []
    metrics = MetricsFile(run, after_step=0)
    for step in (1, 2, 3):
        metrics.log(step, 1.0, {"loss": 1.0})
        metrics.log(step, 1.0, {"eval_loss": 1 / step})
        assert follow(run, "eval_loss") == [{"step": n, "eval_loss": 1 / n} for n in range(1, step + 1)]
    metrics.log(4, 1.0, {"loss": 1.0})
    assert follow(run, "eval_loss")[-1] == {"step": 4}
    metrics.log(4, 1.0, {"eval_loss": 0.1})
    assert find_best(run, "eval_loss") == 0.1
    metrics = MetricsFile(run, after_step=2)  # a resume
    assert find_best(run, "eval_loss") == 0.5
    metrics.log(3, 1.0, {"eval_loss": 0.2})
    assert [record["step"] for record in follow(run, "eval_loss")] == [1, 2, 3]
    with run.metrics_jsonl.open("a") as file:
        file.write('{"step": 4, "eval_l')
    assert find_best(run, "eval_loss") == 0.2


def test_a_run_that_lost_its_worker_is_known_by_its_share_of_the_devices(run):
    started = TrialRun(0, {}, run, slot=1)
    started.start([sys.executable, "-c", "import time; time.sleep(100)"], {})
    try:
        assert TrialRun(0, {}, run).find_slot() == 1
    finally:
        started.end()
    assert TrialRun(0, {}, run).find_slot() is None


@pytest.fixture
def squeue(tmp_path, monkeypatch) -> Path:
    """What Slurm answers; without the file it cannot be reached."""
    answer, program = tmp_path / "answer", tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec cat {answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("dpokit.sweep.slurm.LOOK_SECONDS", 0.0)
    return answer


@pytest.fixture
def queued(run) -> QueuedRun:
    config = ROOT / "accelerate_configs" / "single_gpu.yaml"
    made = QueuedRun(0, {}, run, queue=Queue(Job(Path("recipes/dpo_gpt2.py"), config_file=config), group="s"))
    made.job_file.write_text("12_0\n")
    return made


def test_a_job_is_not_taken_for_lost_before_slurm_was_reached(queued, squeue):
    assert queued.is_running()
    squeue.write_text("12_0 RUNNING\n")
    assert queued.is_running()
    squeue.write_text("")
    assert not queued.is_running()


def test_a_run_that_waited_long_for_its_nodes_is_not_silent_when_it_gets_them(queued, squeue, monkeypatch):
    now = time.monotonic()
    for state, hours, silent_hours in (("PENDING", 3, 0), ("RUNNING", 4, 1), ("RUNNING", 6, 3)):
        squeue.write_text(f"12_0 {state}\n")
        monkeypatch.setattr(time, "monotonic", lambda hours=hours: now + hours * HOUR)
        assert queued.count_silent_seconds() == silent_hours * HOUR
    queued.log.touch()
    assert queued.count_silent_seconds() == 0
