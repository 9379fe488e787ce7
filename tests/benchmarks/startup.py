"""How long a user waits: for help, for a recipe's first line, for its first step; beside the import of TRL alone.

python tests/benchmarks/startup.py --rounds 5
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ROOT
from soak.faults import make_flags

ONE = str(ROOT / "accelerate_configs" / "single_gpu.yaml")
RECIPE = str(ROOT / "recipes" / "dpo_gpt2.py")


def time_command(*words: str) -> float:
    """Seconds until it has ended."""
    begun = time.monotonic()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.monotonic() - begun


def time_launch(folder: Path) -> tuple[float, float]:
    """Seconds until `accelerate launch` of a tiny model shows its first line, and until it has made its first step."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", ONE, RECIPE]
    flags = [*make_flags(folder, []), "--max_steps", "1", "--use_cpu", "--eval_strategy", "no", "--overwrite_run"]
    environment = os.environ | {"DPOKIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    process = subprocess.Popen(
        [*launcher, *flags, "--output_dir", str(folder / "run")], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    lines: dict[str, float] = {}
    for line in process.stderr:
        lines.setdefault("first", time.monotonic() - begun)
        if line.startswith("training: step 1"):
            lines["step"] = time.monotonic() - begun
    assert process.wait() == 0
    return lines["first"], lines["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands: dict[str, Callable[[], float]] = {
            "from trl import DPOTrainer": lambda: time_command("-c", "from trl import DPOTrainer"),
            "dpokit --help": lambda: time_command("-m", "dpokit.cli", "--help"),
            "dpokit plan --help": lambda: time_command("-m", "dpokit.cli", "plan", "--help"),
        }
        time_launch(folder)  # fills the caches
        for _ in range(rounds):
            for command, measure in commands.items():
                seconds.setdefault(command, []).append(measure())
            first, step = time_launch(folder)
            seconds.setdefault("accelerate launch: first line", []).append(first)
            seconds.setdefault("accelerate launch: first step", []).append(step)
    alone = statistics.median(seconds["from trl import DPOTrainer"])
    print("| what | median s | of TRL's import |\n|---|---|---|")
    for what, values in seconds.items():
        print(f"| {what} | {statistics.median(values):.2f} | {statistics.median(values) / alone:.2f} |")
    print(f"\n{date.today()}, {os.cpu_count()} CPU cores, {rounds} rounds in turn")


if __name__ == "__main__":
    main()
