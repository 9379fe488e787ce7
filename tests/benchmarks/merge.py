"""Memory, time and drift of merging a LoRA adapter on every linear layer, scored before and after or not."""

import json
import shutil
import time
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.benchmark import Benchmark
from benchmarks.workloads import make_model, measure_memory, read_pairs, read_status, write_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.merge.merge import MergeOptions, merge_run
from dpokit.rundir import RunDir
from dpokit.settings.load import load_settings

GB = 1e9
# Title, dtype, and options of the merge. Drift is measured, never refused.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp32-unscored": ("LoRA, fp32, not scored", "float32", {"proof": False}),
    "fp32": ("LoRA, fp32", "float32", {}),
    "bf16-unscored": ("LoRA, bf16, not scored", "bfloat16", {"proof": False}),
    "bf16": ("LoRA, bf16", "bfloat16", {}),
    "qlora": ("QLoRA into the dequantised base", "bfloat16", {"dequantized_base": True}),
    "qlora-16bit": ("QLoRA into the 16-bit base", "bfloat16", {}),
}


def prepare(options: SimpleNamespace) -> None:
    """Each model in both dtypes, with a random adapter."""
    write_rows(options.folder / "pairs.jsonl", read_pairs(100, "test"))
    for name in options.model:
        folder = make_model(options.folder, name)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for dtype in ("float32", "bfloat16"):
            base = options.folder / f"{name}-{dtype}"
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
            model.name_or_path = str(base)
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
            torch.manual_seed(0)
            for parameter, weight in adapted.named_parameters():
                if "lora_B" in parameter:
                    torch.nn.init.normal_(weight, std=0.02)
            adapted.save_pretrained(base / "adapter")


def measure(options: SimpleNamespace) -> dict[str, Any]:
    """Peaks above the idle process, in GB: of its own written pages, and of all pages."""
    _, dtype, merging = CASES[options.case]
    run, base = RunDir(options.output / "run"), options.folder / f"{options.model}-{dtype}"
    shutil.copytree(base / "adapter", run.path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(run.path / "adapter")
    settings = {
        "model_name_or_path": str(base),
        "dataset_name": str(options.folder / "pairs.jsonl"),
        "dataset_test_split": "train",
        "use_peft": True,
        "load_in_4bit": options.case.startswith("qlora"),
        "dtype": dtype,
        "max_length": 512,
        "output_dir": str(run.path),
        "use_cpu": True,
        "report_to": "none",
    }
    record = {"state": "finished", "settings": load_settings("benchmark", settings, []).record()}
    (run.path / "run.json").write_text(json.dumps(record))
    idle = read_status("VmRSS")
    with measure_memory() as memory:
        began = time.monotonic()
        made = merge_run(run, MergeOptions(limit=options.pairs, accept_drift=True, **merging))
        seconds = time.monotonic() - began
    row = {
        "size": sum(path.stat().st_size for path in base.glob("*.safetensors")) / GB,
        "memory": (memory.peak - memory.at_start) / GB,
        "resident": (read_status("VmHWM") - idle) / GB,
        "seconds": seconds,
    }
    if made["pairs"] is not None:
        bounds = ", ".join(f"{bound:.2g}".replace("e-0", "e-") for bound in made["bound"].values())
        row |= {"mean_drift": made["mean_drift"], "largest_drift": made["largest_drift"], "bounds": bounds}
    return row


BENCHMARK = Benchmark(
    title="Merge",
    about="""
A LoRA adapter on every linear layer; the pretrained SmolLM2-135M, or random weights. The pages of the files that a
merge maps come on top of its memory; the system takes them back when it needs them.
""",
    columns={
        "case": ("merge", ""),
        "model": ("model", ""),
        "size": ("GB of weights", ".2f"),
        "memory": ("GB beyond the idle process", ".1f"),
        "resident": ("with mapped pages", ".1f"),
        "seconds": ("seconds", ".0f"),
        "mean_drift": ("mean drift, nats per token", ".2g"),
        "largest_drift": ("largest", ".2g"),
        "bounds": ("bounds of mean and largest", ""),
    },
    cases={name: title for name, (title, *_) in CASES.items()},
    measure=measure,
    prepare=prepare,
    options={"pairs": 8},
    axes={"model": ["llama"]},
    quick={"model": ["tiny"], "pairs": 1, "cases": ["fp32", "bf16-unscored", "qlora"]},
)
