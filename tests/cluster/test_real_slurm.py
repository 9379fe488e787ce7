"""Runs under a real Slurm, on two nodes over gloo: finished, preempted, requeued, and after failures of the cluster."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import write_pairs
from real_slurm import Cluster
from slurm_jobs import (
    CONFIGS,
    ONE,
    RECIPE,
    end_of,
    log_of,
    metrics_of,
    nodes_of,
    nothing_left,
    record_of,
    running_cluster,
    same_metrics,
    saved_step,
    submit,
    wait_until_begun,
    wait_until_step,
)
from test_cli import dpokit

from dpokit.checkpoint.store import find_checkpoints
from dpokit.rundir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
STEPS, MID = 120, 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as made:
        yield made


@pytest.fixture(autouse=True)
def clean(cluster) -> Iterator[None]:
    with nothing_left(cluster):
        yield


@pytest.fixture(scope="module")
def training_flags(tmp_path_factory, tiny_gpt2) -> list[str]:
    pairs = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 40)
    return [
        *("--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs), "--max_length", "96"),
        *("--max_steps", str(STEPS), "--save_steps", "10", "--logging_steps", "1", "--learning_rate", "1e-3"),
        *("--eval_strategy", "no", "--load_best_model_at_end", "false", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "4", "--report_to", "none", "--ddp_timeout", "60"),
    ]


@pytest.fixture(scope="module")
def uninterrupted(cluster, training_flags, tmp_path_factory) -> list[dict]:
    """The metrics of a run on two nodes that nothing interrupted."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    job = submit(cluster, run, *training_flags)
    assert end_of(cluster, job, run) == "COMPLETED", log_of(run)[-3000:]
    assert record_of(run)["state"] == "finished"
    assert record_of(run)["world_size"] == 2
    assert (run / "model" / "model.safetensors").is_file()
    return metrics_of(run)


def check_resumed(cluster: Cluster, job: str, run: Path, expected: list[dict]) -> None:
    """The job is completed, and the run resumed from a checkpoint of its own."""
    check_ended(cluster, job, run, expected)
    assert record_of(run)["generations"][-1]["resumed_step"] >= 10


def check_ended(cluster: Cluster, job: str, run: Path, expected: list[dict]) -> None:
    """The job is completed, and the metrics equal those of the uninterrupted run."""
    assert end_of(cluster, job, run) == "COMPLETED", log_of(run)[-3000:]
    assert record_of(run)["state"] == "finished"
    assert same_metrics(metrics_of(run), expected)


def test_a_run_on_two_nodes_completes_its_job(uninterrupted):
    assert [record["step"] for record in uninterrupted] == list(range(1, STEPS + 1))


def test_dpokit_submit_queues_a_job_on_one_node(cluster, training_flags, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    run = tmp_path / "100% my run"
    done = dpokit("submit", str(RECIPE), "--config-file", str(ONE), *training_flags, "--output_dir", str(run))
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    log = run / f"slurm-{job}.out"
    assert f"log: {log}\n" in done.stderr
    assert end_of(cluster, job, run) == "COMPLETED", log.read_text()[-3000:]
    assert cluster.show(job)["Restarts"] == "0"
    status = json.loads(dpokit("status", str(run), "--json").stdout)
    assert (status["next"], status["steps"], status["percent"]) == ("done", STEPS, 100.0)


def test_a_run_preempted_twice_ends_with_the_same_metrics(cluster, training_flags, uninterrupted, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, *training_flags)
    for time_no, options in enumerate((["--signal=USR1"], ["--batch", "--signal=USR1"]), start=1):
        wait_until_step(cluster, job, run, MID * time_no)
        cluster.run("scancel", *options, job)
        cluster.wait_for_requeue(job, time_no)
        assert record_of(run)["state"] == "preempted", log_of(run)[-3000:]
        saved = saved_step(run)
        wait_until_begun(cluster, job, run, starts=time_no + 1)
        assert record_of(run)["generations"][time_no]["resumed_step"] == saved
    check_resumed(cluster, job, run, uninterrupted)


def test_a_run_survives_a_restart_of_the_controller(cluster, training_flags, uninterrupted, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, *training_flags)
    cluster.wait_for(job, ["RUNNING"])
    time.sleep(8)
    restart_controller(cluster)
    wait_until_step(cluster, job, run, MID)
    assert cluster.show(job)["Restarts"] == "0"
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for_requeue(job)
    check_resumed(cluster, job, run, uninterrupted)


def test_a_controller_that_dies_at_the_start_loses_no_step(cluster, training_flags, uninterrupted, tmp_path):
    """Slurm may kill and forget the job, hold it, or let it run; the same command continues the run in each case."""
    run = tmp_path / "run"
    job = submit(cluster, run, *training_flags)
    cluster.wait_for(job, ["RUNNING"])
    time.sleep(1)
    restart_controller(cluster)
    if not cluster.show(job):
        cluster.wait_until(lambda: not workers_of(run), "Slurm to end what it has forgotten")
        job = submit(cluster, run, *training_flags)

    def is_running() -> bool:
        shown = cluster.show(job)
        if shown.get("JobState") == "PENDING":  # its nodes are drained, it is held, or it may start in two minutes
            for node in cluster.nodes:
                cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
            cluster.run("scontrol", "release", job)
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        return shown.get("JobState") == "RUNNING" and bool(workers_of(run))

    cluster.wait_until(is_running, "the job to run again")
    check_ended(cluster, job, run, uninterrupted)


def restart_controller(cluster: Cluster) -> None:
    cluster.kill_controller()
    time.sleep(2)
    cluster.start_controller()


@pytest.mark.parametrize(
    ("lose", "regain", "places"),
    [(Cluster.power_off, Cluster.power_on, (1, 0)), (Cluster.cut, Cluster.reconnect, (0,))],
    ids=["power", "network"],
)
def test_a_run_survives_the_loss_of_nodes(lose, regain, places, cluster, training_flags, uninterrupted, tmp_path):
    """First the node of a worker (1) is lost, then the node (0) that also runs the job script."""
    run = tmp_path / "run"
    job = submit(cluster, run, *training_flags)
    for time_no, place in enumerate(places, start=1):
        wait_until_step(cluster, job, run, MID * time_no)
        node = nodes_of(cluster, job)[place]
        lose(cluster, node)
        try:
            cluster.wait_for_requeue(job, time_no)
            wait_until_begun(cluster, job, run, starts=time_no + 1)
            assert node not in nodes_of(cluster, job)
        finally:
            regain(cluster, node)
    check_resumed(cluster, job, run, uninterrupted)


@pytest.mark.parametrize("lose", [Cluster.cut, Cluster.kill_slurmd], ids=["network", "slurmd"])
def test_a_start_on_a_lost_node_writes_nothing_after_the_next(lose, cluster, training_flags, tmp_path):
    """With its network cut it trains on in the shared folder; without slurmd, srun ends it after a while."""
    run, steps = tmp_path / "run", 1000
    job = submit(cluster, run, *training_flags, "--max_steps", str(steps), nodes=1, config_file=ONE)
    wait_until_step(cluster, job, run, MID)
    (node,) = nodes_of(cluster, job)
    (old,) = workers_of(run)
    lose(cluster, node)
    try:
        cluster.wait_for_requeue(job)
        assert lose == Cluster.kill_slurmd or old.is_running()
        wait_until_begun(cluster, job, run, starts=2)
        old.wait(timeout=60)
        assert end_of(cluster, job, run) == "COMPLETED", log_of(run)[-3000:]
    finally:
        cluster.power_off(node)
        cluster.power_on(node)
    assert lose == Cluster.kill_slurmd or "was taken over by a later start of this run" in log_of(run)
    assert [record["step"] for record in metrics_of(run)] == list(range(1, steps + 1))
    assert [start["host"] == node for start in record_of(run)["generations"]] == [True, False]
    assert record_of(run)["state"] == "finished"
    assert not any(checkpoint.resume_problem for checkpoint in find_checkpoints(RunDir(run), deep=True))


def test_both_forms_of_the_time_limit_signal_save_the_run(cluster, training_flags, tmp_path):
    """To the script (`B:`), as in launch/train.sbatch, or to the processes themselves."""
    forms = {"script": "B:USR1@70", "processes": "USR1@70"}
    jobs = {}
    for name, form in forms.items():
        flags = (*training_flags, "--max_steps", "100000")
        options = {"nodes": 1, "config_file": ONE, "time": "2", "sbatch": (f"--signal={form}",)}
        jobs[name] = submit(cluster, tmp_path / name, *flags, **options)
    for name, job in jobs.items():
        cluster.wait_for_requeue(job)
        record = record_of(tmp_path / name)
        assert record["state"] == "preempted", log_of(tmp_path / name)[-3000:]
        assert "SIGUSR1" in record["why"]
        newest = find_checkpoints(RunDir(tmp_path / name), deep=True)[0]
        assert newest.resume_problem is None
        assert newest.step == metrics_of(tmp_path / name)[-1]["step"]
        cluster.run("scancel", job)


@pytest.mark.parametrize("config", ["zero2_cpu", "zero3_cpu", "fsdp2_cpu"])
def test_a_preempted_sharded_run_resumes_on_two_nodes(config, cluster, training_flags, tmp_path):
    run, steps = tmp_path / "run", 40
    flags = (*training_flags, "--max_steps", str(steps), "--gradient_accumulation_steps", "1")
    job = submit(cluster, run, *flags, config_file=CONFIGS / f"{config}.yaml")
    wait_until_step(cluster, job, run, 12)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait_for_requeue(job)
    assert record_of(run)["state"] == "preempted", log_of(run)[-3000:]
    saved = saved_step(run)
    assert end_of(cluster, job, run) == "COMPLETED", log_of(run)[-3000:]
    assert [start["resumed_step"] for start in record_of(run)["generations"]] == [0, saved]
    assert [record["step"] for record in metrics_of(run)] == list(range(1, steps + 1))


def test_a_run_survives_a_killed_process(cluster, training_flags, uninterrupted, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, *training_flags)
    wait_until_step(cluster, job, run, MID)
    ranks = workers_of(run)
    assert len(ranks) == 2
    ranks[-1].send_signal(signal.SIGKILL)
    cluster.wait_for_requeue(job)
    assert "dpokit: requeue: " in log_of(run)
    check_resumed(cluster, job, run, uninterrupted)


def workers_of(run: Path) -> list[psutil.Process]:
    """The processes that train in this folder, on any node."""
    return [process for process in psutil.process_iter() if is_worker(process, run)]


def is_worker(process: psutil.Process, run: Path) -> bool:
    try:
        arguments = process.cmdline()
        return (
            arguments[:1] == [sys.executable]
            and str(run) in arguments
            and "accelerate.commands.launch" not in arguments
        )
    except psutil.Error:
        return False


def test_a_user_error_fails_the_job_without_a_restart(cluster, training_flags, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, *training_flags, "--learning_rat", "1")
    assert end_of(cluster, job, run) == "FAILED"
    assert cluster.show(job)["Restarts"] == "0"
    assert "did you mean --learning_rate?" in log_of(run)
    assert "dpokit: stop: the run never began" in log_of(run)
