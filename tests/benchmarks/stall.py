"""The time for which a checkpoint stops training: written in the background, and at once."""

import statistics
import time
from types import SimpleNamespace
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.workloads import build_trainer, prepare_training
from transformers import TrainerCallback


class SaveClock(TrainerCallback):
    """Seconds of each save: `stalls` of training, and `complete` when its checkpoint was."""

    def __init__(self, trainer: Any, *, in_background: bool) -> None:
        self.stalls: list[float] = []
        self.complete: list[float] = []
        self.trainer = trainer
        copy_state = trainer._copy_state

        def copy_in_this_way(part: Any) -> Any:
            write = copy_state(part)
            trainer._in_background = in_background
            return write

        trainer._copy_state = copy_in_this_way

    def on_save(self, *_: Any, **__: Any) -> None:
        began = time.monotonic()
        self.trainer.wait_for_checkpoint()
        self.stalls.append(self.trainer.stall_seconds)
        self.complete.append(self.trainer.stall_seconds + time.monotonic() - began)


def measure(options: SimpleNamespace) -> dict[str, Any]:
    """Every step saves; at the end all checkpoints verify."""
    from dpokit.checkpoint.store import find_checkpoints
    from dpokit.rundir import RunDir

    training = {"per_device_train_batch_size": options.pairs, "max_steps": options.steps, "max_length": 128}
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "use_cpu": True}
    trainer = build_trainer(options, **training, **saving)
    clock = SaveClock(trainer, in_background=options.case == "background")
    trainer.add_callback(clock)
    trainer.train()
    run = RunDir(options.output / "run")
    assert all(checkpoint.resume_problem is None for checkpoint in find_checkpoints(run, deep=True))
    size = sum(path.stat().st_size for path in run.checkpoints()[-1].rglob("*") if path.is_file())
    return {
        "seconds": statistics.median(clock.stalls),
        "complete_seconds": statistics.median(clock.complete),
        "gib": size / 2**30,
    }


BENCHMARK = Benchmark(
    title="Checkpoints",
    about="GPT-2 124M saves after every step.",
    columns={
        "case": ("a checkpoint is written", ""),
        "gib": ("GiB", ".1f"),
        "seconds": ("training stops for, s", ".2f"),
        "relative": ("relative", ".0%"),
        "complete_seconds": ("complete after, s", ".1f"),
    },
    cases={"direct": "at once", "background": "in the background"},
    measure=measure,
    prepare=prepare_training,
    options={"model": "gpt2", "steps": 5, "pairs": 1},
    quick={"model": "tiny", "steps": 2},
    baseline="direct",
    speed=False,
    rounds=2,
)
