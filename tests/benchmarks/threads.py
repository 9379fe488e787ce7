"""What threads are worth on a CPU: one process and two, with the threads that a run chooses and with other numbers.

    python tests/benchmarks/threads.py

GPT-2 124M with random weights, real HH rows, started by `accelerate launch`. Each round runs every case once; the
median of the steps after the first counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from itertools import pairwise
from pathlib import Path

from hh import ROOT, read_pairs
from steps import KEEP_MEMORY, make_model

from dpokit.distributed.cores import count_cores

CORES = str(count_cores())
# Processes and environment of each case.
CASES = {
    "1 process, chosen by the run": (1, {}),
    "1 process, 1 thread": (1, {"OMP_NUM_THREADS": "1"}),
    "2 processes, chosen by the run": (2, {}),
    f"2 processes, {CORES} threads each": (2, {"OMP_NUM_THREADS": CORES}),
    f"2 processes, {CORES} threads each, passive": (2, {"OMP_NUM_THREADS": CORES, "OMP_WAIT_POLICY": "PASSIVE"}),
    f"2 processes, {CORES} threads each, active": (2, {"OMP_NUM_THREADS": CORES, "OMP_WAIT_POLICY": "ACTIVE"}),
}


def measure_steps(
    folder: Path, name: str, steps: int, *, pairs: int, processes: int, environment: dict[str, str]
) -> list[float]:
    """Trains one run; returns the seconds of each step after the first."""
    config = ROOT / "accelerate_configs" / ("single_gpu.yaml" if processes == 1 else "ddp_cpu.yaml")
    flags = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / name,
        "per_device_train_batch_size": pairs // processes,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": False,
        "max_steps": steps + 1,
        "max_length": 512,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "use_cpu": True,
    }
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    words += [
        str(ROOT / "recipes" / "dpo_gpt2.py"),
        *(str(word) for name in flags for word in (f"--{name}", flags[name])),
    ]
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(words, capture_output=True, text=True, env=own | KEEP_MEMORY | environment, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    logged = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    ends = [record["seconds"] for record in logged if "loss" in record]
    return [end - begin for begin, end in pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="after the first")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", "gpt2")
        rows = read_pairs(arguments.pairs * (arguments.steps + 1))
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(arguments.rounds):
            for place, (case, (processes, environment)) in enumerate(CASES.items()):
                run = f"run-{number}-{place}"
                case_seconds = measure_steps(
                    folder, run, arguments.steps, pairs=arguments.pairs, processes=processes, environment=environment
                )
                print(f"{case}: {case_seconds}", file=sys.stderr, flush=True)
                seconds[case] += case_seconds
    for case, measured in seconds.items():
        print(f"{case}: {statistics.median(measured):.2f} s a step ({min(measured):.2f} to {max(measured):.2f})")
    size = f"{arguments.rounds} rounds of {arguments.steps} steps of {arguments.pairs} pairs"
    print(f"{date.today()}, {CORES} CPU cores, {size}")


if __name__ == "__main__":
    main()
