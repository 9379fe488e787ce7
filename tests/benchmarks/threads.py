"""The worth of threads on a CPU: one process and two, with the threads that a run chooses and with other numbers."""

import os
import statistics
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.workloads import launch_recipe, prepare_training, read_steps

CORES = str(len(os.sched_getaffinity(0)))
# Title, processes and environment of each case.
CASES = {
    "one": ("1 process, chosen by the run", 1, {}),
    "one-1": ("1 process, 1 thread", 1, {"OMP_NUM_THREADS": "1"}),
    "two": ("2 processes, chosen by the run", 2, {}),
    "two-all": ("2 processes, all cores each", 2, {"OMP_NUM_THREADS": CORES}),
    "two-passive": (
        "2 processes, all cores each, passive",
        2,
        {"OMP_NUM_THREADS": CORES, "OMP_WAIT_POLICY": "PASSIVE"},
    ),
    "two-active": ("2 processes, all cores each, active", 2, {"OMP_NUM_THREADS": CORES, "OMP_WAIT_POLICY": "ACTIVE"}),
}


def measure(options: SimpleNamespace) -> dict[str, Any]:
    _, processes, environment = CASES[options.case]
    process = launch_recipe(
        options,
        processes=processes,
        environment=environment,
        dataset_name=options.folder / "data",
        per_device_train_batch_size=options.pairs // processes,
        precompute_ref_log_probs=False,
        max_steps=options.steps + 1,
        max_length=options.max_length,
    )
    steps = read_steps(options, process)
    return {"seconds": statistics.median(after["seconds"] - before["seconds"] for before, after in pairwise(steps))}


BENCHMARK = Benchmark(
    title="Threads",
    about="""
GPT-2 124M with random weights and real HH rows, 8 pairs a step, started by `accelerate launch`. The median of the
steps after the first counts. "Passive" and "active" are values of `OMP_WAIT_POLICY`.
""",
    columns={"case": ("case", ""), "seconds": ("s per step", ".2f"), "relative": ("relative time", ".2f")},
    cases={name: title for name, (title, *_) in CASES.items()},
    measure=measure,
    prepare=prepare_training,
    options={"model": "gpt2", "pairs": 8, "steps": 4, "max_length": 512},
    quick={"model": "tiny", "pairs": 2, "steps": 1, "max_length": 64, "cases": ["one", "two"]},
    baseline="one",
    speed=False,
    rounds=2,
)
