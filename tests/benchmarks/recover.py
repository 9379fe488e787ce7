"""From a signal in the middle of a step to a complete checkpoint, and the time to skip a damaged checkpoint."""

import hashlib
import os
import random
import signal
import statistics
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.workloads import TRAINING, build_flags, prepare_training
from soak.lives import Lives

from dpokit.checkpoint.store import check_checkpoint
from dpokit.rundir import RunDir, read_metrics


def send_signal(lives: Lives, chance: random.Random) -> tuple[float, float]:
    """Seconds from a signal to the end of its step, and from there to the checkpoint's rename."""
    before = lives.last_step()
    with lives.living() as process:
        while lives.last_step() < before + 4:
            assert process.poll() is None, lives.last_log()[-2000:]
            time.sleep(0.05)
        seconds = [record["seconds"] for record in read_metrics(lives.run.metrics_jsonl) if "loss" in record][-3:]
        time.sleep(chance.random() * statistics.median(later - earlier for earlier, later in pairwise(seconds)))
        checkpoints, step = set(lives.run.checkpoints()), lives.last_step()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while lives.last_step() == step:
            time.sleep(0.005)
        ended = time.monotonic()
        while set(lives.run.checkpoints()) <= checkpoints:
            time.sleep(0.005)
        saved = time.monotonic()
        assert process.wait(timeout=60) == 75
    assert check_checkpoint(lives.run.checkpoints()[-1], deep=True).resume_problem is None
    return ended - began, saved - ended


def flip_last_bit(path: Path) -> None:
    with path.open("r+b") as file:
        last = file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(last)
        file.write(bytes([byte ^ 1]))


def measure(options: SimpleNamespace) -> dict[str, Any]:
    flags = build_flags(
        **TRAINING | {"save_strategy": "steps"},
        model_name_or_path=options.folder / options.model,
        dataset_name=options.folder / "data",
        max_length=options.max_length,
        per_device_train_batch_size=2,
        max_steps=1000,
        save_steps=1000,
        load_best_model_at_end=False,
        save_total_limit=2,
    )
    lives, chance = Lives(RunDir(options.output / "run"), flags, None, options.output / "cache"), random.Random(0)
    rests, saves = zip(*(send_signal(lives, chance) for _ in range(options.signals)), strict=True)
    newest = lives.run.checkpoints()[-1]
    files = [path for path in newest.rglob("*") if path.is_file()]
    began = time.monotonic()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")
    hashed = time.monotonic()
    flip_last_bit(max(files, key=lambda path: path.stat().st_size))
    damaged = time.monotonic()
    assert check_checkpoint(newest, deep=True).resume_problem is not None
    return {
        "step_rest": f"{min(rests):.2g} to {max(rests):.2g}",
        "save": f"{min(saves):.2g} to {max(saves):.2g}",
        "skip_seconds": time.monotonic() - damaged,
        "sha256_seconds": hashed - began,
    }


BENCHMARK = Benchmark(
    title="Signals and damaged checkpoints",
    about="""
GPT-2 124M on one core gets signals in the middle of steps. Then one bit of its newest checkpoint is changed, and a
start skips it.
""",
    columns={
        "step_rest": ("from the signal to the end of the step, s", ""),
        "save": ("from there to a complete checkpoint, s", ""),
        "skip_seconds": ("a damaged checkpoint is skipped, s", ".2f"),
        "sha256_seconds": ("its sha256 alone, s", ".2f"),
    },
    cases={"signals": "signals"},
    measure=measure,
    prepare=prepare_training,
    options={"model": "gpt2", "signals": 3, "max_length": 256, "pairs": 64, "steps": 0},
    quick={"model": "tiny", "signals": 1, "max_length": 64},
)
