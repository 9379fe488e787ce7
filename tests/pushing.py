"""Shared by the tests of `dpokit push`: run folders, and the real client connected to the local Hub."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import ROOT
from local_hub import WRITE, LocalHub

from dpokit.push.retry import RetryPolicy
from dpokit.rundir import RunDir

REPO = "tester/tiny"
BASE = "org/base"
CARD = "---\nlicense: mit\n---\n\n# Tiny\n\n![loss](figures/loss.png)\n"
# huggingface_hub waits a second between tries; hf_xet reads shorter waits from these variables when it is loaded.
QUICK_XET = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
QUICK = RetryPolicy(tries=3, first_wait_seconds=0.01, most_wait_seconds=0.05, silence_seconds=20.0)


def make_run(folder: Path, model: Path, *, adapter: bool = False, merged: bool = False) -> RunDir:
    """A finished run made from a model's folder: with a whole model, an adapter, or an adapter and a merged model."""
    run = RunDir(folder)
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (folder / "README.md").write_text(CARD)
    (folder / "run.json").write_text('{"state": "finished", "generations": [{"token": "t0"}]}')
    if adapter:
        write_adapter(run.adapter, model)
    if merged or not adapter:
        shutil.copytree(model, run.merged if merged else run.model, copy_function=shutil.copy)
    if merged:
        run.merge_json.write_text('{"end": "t0", "mean_drift": 1e-06, "largest_drift": 1e-05}\n')
    return run


def write_adapter(folder: Path, model: Path) -> None:
    """Writes a LoRA adapter with nonzero weights, whose config names a base on the Hub."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
    tuned.peft_config["default"].base_model_name_or_path = BASE
    tuned.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)


def connect(monkeypatch: pytest.MonkeyPatch, hub: LocalHub, *, xet: bool = False, token: str | None = WRITE) -> None:
    """Connects the client of this process to the local Hub, as its environment variables would."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not xet)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(hub.root / "no_token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for name, value in QUICK_XET.items():
        monkeypatch.setenv(name, value)


def client_environment(hub: LocalHub, *, xet: bool) -> dict[str, str]:
    """The environment that connects another process to the local Hub."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"HF_HOME": str(hub.root / "home"), "HF_HUB_DISABLE_XET": "0" if xet else "1", "NO_PROXY": "127.0.0.1"}
    return os.environ | settings | QUICK_XET | {"PYTHONPATH": str(ROOT / "src")}


def start_push(run: RunDir, hub: LocalHub, *flags: str, xet: bool = False) -> subprocess.Popen[str]:
    """Starts `dpokit push RUN --repo-id tester/tiny` with these flags as another process."""
    command = [sys.executable, "-m", "dpokit.cli", "push", str(run.path), "--repo-id", REPO, *flags]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=client_environment(hub, xet=xet), cwd=ROOT, **pipes)


def hash_tree(folder: Path) -> dict[str, str]:
    """{path: sha256} of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
