"""What the benchmarks measure on: HH rows, models, training runs, and meters of time and memory."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    TrainerCallback,
)

ROOT = Path(__file__).parents[2]
HH = Path(os.environ.get("DPOKIT_SHARED", ROOT.parent / "shared")) / "data"
TOKENIZER = HH / "gpt2-tokenizer"
RECIPE = str(ROOT / "recipes" / "dpo_gpt2.py")
ON_GPU = torch.cuda.is_available()


def build_llama(*, width: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    """A Llama for GPT-2's tokenizer."""
    size = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    end = GPT2Config().eos_token_id
    return LlamaConfig(**size, vocab_size=end + 1, max_position_embeddings=1024, bos_token_id=end, eos_token_id=end)


CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(),  # 124M
    "qwen2": Qwen2Config(  # Qwen/Qwen2-0.5B
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "llama": build_llama(width=1024, inner=2816, layers=13, heads=16),  # 1.08 GB in fp32
    "tiny": build_llama(width=64, inner=128, layers=2, heads=2),
}
# What the training runs of benchmarks have in common.
TRAINING = {
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
}


def read_transcripts(split: str = "train") -> Iterator[dict[str, str]]:
    """Rows as published: `chosen` and `rejected`, whole conversations."""
    with gzip.open(HH / "hh-rlhf" / "harmless-base" / f"{split}.jsonl.gz", "rt") as lines:
        yield from map(json.loads, lines)


def read_pairs(number: int, split: str = "train") -> list[dict[str, str]]:
    """Rows as explicit pairs, split at the transcript's own last turn, so that both sides of a case get the same."""
    mark = "\n\nAssistant:"

    def usable() -> Iterator[dict[str, str]]:
        for row in read_transcripts(split):
            cut = row["chosen"].rfind(mark) + len(mark)
            prompt, chosen, rejected = row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]
            if row["rejected"][:cut] == prompt and chosen.strip() and rejected.strip():
                yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    return list(islice(usable(), number))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def make_model(folder: Path, name: str, *, chat: bool = False) -> Path:
    """Saves a model with its tokenizer below `folder`: the pretrained `smollm2`, or random weights of a CONFIG.

    Without `chat` the tokenizer has no chat template: with one dpokit writes HH rows in it, and TRL does not.
    """
    path = folder / name
    if name == "smollm2":
        from smollm2 import fetch_smollm2

        from dpokit.model.gguf import find_model_folder

        source = find_model_folder(str(fetch_smollm2()))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        torch.manual_seed(0)
        model, tokenizer = AutoModelForCausalLM.from_config(CONFIGS[name]), AutoTokenizer.from_pretrained(TOKENIZER)
    if not chat:
        tokenizer.chat_template = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def prepare_training(options: SimpleNamespace) -> None:
    """Models of the axis or option `model`, and the pairs of all steps."""
    for name in [options.model] if isinstance(options.model, str) else options.model:
        make_model(options.folder, name)
    write_rows(options.folder / "data" / "train.jsonl", read_pairs(options.pairs * (options.steps + 1)))


def build_trainer(options: SimpleNamespace, **settings: Any) -> Any:
    """dpokit's trainer for `options.model` and the pairs of `prepare_training`."""
    from dpokit.checkpoint.resume import claim_folder
    from dpokit.run import build_trainer
    from dpokit.rundir import RunDir
    from dpokit.settings.load import load_settings
    from dpokit.train.gates import Gates

    run = RunDir(options.output / "run")
    places = {"model_name_or_path": str(options.folder / options.model), "dataset_name": str(options.folder / "data")}
    settings = load_settings("benchmark", TRAINING | places | {"output_dir": str(run.path)} | settings, [])
    claim_folder(run, settings, world_size=1, placement="one device")
    return build_trainer(run, settings, Gates("stop"))[0]


def load_rows(path: Path) -> Any:
    """A file of JSON lines, by the library `datasets`."""
    from datasets import load_dataset

    return load_dataset("json", data_files=str(path), split="train")


def build_stock(model: Path, rows: Any, *, reference: Path | None = None, **settings: Any) -> Any:
    """TRL's own DPOTrainer, with rows to train and to evaluate on."""
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        ref_model=None if reference is None else AutoModelForCausalLM.from_pretrained(reference),
        args=DPOConfig(**{"use_cpu": not ON_GPU, "bf16": False, "report_to": "none"} | settings),
        train_dataset=rows,
        eval_dataset=None if reference is None else rows,
        processing_class=tokenizer,
    )


def build_flags(**settings: Any) -> list[str]:
    """Settings as arguments of a recipe."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def launch_recipe(
    options: SimpleNamespace, *, processes: int = 1, environment: dict[str, str] | None = None, **settings: Any
) -> subprocess.Popen[str]:
    """Starts the recipe with `accelerate launch` on CPU; its log is the process's stderr."""
    config = ROOT / "accelerate_configs" / ("single_gpu.yaml" if processes == 1 else "ddp_cpu.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), RECIPE, "--use_cpu"]
    places = {"model_name_or_path": options.folder / options.model, "output_dir": options.output / "run"}
    command += build_flags(**TRAINING | {"load_best_model_at_end": False} | places | settings)
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | (environment or {})
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=variables)


def read_steps(options: SimpleNamespace, process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Waits for the recipe; returns the records of its steps."""
    _, log = process.communicate()
    if process.returncode:
        sys.exit(log.rpartition("Traceback (most recent call last)")[0] or log)  # without the launcher's traceback
    lines = (options.output / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


class Clock(TrainerCallback):
    """`seconds` of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def read_status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert match is not None
    return int(match[1]) * 1024


def count_memory(processes: Sequence[psutil.Process]) -> int:
    """Bytes of the written pages of processes, shared pages counted once."""
    total = 0
    for process in processes:
        file, line = ("status", "RssAnon") if len(processes) == 1 else ("smaps_rollup", "Pss_Anon")
        try:
            match = re.search(rf"^{line}:\s+(\d+) kB", Path(f"/proc/{process.pid}/{file}").read_text(), re.M)
        except OSError:  # it has ended
            continue
        total += int(match[1]) * 1024 if match else 0
    return total


@contextmanager
def measure_memory() -> Iterator[SimpleNamespace]:
    """Measures the block's peak of written pages, of this process and its children; `at_start` and `peak`, in bytes."""
    process = psutil.Process()
    memory = SimpleNamespace(at_start=count_memory([process]), peak=0)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5 if len(processes := [process, *process.children(recursive=True)]) > 1 else 0.005):
            memory.peak = max(memory.peak, count_memory(processes))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()
        memory.peak = max(memory.peak, memory.at_start)
