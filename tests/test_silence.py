"""No verb and no recipe opens a connection that the user did not ask for: counted in Python and in the kernel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import warm
from conftest import ROOT, write_pairs
from outside import LOG

from dpokit.quickstart.grammar import write_corpus
from dpokit.verbs.app import app

# Variables that forbid connections. Without them the programs are as free as those of a user.
FORBIDDING = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", LOG)
FORBIDDING += ("HF_UPDATE_DOWNLOAD_COUNTS", "USE_HUB_KERNELS", "DISABLE_SAFETENSORS_CONVERSION")
FORBIDDING += ("DISABLE_TELEMETRY", "DO_NOT_TRACK", "GRADIO_ANALYTICS_ENABLED", "CI", "WANDB_MODE")
FORBIDDING += ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
# Programs that do try, as Python and as C code: name or number, and which of the two counts must see it.
CONTROLS = {
    "name": ("import urllib.request as u; u.urlopen('http://example.com')", ("python", "kernel")),
    "number": ("import socket; socket.create_connection(('192.0.2.1', 80))", ("python", "kernel")),
    "C code": (
        "import ctypes as c; c.CDLL(None).getaddrinfo(b'example.com', None, None, c.byref(c.c_void_p()))",
        ("kernel",),
    ),
}
TRAINING = ["--max_steps", "2", "--max_length", "64", "--eval_fraction", "0.3", "--eval_strategy", "steps"]
TRAINING += ["--eval_steps", "1", "--save_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
TRAINING += ["--gradient_accumulation_steps", "1", "--per_device_eval_batch_size", "4", "--report_to", "none"]
BY_REQUEST = {"push"}  # the verb that sends something


def list_calls(folder: Path, gpt2: Path, qwen2: Path) -> dict[str, list[str]]:
    """The programs by name: recipes first, then the verbs on their runs."""
    pairs = str(write_pairs(folder / "pairs.jsonl", 20))
    settings = {"model_name_or_path": str(gpt2), "dataset_name": pairs, "eval_fraction": 0.3, "max_steps": 1}
    settings |= {"max_length": 64, "report_to": "none"}
    space = {"recipe": str(ROOT / "recipes" / "dpo_gpt2.py"), "parameters": {"beta": [0.1]}}
    (folder / "space.yaml").write_text(json.dumps(space | {"settings": settings}))
    # The quickstart builds its corpus and base only if they are missing, which takes minutes.
    write_corpus(folder / "runs" / "quickstart_corpus", train_pairs=12, eval_pairs=4, seed=0)
    shutil.copytree(gpt2, folder / "runs" / "quickstart_base")

    def recipe(name: str, *flags: str) -> list[str]:
        return [str(ROOT / "recipes" / f"{name}.py"), "--output_dir", str(folder / name), *TRAINING, *flags]

    def verb(name: str, *argv: str) -> list[str]:
        return [sys.executable, "-m", "dpokit.cli", name, *argv]

    data = ["--dataset_name", pairs]
    small, chat = (["--model_name_or_path", str(model), *data] for model in (gpt2, qwen2))
    run = str(folder / "dpo_gpt2")
    calls = {
        # -B: an ordinary process, which imports its libraries itself.
        "dpo_gpt2": [sys.executable, "-B", *recipe("dpo_gpt2", *small)],
        "sft_gpt2": [sys.executable, *recipe("sft_gpt2", *small)],
        "dpo_qwen2": [sys.executable, *recipe("dpo_qwen2", *chat, "--use_peft")],
        "dpo_8b": [sys.executable, *recipe("dpo_8b", *small)],
        "dpo_qlora": [sys.executable, *recipe("dpo_qlora", *chat)],
        "dpo_quickstart": [sys.executable, *recipe("dpo_quickstart", "--max_length", "256")],
    }
    return calls | {
        "train": verb("train", str(ROOT / "recipes" / "dpo_gpt2.py"), "--output_dir", str(folder / "again"), *TRAINING)
        + small,
        "env": verb("env"),
        "plan": verb("plan", *recipe("dpo_gpt2", *small), "--gpus", "1x80"),
        "prepare": verb("prepare", *recipe("dpo_gpt2", *small)),
        "submit": verb(
            *("submit", *recipe("dpo_gpt2", *small, "--output_dir", "new"), "--dry-run", "--config-file"),
            str(ROOT / "accelerate_configs" / "ddp_cpu.yaml"),
        ),
        "data": verb("data", "check", *data[1:], *small[:2]),
        "sweep": verb("sweep", str(folder / "space.yaml")),
        "status": verb("status", run),
        "verify": verb("verify", run),
        "evaluate": verb("evaluate", str(folder / "dpo_qwen2"), "--answers", "2", "--max-new-tokens", "4"),
        "merge": verb("merge", str(folder / "dpo_qwen2")),
        "report": verb("report", run),
        "card": verb("card", run, "--license", "mit"),
        "chat": verb("chat", run, "--prompt", "Why?", "--max-new-tokens", "4"),
        "serve": verb("serve", run, "--port", "0"),
        "init": verb("init", str(folder / "starter")),
    }


def count_attempts(calls: dict[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Runs the programs as tests/outside.py does; its counts and the exit code of each."""
    file = folder / "calls.json"
    file.write_text(json.dumps(calls))
    environment = {name: value for name, value in os.environ.items() if name not in FORBIDDING}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(folder / "home")}
    argv = [sys.executable, str(ROOT / "tests" / "outside.py"), str(file)]
    done = warm.COLD(argv, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert done.wait(timeout=600) == 0
    return json.loads(file.read_text())


@pytest.mark.long
def test_no_verb_and_no_recipe_leaves_this_machine(tmp_path, tiny_gpt2, tiny_qwen2):
    results = count_attempts(list_calls(tmp_path, tiny_gpt2, tiny_qwen2), tmp_path)
    verbs = set(typer.main.get_command(app).commands) - BY_REQUEST
    assert set(results) == verbs | {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert {name: result["output"] for name, result in results.items() if result["code"]} == {}
    assert {name: result["python"] for name, result in results.items() if result["python"]} == {}
    assert {name: result["kernel"] for name, result in results.items() if result["kernel"]} == {}


@pytest.mark.parametrize("name", CONTROLS)
def test_an_attempt_to_leave_this_machine_is_counted(name, tmp_path):
    code, counts = CONTROLS[name]
    result = count_attempts({name: [sys.executable, "-c", code]}, tmp_path)[name]
    for count in counts:
        if count == "kernel" and result["kernel"] is None:
            pytest.skip("this machine allows no network namespace")
        assert result[count], result


# What the libraries use: the Hub's reports off, datasets' counts on, transformers' downloads of programs on.
CONSTANTS = """
import os, huggingface_hub.constants as hub, datasets.config as data
print(hub.HF_HUB_DISABLE_TELEMETRY, data.HF_UPDATE_DOWNLOAD_COUNTS, os.environ.get("USE_HUB_KERNELS", "YES"))
"""
LOUD, SILENT = "False True YES\n", "True False NO\n"


@pytest.mark.cold
@pytest.mark.parametrize(
    ("code", "variables", "said"),
    [
        ("import dpokit" + CONSTANTS, {}, SILENT),
        (CONSTANTS + "import dpokit" + CONSTANTS, {}, LOUD + SILENT),  # as in a notebook
        (
            CONSTANTS + "import dpokit" + CONSTANTS,  # the user's own values stay
            {"HF_HUB_DISABLE_TELEMETRY": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "1", "USE_HUB_KERNELS": "YES"},
            LOUD * 2,
        ),
    ],
    ids=["dpokit first", "libraries first", "the user's values"],
)
def test_libraries_are_silent_unless_the_user_says_otherwise(code, variables, said):
    environment = {name: value for name, value in os.environ.items() if name not in FORBIDDING}
    environment |= {"PYTHONPATH": str(ROOT / "src"), **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == said
