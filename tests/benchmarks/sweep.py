"""The time of a search beyond its runs, how often these compute the reference, and two runs at a time."""

import json
import re
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from benchmarks.benchmark import Benchmark
from benchmarks.workloads import RECIPE, make_model, read_pairs, write_rows


def prepare(options: SimpleNamespace) -> None:
    """Model, pairs, and a space of learning rates and betas."""
    space = {
        "recipe": RECIPE,
        "settings": {
            "model_name_or_path": str(make_model(options.folder, options.model)),
            "dataset_name": str(write_rows(options.folder / "pairs.jsonl", read_pairs(options.pairs))),
            "max_length": 96,
            "eval_fraction": 0.1,
            "num_train_epochs": options.epochs,
            "report_to": "none",
        },
        "parameters": {"learning_rate": [1e-5 * 2**i for i in range(options.trials // 2)], "beta": [0.1, 0.5]},
    }
    (options.folder / "space.yaml").write_text(yaml.safe_dump(space))


def measure(options: SimpleNamespace) -> dict[str, Any]:
    """A whole search."""
    jobs = {"one": 1, "two": 2}[options.case]
    command = [sys.executable, "-m", "dpokit.cli", "sweep", str(options.folder / "space.yaml"), "--json"]
    command += ["--output-dir", str(options.output / "sweep"), "--jobs", str(jobs)]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    runs = [Path(trial["runs"][0]) for trial in json.loads(done.stdout)["trials"]]
    # From the writing of a run's settings, before its processes start, to its last record.
    spans = sorted((run.with_suffix(".yaml").stat().st_mtime, (run / "run.json").stat().st_mtime) for run in runs)
    row = {
        "seconds": ended - began,
        "runs": len(runs),
        "computed": sum(
            not re.search(r"of \d+ pairs were cached", run.with_suffix(".log").read_text()) for run in runs
        ),
        "run_seconds": statistics.median(end - start for start, end in spans),
        "ends_seconds": spans[0][0] - began + ended - max(end for _, end in spans),
    }
    if jobs == 1:
        row["between_seconds"] = statistics.median(later - end for (_, end), (later, _) in pairwise(spans))
    return row


BENCHMARK = Benchmark(
    title="Sweep",
    about="""
Runs of a tiny model: they are short, so that the search takes a larger share of the time than usual. The time between
two runs includes the end of their processes.
""",
    columns={
        "case": ("case", ""),
        "runs": ("runs", ".0f"),
        "computed": ("computed the reference", ".0f"),
        "seconds": ("seconds", ".0f"),
        "run_seconds": ("s of a run", ".0f"),
        "ends_seconds": ("s of start and end", ".0f"),
        "between_seconds": ("s between runs", ".1f"),
        "relative": ("relative time", ".2f"),
    },
    cases={"one": "one run at a time", "two": "two runs at a time"},
    measure=measure,
    prepare=prepare,
    options={"model": "tiny", "trials": 8, "epochs": 3, "pairs": 600},
    quick={"trials": 2, "epochs": 1, "pairs": 20, "cases": ["one"]},
    baseline="one",
    speed=False,
)
