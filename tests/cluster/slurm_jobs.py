"""Submits jobs of runs to a `real_slurm.Cluster` and reads their logs, records and metrics."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from real_slurm import PATIENCE_SECONDS, Cluster, skip_without_slurm

from dpokit.cluster.slurm import SlurmJob, render_job

RECIPE = ROOT / "recipes" / "dpo_gpt2.py"
CONFIGS = ROOT / "accelerate_configs"
ONE, TWO = CONFIGS / "single_gpu.yaml", CONFIGS / "ddp_cpu.yaml"
TIMING = ("seconds", "runtime", "per_second", "total_flos", "wasted_positions")


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster of three nodes; skips the test if none can be started."""
    skip_without_slurm()
    made = Cluster(nodes=3)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@contextmanager
def nothing_left(cluster: Cluster) -> Iterator[None]:
    """Cancels all jobs after a test, so that no test meets the jobs of another."""
    yield
    cluster.run("scancel", "--user=root")
    cluster.wait_until(cluster.all_idle, "the nodes to be idle again")


def submit(cluster: Cluster, run: Path, *flags: str, **options: object) -> str:
    """Queues a job with this run folder and returns its id."""
    fields = {"recipe": RECIPE, "config_file": TWO, "nodes": 2, "processes_per_node": 1} | options
    sbatch = (f"--output={run}.%j.out", *fields.pop("sbatch", ()))
    job = SlurmJob(flags=("--output_dir", str(run), *flags), sbatch=sbatch, **fields)
    return cluster.run("sbatch", "--parsable", text=render_job(job)).strip()


def log_of(run: Path) -> str:
    # Two starts that run at once share the file, and may split each other's characters.
    return "".join(path.read_text(errors="replace") for path in run.parent.glob(f"{run.name}.*.out"))


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}


def metrics_of(run: Path) -> list[dict]:
    """The logged records without the values that depend on the clock."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in record.items() if not any(word in k for word in TIMING)} for record in records]


def saved_step(run: Path) -> int:
    return max(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))


def wait_until_step(cluster: Cluster, job: str, run: Path, step: int) -> None:
    _wait_for_run(cluster, job, run, lambda: len(metrics_of(run)) >= step, f"step {step}")


def wait_until_begun(cluster: Cluster, job: str, run: Path, starts: int = 1) -> None:
    _wait_for_run(cluster, job, run, lambda: len(record_of(run).get("generations", [])) >= starts, f"start {starts}")


def _wait_for_run(cluster: Cluster, job: str, run: Path, holds: Callable[[], bool], event: str) -> None:
    """Waits until `holds`, and makes a requeued job start at once.

    A node that comes or goes may end a start before it begins.
    """

    def holds_now() -> bool:
        cluster.hurry(job, cluster.show(job))
        return holds()

    cluster.wait_until(holds_now, f"{event} of {run}", 2 * PATIENCE_SECONDS, more=lambda: log_of(run)[-2000:])


def end_of(cluster: Cluster, job: str, run: Path) -> str:
    """Waits until a job has ended, after any number of further starts, and returns its last state."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    _wait_for_run(cluster, job, run, lambda: cluster.show(job).get("JobState") in ends, "the end")
    state = cluster.show(job)["JobState"]
    assert state == "COMPLETED" or log_of(run), "a job that fails writes the reason to its log"
    return state


def nodes_of(cluster: Cluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.show(job)["NodeList"]).split()


def same_metrics(first: list[dict], second: list[dict]) -> bool:
    return [a.keys() for a in first] == [b.keys() for b in second] and all(
        a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-6) for a, b in zip(first, second, strict=True) for name in a
    )
