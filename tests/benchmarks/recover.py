"""GPT-2 124M: from a signal to a whole checkpoint, and how long a damaged one holds up a start.

    python tests/benchmarks/recover.py

A real process is signalled in the middle of a step; then one bit of the newest checkpoint's largest file is flipped.
"""

import hashlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from datetime import date
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hh import read_pairs
from soak.lives import Lives
from steps import make_model

from dpokit.checkpoint.store import check_checkpoint
from dpokit.rundir import RunDir, read_metrics

SIGNALS = 3


def signal_once(lives: Lives, chance: random.Random) -> tuple[float, float, float]:
    """Seconds from a signal to the end of its step, from there to the checkpoint's rename, and of a step before."""
    before = lives.last_step()
    with lives.living() as process:
        while lives.last_step() < before + 4:
            assert process.poll() is None, lives.last_log()[-2000:]
            time.sleep(0.05)
        seconds = [record["seconds"] for record in read_metrics(lives.run.metrics_jsonl) if "loss" in record][-3:]
        step = statistics.median(after - one for one, after in pairwise(seconds))
        time.sleep(chance.random() * step)
        there, at = set(lives.run.checkpoints()), lives.last_step()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while lives.last_step() == at:
            time.sleep(0.005)
        stepped = time.monotonic()
        while set(lives.run.checkpoints()) <= there:
            time.sleep(0.005)
        saved = time.monotonic()
        assert process.wait(timeout=60) == 75
    assert check_checkpoint(lives.run.checkpoints()[-1], deep=True).resume_problem is None
    return stepped - began, saved - stepped, step


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, chance = Path(name), random.Random(0)
        make_model(folder / "model", "gpt2")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_pairs(64)))
        flags = [
            *("--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "pairs.jsonl")),
            *("--max_length", "256", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
            *("--max_steps", "1000", "--save_steps", "1000", "--logging_steps", "1", "--eval_strategy", "no"),
            *("--load_best_model_at_end", "false", "--report_to", "none", "--save_total_limit", "2"),
        ]
        lives = Lives(RunDir(folder / "run"), flags, None, folder / "cache")
        for _ in range(SIGNALS):
            rest, save, step = signal_once(lives, chance)
            told = f"{rest:.2f} s to the end of the step (a step: {step:.2f} s), {save:.2f} s to a whole checkpoint"
            print(f"from the signal: {told}", flush=True)
        before, newest = lives.run.checkpoints()[-2:]
        files = [path for path in newest.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        began = time.monotonic()
        for path in files:
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
        hashing = time.monotonic() - began
        largest = max(files, key=lambda path: path.stat().st_size)
        with largest.open("r+b") as file:
            last = file.seek(-1, os.SEEK_END)
            (byte,) = file.read(1)
            file.seek(last)
            file.write(bytes([byte ^ 1]))
        began = time.monotonic()
        assert check_checkpoint(newest, deep=True).resume_problem is not None
        passed = time.monotonic() - began
        assert check_checkpoint(before, deep=True).resume_problem is None
        print(f"passing over a damaged checkpoint: {passed:.2f} s")
        print(f"sha256 of one checkpoint of {size / 2**30:.2f} GiB, nothing else: {hashing:.2f} s")
    print(f"{date.today()}, {os.cpu_count()} CPU cores, 124M, fp32")


if __name__ == "__main__":
    main()
