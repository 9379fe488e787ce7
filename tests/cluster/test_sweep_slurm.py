"""A search under a real Slurm: its trials are an array, a later worker continues it, cancelled jobs are recorded."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from real_slurm import Cluster
from slurm_jobs import nothing_left, running_cluster
from sweeping import Sweeping

from dpokit.cluster.slurm import SlurmJob
from dpokit.sweep.slurm import build_array

CONFIG = ROOT / "accelerate_configs" / "single_gpu.yaml"
GRID = f"config_file: {CONFIG}\nparameters: {{learning_rate: [1e-5, 2e-5, 5e-5]}}"
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as made:
        yield made


@pytest.fixture
def sweeping(cluster, tmp_path) -> Iterator[Sweeping]:
    text = f"settings: {{run_tags: [slow], max_steps: 12}}\n{GRID}"
    with nothing_left(cluster):
        yield Sweeping(tmp_path, text, SLURM_CONF=cluster.environment["SLURM_CONF"])


def wait_for(holds) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end, "the condition stayed false"
        time.sleep(0.2)


def test_an_array_has_settings_and_a_log_for_each_trial():
    job = SlurmJob(Path("recipes/dpo_gpt2.py"), CONFIG, sbatch=("--partition=gpu",))
    array = build_array(job, "/s/trial-%a-seed-43", [4, 0, 2], group="s")
    assert array.array == "0,2,4"
    assert array.flags == (
        *("--config", "/s/trial-%a-seed-43.yaml", "--output_dir", "/s/trial-%a-seed-43", "--run_group", "s"),
    )
    assert "--output=/s/trial-%a-seed-43.log" in array.options()
    assert "--partition=gpu" in array.options()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_grid_runs_as_an_array_and_can_be_continued(sweeping):
    process = sweeping.begin("--slurm", "--jobs", "3")
    wait_for(lambda: any(start["run"] != "trial-0" for start in sweeping.starts()))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 75, stderr[-3000:]
    assert "the queued trials go on" in stderr
    sweeping.finish("--slurm", "--jobs", "3")
    sweeping.check_whole(3, steps=12)
    assert len(sweeping.starts()) == 3
    jobs = [run.path.with_suffix(".job").read_text().strip() for run in sweeping.runs()]
    # The first job prepares data and reference for all and runs alone; the others are one array.
    assert jobs[0].partition("_")[0] != jobs[1].partition("_")[0] == jobs[2].partition("_")[0]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_cancelled_job_is_a_failed_trial(sweeping, cluster):
    process = sweeping.begin("--slurm", "--jobs", "3")
    wait_for(lambda: sweeping.starts())
    cluster.run("scancel", sweeping.runs()[0].path.with_suffix(".job").read_text().strip())
    _, stderr = process.communicate(timeout=2 * PATIENCE_SECONDS)
    assert process.returncode == 0, stderr[-3000:]
    assert "trial 0: failed" in stderr
    assert [run.read_run()["state"] for run in sweeping.runs()[1:]] == ["finished"] * 2
