"""The threads of a run on CPU: the share of each process, its limits, and the number that every launcher ends with."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.distributed.cores import CpuLimits, count_cores, find_users_number, read_limits, share_cores

CORES = count_cores()


def on_cores(first: int, end: int, **limits) -> CpuLimits:
    return CpuLimits("here", tuple(map(str, range(first, end))), **limits)


@pytest.mark.parametrize(
    ("own", "others", "threads"),
    [
        pytest.param(on_cores(0, 8), [], 8, id="one process"),
        pytest.param(on_cores(0, 8), [on_cores(0, 8)], 4, id="two processes"),
        pytest.param(on_cores(0, 8), [on_cores(0, 8)] * 2, 2, id="a number that does not divide"),
        pytest.param(on_cores(0, 2), [on_cores(0, 2)] * 3, 1, id="more processes than cores"),
        pytest.param(on_cores(0, 8), [CpuLimits("elsewhere", ("0", "1"))], 8, id="another machine"),
        pytest.param(on_cores(0, 4), [on_cores(4, 8)], 4, id="each process bound to its own cores"),
        pytest.param(on_cores(0, 4), [on_cores(2, 6)], 3, id="half of the cores shared"),
        pytest.param(on_cores(0, 8, cpus=3.5), [], 3, id="quota"),
        pytest.param(on_cores(0, 8, cpus=4.0), [on_cores(0, 8, cpus=4.0)], 2, id="quota of two processes"),
        pytest.param(on_cores(0, 8, cpus=0.5), [], 1, id="quota below one CPU"),
        pytest.param(on_cores(0, 8, task="0", task_cpus=4), [], 4, id="Slurm task of one process"),
        pytest.param(
            on_cores(0, 8, task="0", task_cpus=4),
            [on_cores(0, 8, task="0", task_cpus=4)],
            2,
            id="Slurm task of two processes",
        ),
        pytest.param(
            on_cores(0, 8, task="0", task_cpus=4),
            [on_cores(0, 8, task="1", task_cpus=4)],
            4,
            id="two Slurm tasks on one machine",
        ),
    ],
)
def test_a_process_gets_its_share_of_the_cores(own, others, threads):
    assert share_cores(own, [own, *others]) == threads


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        pytest.param({}, math.inf, id="no cgroups"),
        pytest.param(
            {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "max 100000"}, math.inf, id="no quota"
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/cpu.max": "150000 100000"}, 1.5, id="version 2"
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/user/job",
                "sys/fs/cgroup/user/job/cpu.max": "max 100000",
                "sys/fs/cgroup/user/cpu.max": "400000 100000",
            },
            4.0,
            id="quota of a parent",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/docker/a1", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0, id="path of the host"
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:memory:/job\n4:cpu,cpuacct:/job\n0::/",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            3.0,
            id="version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "1:cpu:/job",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            math.inf,
            id="version 1 without quota",
        ),
    ],
)
def test_the_quota_of_a_cgroup_is_read(files, cpus, tmp_path):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert read_limits(tmp_path).cpus == cpus


def test_two_threads_of_one_physical_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6})
    for cpu, siblings in {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}.items():
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert read_limits(tmp_path).cores == ("0,4", "1,5", "6")


@pytest.mark.parametrize(("text", "cpus"), [("4", 4), ("", math.inf), ("0", math.inf), ("four", math.inf)])
def test_slurms_cpus_of_a_task_are_read(text, cpus, monkeypatch):
    for variable in ("SLURM_STEP_ID", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", text)
    assert read_limits().task_cpus == cpus, "in a batch script, which has the CPUs of all its tasks"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "16")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", text)
    assert read_limits().task_cpus == cpus, "in a step of srun"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_variable_without_a_launcher_is_the_users(name, monkeypatch):
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    assert find_users_number() is None
    monkeypatch.setenv(name, "3")
    assert find_users_number() == name


ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file"]
ONE = [*ACCELERATE, str(ROOT / "accelerate_configs" / "single_gpu.yaml")]
TWO = [*ACCELERATE, str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
# Starts a command on a single core.
ON_ONE_CORE = (
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.execv(sys.argv[1], sys.argv[1:])"
)
SHARE = max(1, CORES // 2)


@pytest.mark.cold
@pytest.mark.skipif(CORES < 2, reason="on one core each number of threads is 1")
@pytest.mark.parametrize(
    ("launcher", "environment", "threads", "line"),
    [
        pytest.param(ONE, {}, CORES, f"CPU: {CORES} thread", id="accelerate, one process"),
        pytest.param(TWO, {}, SHARE, f"CPU: {SHARE} thread", id="accelerate, two processes"),
        pytest.param(
            ONE, {"OMP_NUM_THREADS": "1"}, 1, f"(OMP_NUM_THREADS is set; {CORES} would use all cores)", id="variable"
        ),
        pytest.param([*TORCHRUN, "2"], {}, SHARE, " in each of 2 processes", id="torchrun, two processes"),
        pytest.param([], {}, CORES, f"CPU: {CORES} thread", id="no launcher", marks=pytest.mark.slow),
        pytest.param([*TORCHRUN, "1"], {}, CORES, f"CPU: {CORES} thread", id="torchrun, one", marks=pytest.mark.slow),
        pytest.param(
            [*TORCHRUN, "2"],
            {"OMP_NUM_THREADS": str(CORES)},
            CORES,
            f"{CORES} threads in each of 2 processes (OMP_NUM_THREADS is set",
            id="torchrun, variable",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*TWO, f"--num_cpu_threads_per_process={CORES}"],
            {},
            CORES,
            f"{CORES} threads in each of 2 processes (--num_cpu_threads_per_process is set",
            id="accelerate, flag",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["-c", ON_ONE_CORE, sys.executable, *ONE], {}, 1, "CPU: 1 thread", id="one core", marks=pytest.mark.slow
        ),
        pytest.param(
            ONE,
            {"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "1"},
            1,
            "CPU: 1 thread",
            id="Slurm, one CPU",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_uses_its_cores_under_every_launcher(
    launcher, environment, threads, line, tiny_gpt2, pairs_file, tmp_path: Path
):
    flags = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--eval_strategy", "no"]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_length", "96", "--max_steps", "1", "--use_cpu", "true"]
    flags += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--gradient_accumulation_steps", "1"]
    command = [sys.executable, *launcher, str(ROOT / "recipes" / "dpo_gpt2.py"), *flags]
    unset = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_STEP_ID")
    own = {name: value for name, value in os.environ.items() if name not in unset} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=420, env=own, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["machine"]["threads"] == threads
    [shown] = [text for text in done.stderr.splitlines() if text.startswith("CPU: ")]
    assert line in shown
