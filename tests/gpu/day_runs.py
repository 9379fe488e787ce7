"""The stages `run`, `memory` and `placements`: whole runs on one GPU."""

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from day_context import PYTHON, Cases, Context, Values, import_rows
from day_machine import ROOT, LackError
from day_steps import build_config

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

# -- a whole run ------------------------------------------------------------------------------------------------------


def run_whole(context: Context) -> Cases:
    """SmolLM2 on HH pairs if its file is there, else the quickstart; in a dry run a tiny model on HH pairs."""
    places = [os.environ.get("DPOKIT_SMOLLM2", ""), str(ROOT / ".gpu" / SMOLLM2)]
    file = next((Path(place) for place in places if place and Path(place).is_file()), None)
    if context.dry_run:
        return {"tiny model on HH": lambda: train_on_hh(context, make_tiny_model(context))}
    if file is not None:
        return {"SmolLM2-135M-Instruct on HH": lambda: train_on_hh(context, file)}
    return {"quickstart": lambda: run_quickstart(context)}


def make_tiny_model(context: Context) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = context.work / "tiny"
    if not folder.is_dir():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(build_config("tiny", 96)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(import_rows()[0]).save_pretrained(folder)
    return folder


def train_on_hh(context: Context, model: Path) -> Values:
    """Trains with the recipe `dpo_gpt2`; returns what its log says, and its evaluation beside the base."""
    pairs = 8 if context.dry_run else 1000
    rows = import_rows()[1](pairs)
    data = context.work / "data"
    data.mkdir()
    cut = pairs // 5
    for name, part in (("test", rows[:cut]), ("train", rows[cut:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    small = {"max_steps": 1, "max_length": 96, "per_device_train_batch_size": 2, "use_cpu": "true"}
    large = {"max_steps": 40, "max_length": 512, "per_device_train_batch_size": 16, "eval_steps": 20, "save_steps": 20}
    flags = {"model_name_or_path": model, "dataset_name": data, "output_dir": context.work / "run"}
    flags |= {"logging_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 2e-5, "loss_type": "sigmoid"}
    flags |= {"loss_weights": 1.0, "report_to": "none", **(small if context.dry_run else large)}
    done = start_recipe(context, "dpo_gpt2", flags)
    values = read_run(context.work / "run", done)
    if "error" in values:
        return values
    command = ["-m", "dpokit.cli", "evaluate", str(context.work / "run")]
    evaluated = subprocess.run([*PYTHON, *command], capture_output=True, text=True, check=False)
    print(evaluated.stderr[-2000:])
    files = sorted((context.work / "run" / "eval").glob("*/pairs.json"))
    if not files:
        return values | {
            "error": f"dpokit evaluate ended with {evaluated.returncode}: {find_message(evaluated.stderr)}"
        }
    return values | {"evaluation": json.loads(files[-1].read_text())}


def run_quickstart(context: Context) -> Values:
    done = start_recipe(context, "dpo_quickstart", {"output_dir": context.work / "run"})
    values = read_run(context.work / "run", done)
    judged = context.work / "run" / "quickstart.json"
    return values | ({"judged": json.loads(judged.read_text())} if judged.is_file() else {})


def start_recipe(context: Context, recipe: str, flags: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs/single_gpu.yaml")]
    command += [str(ROOT / "recipes" / f"{recipe}.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([*PYTHON, *command], capture_output=True, text=True, cwd=context.work, check=False)
    print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
    return done


def find_message(text: str) -> str:
    """The last line with an error of the program itself, not of its launcher; else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|NotFound)\b", line)]
    own = [line for line in errors if "CalledProcessError" not in line and "ChildFailedError" not in line]
    return (own or lines or ["no output"])[-1][:300]


def read_run(folder: Path, done: "subprocess.CompletedProcess[str]") -> Values:
    """What a run's log says: state, losses, whether prompts were shared, and dpokit's own numbers of the GPU."""
    if not (folder / "metrics.jsonl").is_file():
        return {"error": f"the recipe ended with {done.returncode}: {find_message(done.stderr)}"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    losses = [line["loss"] for line in lines if "loss" in line]
    values: Values = {"state": record["state"], "shared_prefix": record["shared_prefix"], "steps": lines[-1]["step"]}
    values |= {"first_loss": losses[0], "last_loss": losses[-1]}
    for name in ("gpu_power_watts", "gpu_memory_gib", "gpu_utilisation_percent"):
        numbers = [line[name] for line in lines if name in line]
        if numbers:
            values[name] = round(max(numbers), 1)
    is_whole = done.returncode == 0 and record["state"] == "finished" and record["shared_prefix"] == "on"
    return values if is_whole else values | {"error": f"{record['state']}: {record.get('reason')}"}


# -- memory ------------------------------------------------------------------------------------------------------------


def run_memory(context: Context) -> Cases:
    if context.dry_run:
        return {"tiny, full": partial(check_memory, context, "tiny", {"max_length": 64, "use_cpu": "true"})}
    full = {"max_length": 512, "per_device_train_batch_size": 8, "bf16": "true"}
    lora = {**full, "use_peft": "true", "lora_target_modules": "all-linear"}
    return {
        "GPT-2 124M, full": partial(check_memory, context, "gpt2", full),
        "Qwen2 0.5B, LoRA": partial(check_memory, context, "0.5b", {**lora, "max_length": 1024}),
        "Qwen2 0.5B, full": partial(check_memory, context, "0.5b", full),
    }


def check_memory(context: Context, model: str, flags: dict[str, Any]) -> Values:
    """`dpokit plan --check`: predicted and measured peak in GiB, of two steps of the longest rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, read_pairs = import_rows()
    folder, data = context.work / model, context.work / "plan.jsonl"
    if not folder.is_dir():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(build_config(model, flags["max_length"])).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    data.write_text("".join(json.dumps(row) + "\n" for row in read_pairs(20 if context.dry_run else 400)))
    flags = {**flags, "model_name_or_path": folder, "dataset_name": data, "eval_strategy": "no", "save_strategy": "no"}
    flags |= {"load_best_model_at_end": "false", "output_dir": context.work / "planned"}
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command = ["-m", "dpokit.cli", "plan", str(ROOT / "recipes" / "dpo_gpt2.py"), *parts, "--check", "--json"]
    done = subprocess.run([*PYTHON, *command], capture_output=True, text=True, check=False, cwd=context.work)
    if "out of memory" in done.stderr:
        raise LackError(f"memory: {' '.join(done.stderr.split())[-300:]}")
    if done.returncode != 0:
        return {"error": f"dpokit plan ended with {done.returncode}: {find_message(done.stderr)}"}
    return {name: value for name, value in json.loads(done.stdout)["check"].items() if name != "placement"}


# -- placements --------------------------------------------------------------------------------------------------------

# The most valuable first; each is compared with one device of its kind, which runs before it.
CONFIGS = ("zero2", "zero3", "fsdp2", "zero3_offload")


def run_placements(context: Context) -> Cases:
    """Trains under each placement on one GPU, some at a time, as tests/test_placements.py does on all."""
    import conftest
    import test_placements as placements

    folder = context.work
    end = "<|endoftext|>"
    tokenizer = conftest.build_tokenizer([end], bos_token=end, eos_token=end, pad_token=end)
    model = placements.build_tiny_llama(folder / "llama", tokenizer)
    data = placements.write_data(folder / "data")
    kinds = ("full",) if context.dry_run else tuple(placements.KINDS)
    configs = ("fsdp2_cpu",) if context.dry_run else CONFIGS

    def train(config: str, kind: str) -> Path:
        flags = [*placements.find_optimizer(config, kind), *(["--use_cpu"] if context.dry_run else [])]
        launcher = () if config == "single_gpu" else ("--main_process_port", "0", "--num_processes", "1")
        run = folder / f"{config}_{kind}"
        placements.train_placement(run, model, data, config, kind, 4, *flags, launcher=launcher)
        return run

    def compare(config: str, kind: str) -> Values:
        if "offload" in config and (shutil.which("c++") is None or shutil.which("nvcc") is None):
            raise LackError("c++ and nvcc: DeepSpeed compiles its Adam for the host")
        run = train(config, kind)
        placements.check_same_run(run, folder / f"single_gpu_{kind}", kind, placements.in_words(config))
        return {"placement": placements.in_words(config), "kind": kind, "outcome": "yes"}

    def attempt(config: str, kind: str) -> None:
        name = f"{placements.in_words(config)}, {kind}"
        if name not in context.done or config == "single_gpu":  # the others are compared with one device
            context.attempt(name, partial(compare, config, kind))

    jobs = max(1, min(4, len(os.sched_getaffinity(0)) // 4))
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(partial(attempt, "single_gpu"), kinds))
        list(pool.map(lambda case: attempt(*case), [(config, kind) for config in configs for kind in kinds]))
    return {}
