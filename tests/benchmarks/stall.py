"""How long a checkpoint of GPT-2 124M holds up training: written in the background, and at once, in one run.

    python tests/benchmarks/stall.py

Every step saves; background and immediate saves take turns. Both end with a checkpoint that verifies.
"""

import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

from hh import read_pairs
from steps import make_model
from transformers import TrainerCallback

from dpokit.checkpoint.resume import claim_folder
from dpokit.checkpoint.store import find_checkpoints
from dpokit.run import build_trainer
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings
from dpokit.train.gates import Gates

SAVES = 5  # of each kind


class Alternate(TrainerCallback):
    """Notes each save's stall, and how long it took until the checkpoint was whole; then changes the kind."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.stalls = {"in the background": [], "at once": []}
        self.whole = {"in the background": [], "at once": []}
        self.kind = "in the background"
        self._copy = trainer._copy_state
        trainer._copy_state = self.copy_state

    def copy_state(self, part):
        write = self._copy(part)
        self.trainer._in_background = self.kind == "in the background"
        return write

    def on_save(self, *_, **__) -> None:
        began = time.monotonic()
        self.trainer.wait_for_checkpoint()
        self.stalls[self.kind].append(self.trainer.stall_seconds)
        self.whole[self.kind].append(self.trainer.stall_seconds + time.monotonic() - began)
        self.kind = next(kind for kind in self.stalls if kind != self.kind)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make_model(folder / "model", "gpt2")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_pairs(8)))
        defaults = {
            "model_name_or_path": str(folder / "model"),
            "dataset_name": str(folder / "pairs.jsonl"),
            "output_dir": str(folder / "run"),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "max_steps": 2 * SAVES,
            "max_length": 128,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "eval_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
        }
        settings, run = load_settings("benchmark", defaults, []), RunDir(folder / "run")
        claim_folder(run, settings, world_size=1, placement="one device")
        trainer, _ = build_trainer(run, settings, Gates("stop"))
        alternate = Alternate(trainer)
        trainer.add_callback(alternate)
        trainer.train()
        assert all(checkpoint.resume_problem is None for checkpoint in find_checkpoints(run, deep=True))
        size = sum(path.stat().st_size for path in run.checkpoints()[-1].rglob("*") if path.is_file())
    for kind, seconds in alternate.stalls.items():
        whole = statistics.median(alternate.whole[kind])
        print(f"{kind}: training stands for {statistics.median(seconds):.2f} s, whole after {whole:.2f} s")
    background, at_once = (statistics.median(seconds) for seconds in alternate.stalls.values())
    print(f"stall in the background / at once: {background / at_once:.0%}")
    print(
        f"{date.today()}, {os.cpu_count()} CPU cores, {weights / 1e6:.0f}M, {size / 2**30:.2f} GiB, {SAVES} saves each"
    )


if __name__ == "__main__":
    main()
