"""launch/train.sbatch under a real Slurm, with a stand-in recipe that writes a run folder and trains nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from real_slurm import Cluster
from slurm_jobs import ONE, TWO, end_of, log_of, nothing_left, record_of, running_cluster, submit, wait_until_begun

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
STAND_IN = ROOT / "tests" / "cluster" / "stand_in.py"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as made:
        yield made


@pytest.fixture(autouse=True)
def clean(cluster) -> Iterator[None]:
    with nothing_left(cluster):
        yield


def stand_in(cluster: Cluster, run: Path, *flags: str, **options: object) -> str:
    return submit(cluster, run, *flags, **{"recipe": STAND_IN, "config_file": ONE, "nodes": 1} | options)


def test_a_run_that_slurm_preempts_is_saved_and_requeued(cluster, tmp_path):
    run = tmp_path / "run"
    job = stand_in(cluster, run, "--steps", "1000", nodes=3, config_file=TWO)
    cluster.wait_until(lambda: record_of(run).get("step", 0) >= 3, "step 3")
    other = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "-o", "/dev/null", "--wrap=sleep 3"
    ).strip()
    cluster.wait_for(other, ["COMPLETED"])
    cluster.wait_for_requeue(job)
    assert record_of(run)["state"] == "preempted"
    wait_until_begun(cluster, job, run, starts=2)
    assert record_of(run)["generations"][1]["resumed_step"] >= 3


def test_a_run_near_its_time_limit_is_saved_and_requeued(cluster, tmp_path):
    run = tmp_path / "run"
    job = stand_in(cluster, run, "--steps", "1000", time="1", signal_seconds=45)
    cluster.wait_for_requeue(job)
    assert record_of(run)["state"] == "preempted", log_of(run)
    assert record_of(run)["step"] < 250


def test_a_cancelled_job_is_not_requeued(cluster, tmp_path):
    run = tmp_path / "run"
    job = stand_in(cluster, run, "--steps", "1000")
    cluster.wait_until(lambda: record_of(run).get("step", 0) >= 3, "step 3")
    cluster.run("scancel", job)
    assert end_of(cluster, job, run) == "CANCELLED"
    cluster.wait_until(cluster.all_idle, "the job to be gone")
    assert cluster.show(job)["JobState"] == "CANCELLED"


def test_crashes_above_max_restarts_fail_the_job(cluster, tmp_path):
    run = tmp_path / "run"
    job = stand_in(cluster, run, "--crash_at", "2", "4", "6", max_restarts=1)
    cluster.wait_for_requeue(job)
    assert end_of(cluster, job, run) == "FAILED"
    assert "dpokit: stop: 2 crashes, and 1 restarts are allowed" in log_of(run)
    assert len(record_of(run)["generations"]) == 2


def test_a_run_without_a_new_checkpoint_fails_the_job(cluster, tmp_path):
    run = tmp_path / "run"
    job = stand_in(cluster, run, "--crash_at", "3", "3", "3", "--save_from", "9")
    cluster.wait_for_requeue(job)
    assert end_of(cluster, job, run) == "FAILED"
    assert "the last two starts both began at step 0" in log_of(run)


def test_a_user_error_in_a_later_step_fails_the_job(cluster, tmp_path):
    run = tmp_path / "run"
    job = stand_in(cluster, run, "--crash_at", "3", "--error", "DataError")
    assert end_of(cluster, job, run) == "FAILED"
    assert cluster.show(job)["Restarts"] == "0"
    assert "another start would fail in the same way: a crash at step 3" in log_of(run)


def test_one_job_of_an_array_is_requeued_without_the_others(cluster, tmp_path):
    # The last job has the array's own number, so a requeue by number would requeue all jobs.
    job = stand_in(cluster, tmp_path / "run_%a", "--steps", "40", array="3-4")
    first, last = tmp_path / "run_3", tmp_path / "run_4"
    for run in (first, last):
        cluster.wait_until(lambda run=run: record_of(run).get("step", 0) >= 3, "step 3")
    cluster.run("scancel", "--signal=USR1", f"{job}_4")
    cluster.wait_for_requeue(f"{job}_4")
    cluster.wait_for(f"{job}_3", ["COMPLETED"])
    cluster.wait_for(f"{job}_4", ["COMPLETED"])
    assert [len(record_of(run)["generations"]) for run in (first, last)] == [1, 2]


def test_a_job_has_its_cpus_and_the_variables_of_its_setup(cluster, tmp_path):
    run, setup = tmp_path / "run", tmp_path / "my set-up.sh"
    setup.write_text(f"module() {{ false; true; }}\nmodule load x\necho $SLURM_CPUS_PER_TASK > '{run}.cpus'\ncd /\n")
    job = stand_in(cluster, run, "--steps", "1000", setup=setup, cpus_per_task=2, mem="500M")
    # A step that got one CPU of the job's two would train half as fast.
    step = ("scontrol", "--oneliner", "show", "step", f"{job}.0")
    cluster.wait_until(lambda: "CPUs=2 " in cluster.run(*step), "a step with two CPUs", more=lambda: log_of(run))
    assert run.with_suffix(".cpus").read_text() == "2\n"
    cluster.wait_until(lambda: record_of(run).get("step", 0) >= 1, "step 1", more=lambda: log_of(run))
    other, setup = tmp_path / "other", tmp_path / "setup.sh"
    setup.write_text("module load no_such_module\n")
    job = stand_in(cluster, other, setup=setup)
    assert end_of(cluster, job, other) == "FAILED"
    assert cluster.show(job)["Restarts"] == "0"
    assert log_of(other).endswith(f"{setup} failed in line 1 (exit code 127); correct it and submit again\n")
    assert not other.exists()
