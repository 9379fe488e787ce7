"""Jobs of runs on a `real_slurm.Cluster`, and what they left behind."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from real_slurm import PATIENCE_SECONDS, Cluster, skip_without_slurm

from dpokit.cluster.slurm import Job, render_job

RECIPE = ROOT / "recipes" / "dpo_gpt2.py"
CONFIGS = ROOT / "accelerate_configs"
ONE, TWO = CONFIGS / "single_gpu.yaml", CONFIGS / "ddp_cpu.yaml"
TIMING = ("seconds", "runtime", "per_second", "total_flos", "wasted_positions")


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Three nodes; skips where they cannot be had."""
    skip_without_slurm()
    made = Cluster(nodes=3)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@contextmanager
def nothing_left(cluster: Cluster) -> Iterator[None]:
    """No test meets the jobs of another."""
    yield
    cluster.run("scancel", "--user=root")
    cluster.wait_until(cluster.all_idle, "the nodes to be idle again")


def submit(cluster: Cluster, run: Path, *flags: str, **given: object) -> str:
    """Queues a job with this run folder; its id."""
    asked = {"recipe": RECIPE, "config_file": TWO, "nodes": 2, "processes_per_node": 1} | given
    options = (f"--output={run}.%j.out", *asked.pop("sbatch", ()))
    job = Job(flags=("--output_dir", str(run), *flags), sbatch=options, **asked)
    return cluster.run("sbatch", "--parsable", text=render_job(job)).strip()


def log_of(run: Path) -> str:
    # Two starts that live at once share the file, and may cut each other's letters.
    return "".join(path.read_text(errors="replace") for path in run.parent.glob(f"{run.name}.*.out"))


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}


def metrics_of(run: Path) -> list[dict]:
    """The logged records without what depends on the clock."""
    file = run / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{k: v for k, v in one.items() if not any(word in k for word in TIMING)} for one in records]


def saved_step(run: Path) -> int:
    return max(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))


def wait_until_step(cluster: Cluster, job: str, run: Path, step: int) -> None:
    _wait_for_run(cluster, job, run, lambda: len(metrics_of(run)) >= step, f"step {step}")


def wait_until_begun(cluster: Cluster, job: str, run: Path, starts: int = 1) -> None:
    _wait_for_run(cluster, job, run, lambda: len(record_of(run).get("generations", [])) >= starts, f"start {starts}")


def _wait_for_run(cluster: Cluster, job: str, run: Path, holds: Callable[[], bool], what: str) -> None:
    """Nodes that come and go may end a start before it begins; the next one is not waited for long."""

    def holds_now() -> bool:
        cluster.hurry(job, cluster.show(job))
        return holds()

    cluster.wait_until(holds_now, f"{what} of {run}", 2 * PATIENCE_SECONDS, more=lambda: log_of(run)[-2000:])


def end_of(cluster: Cluster, job: str, run: Path) -> str:
    """The state a job ends in, after as many more starts as it takes."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    _wait_for_run(cluster, job, run, lambda: cluster.show(job).get("JobState") in ends, "the end")
    state = cluster.show(job)["JobState"]
    assert state == "COMPLETED" or log_of(run), "a job that fails says why"
    return state


def nodes_of(cluster: Cluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.show(job)["NodeList"]).split()


def same_metrics(one: list[dict], other: list[dict]) -> bool:
    return [a.keys() for a in one] == [b.keys() for b in other] and all(
        a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-6) for a, b in zip(one, other, strict=True) for name in a
    )
