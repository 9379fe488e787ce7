"""The time that a user waits: for help, for a recipe's first line and first step; beside the import of TRL alone."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.workloads import launch_recipe, make_model, read_pairs, write_rows

COMMANDS = {
    "trl": ["-c", "from trl import DPOTrainer"],
    "help": ["-m", "dpokit.cli", "--help"],
    "plan-help": ["-m", "dpokit.cli", "plan", "--help"],
}


def prepare(options: SimpleNamespace) -> None:
    make_model(options.folder, options.model)
    write_rows(options.folder / "data" / "train.jsonl", read_pairs(40))


def measure(options: SimpleNamespace) -> dict[str, Any]:
    if options.case in COMMANDS:
        began = time.monotonic()
        subprocess.run([sys.executable, *COMMANDS[options.case]], check=True, capture_output=True)
        return {"seconds": time.monotonic() - began}
    seconds = [launch(options) for _ in range(2)]  # the first fills the caches
    return {"seconds": seconds[-1][options.case]}


def launch(options: SimpleNamespace) -> dict[str, float]:
    """Seconds until a recipe has shown its first `line`, and until it has made its first `step`."""
    began = time.monotonic()
    process = launch_recipe(
        options,
        environment={"OMP_NUM_THREADS": "1"},
        dataset_name=options.folder / "data",
        max_length=64,
        max_steps=1,
        overwrite_run=True,
    )
    assert process.stderr is not None
    seconds: dict[str, float] = {}
    log = []
    for line in process.stderr:
        log.append(line)
        seconds.setdefault("line", time.monotonic() - began)
        if line.startswith("training: step 1"):
            seconds["step"] = time.monotonic() - began
    if process.wait():
        sys.exit("".join(log))
    return seconds


BENCHMARK = Benchmark(
    title="Startup",
    about="A tiny model, with filled caches; medians of 3 rounds in turns.",
    columns={"case": ("command", ""), "seconds": ("seconds", "#.2g")},
    cases={
        "line": "`accelerate launch recipes/dpo_gpt2.py`, first line",
        "step": "`accelerate launch recipes/dpo_gpt2.py`, first step",
        "trl": "`from trl import DPOTrainer` alone",
        "help": "`dpokit --help`",
        "plan-help": "`dpokit plan --help`",
    },
    measure=measure,
    prepare=prepare,
    options={"model": "tiny"},
    quick={"cases": ["step", "trl", "help"]},
    rounds=3,
)
