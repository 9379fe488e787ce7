"""A run of a trial: its growing metrics, the devices of its processes, and its state in Slurm's queue."""

import os
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.cluster.slurm import SlurmJob
from dpokit.rundir import MetricsFile, RunDir
from dpokit.sweep.slurm import Queue, QueuedRun
from dpokit.sweep.trial import TrialRun, find_best_value, follow

HOUR = 3600


@pytest.fixture
def run(tmp_path) -> RunDir:
    folder = RunDir(tmp_path / "trial-0")
    folder.path.mkdir()
    folder.take_possession(0)
    return folder


def test_metrics_are_followed_through_growth_and_resume(run):
    assert follow(run, "eval_loss") == []
    metrics = MetricsFile(run, after_step=0)
    for step in (1, 2, 3):
        metrics.log(step, 1.0, {"loss": 1.0})
        metrics.log(step, 1.0, {"eval_loss": 1 / step})
        assert follow(run, "eval_loss") == [{"step": n, "eval_loss": 1 / n} for n in range(1, step + 1)]
    metrics.log(4, 1.0, {"loss": 1.0})
    assert follow(run, "eval_loss")[-1] == {"step": 4}
    metrics.log(4, 1.0, {"eval_loss": 0.1})
    assert find_best_value(run, "eval_loss") == 0.1
    metrics = MetricsFile(run, after_step=2)  # a resume
    assert find_best_value(run, "eval_loss") == 0.5
    metrics.log(3, 1.0, {"eval_loss": 0.2})
    assert [record["step"] for record in follow(run, "eval_loss")] == [1, 2, 3]
    with run.metrics_jsonl.open("a") as file:
        file.write('{"step": 4, "eval_l')
    assert find_best_value(run, "eval_loss") == 0.2


def test_a_new_worker_reads_the_slot_of_a_running_run(run):
    started = TrialRun(0, {}, run, slot=1)
    started.start([sys.executable, "-c", "import time; time.sleep(100)"], {})
    try:
        assert TrialRun(0, {}, run).find_slot() == 1
    finally:
        started.end()
    assert TrialRun(0, {}, run).find_slot() is None


@pytest.fixture
def squeue(tmp_path, monkeypatch) -> Path:
    """The file with the answer of squeue; without the file squeue fails."""
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
    trial_run = QueuedRun(0, {}, run, queue=Queue(SlurmJob(Path("recipes/dpo_gpt2.py"), config_file=config), group="s"))
    trial_run.job_file.write_text("12_0\n")
    return trial_run


def test_a_job_counts_as_running_until_slurm_answers(queued, squeue):
    assert queued.is_running()
    squeue.write_text("12_0 RUNNING\n")
    assert queued.is_running()
    squeue.write_text("")
    assert not queued.is_running()


def test_the_wait_for_nodes_is_no_silence(queued, squeue, monkeypatch):
    now = time.monotonic()
    for state, hours, silent_hours in (("PENDING", 3, 0), ("RUNNING", 4, 1), ("RUNNING", 6, 3)):
        squeue.write_text(f"12_0 {state}\n")
        monkeypatch.setattr(time, "monotonic", lambda hours=hours: now + hours * HOUR)
        assert queued.count_silent_seconds() == pytest.approx(silent_hours * HOUR)
    queued.log.touch()
    assert queued.count_silent_seconds() == 0
