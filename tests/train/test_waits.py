"""How often a training step waits for the GPU: counted on a device that computes on the CPU (tests/waits.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, write_pairs
from waits import PLANTED

from dpokit import run

SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": False,
    "max_length": 96,
    "max_steps": 6,
    "logging_steps": 100,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "precompute_ref_log_probs": False,
}
CASES = {
    "live reference": {},
    "kept reference": {"precompute_ref_log_probs": True},
    "flash attention": {"dtype": "bfloat16"},
    "LoRA": {"use_peft": True},
}


def train(folder: Path, settings: dict[str, Any], *, on_device: bool = True, planted: tuple[str, ...] = ()) -> Any:
    """Runs tests/waits.py; returns the logs, and the waits and copies of each step."""
    folder.mkdir()
    settings = {**SETTINGS, "output_dir": str(folder / "run"), "use_cpu": not on_device, **settings}
    task = {"settings": settings, "on_device": on_device, "planted": planted}
    (folder / "task.json").write_text(json.dumps(task))
    words = [sys.executable, str(ROOT / "tests" / "waits.py"), str(folder / "task.json"), str(folder / "result.json")]
    environment = os.environ | ({"ACCELERATE_TORCH_DEVICE": "fake:0"} if on_device else {})
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "run" / "run.json").read_text())["shared_prefix"] == "on"
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_nothing_and_copies_each_batch_once(case, tiny_qwen2, pairs_file, tmp_path):
    settings = {**CASES[case], "model_name_or_path": str(tiny_qwen2), "dataset_name": str(pairs_file)}
    there, here = (train(tmp_path / name, settings, on_device=name == "there") for name in ("there", "here"))
    first, *steps, _ = there["steps"]
    assert len(steps) == 4
    assert first["waits"], "the first step proves the packed rows and logs"
    for step in steps:
        assert step == {"waits": [], "copies": 2}
    for name in ("loss", "grad_norm", "entropy", "rewards/margins", "logps/chosen", "logits/rejected", "num_tokens"):
        assert there["log"][0][name] == pytest.approx(here["log"][0][name], rel=1e-6), name
    assert there["log"][-1]["train_loss"] == pytest.approx(here["log"][-1]["train_loss"], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["live reference", "kept reference", "LoRA"])
def test_torch_reports_no_wait_for_a_real_gpu(case, tiny_qwen2, pairs_file, tmp_path, monkeypatch):
    class Marks(run.ScreenCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error" if 2 <= state.global_step < 5 else "default")

    monkeypatch.setattr(run, "ScreenCallback", Marks)
    settings = {**SETTINGS, **CASES[case], "bf16": True, "model_name_or_path": str(tiny_qwen2)}
    try:
        run.train("waits", {**settings, "dataset_name": str(pairs_file), "output_dir": str(tmp_path / "run")}, [])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["shared_prefix"] == "on"


def test_every_kind_of_planted_wait_is_counted(tiny_qwen2, tmp_path):
    planted = tuple(PLANTED)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 100)  # no epoch ends, as the end of an epoch waits
    settings = {"model_name_or_path": str(tiny_qwen2), "dataset_name": str(pairs), "max_steps": len(planted) + 3}
    _, clean, *steps, _ = train(tmp_path / "run", settings, planted=planted)["steps"]
    assert clean["waits"] == []
    for name, step in zip(planted, steps, strict=True):
        assert len(step["waits"]) == 2, name  # one in each micro-batch
        assert all(f"{os.sep}waits.py:" in wait for wait in step["waits"]), step["waits"]
