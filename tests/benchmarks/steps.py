"""Seconds and memory of training steps: TRL's own DPOTrainer and dpokit's, with the same rows and seed."""

import importlib
import resource
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.benchmark import Benchmark
from benchmarks.workloads import (
    ON_GPU,
    TRAINING,
    Clock,
    build_stock,
    build_trainer,
    load_rows,
    prepare_training,
    read_pairs,
)
from transformers import AutoTokenizer

CASES = {
    "stock": "TRL, live reference",
    "stock-cached": "TRL, precomputed reference",
    "live": "dpokit, live reference",
    "cached": "dpokit, cached reference",
    "live-bf16": "dpokit, live reference, bf16",
    "cached-bf16": "dpokit, cached reference, bf16",
    "live-compiled": "dpokit, live reference, torch.compile",
}


def measure(options: SimpleNamespace) -> dict[str, Any]:
    """Trains in this process; the median of the steps after the first counts."""
    stock = options.case.startswith("stock")
    settings = {
        "per_device_train_batch_size": options.pairs,
        "max_steps": options.steps + 1,
        "max_length": options.max_length,
        "learning_rate": 1e-6,
        "seed": 0,
        "bf16": ON_GPU or options.case.endswith("bf16"),
        "precompute_ref_log_probs": "cached" in options.case,
        "precompute_ref_batch_size": options.pairs,
        "torch_compile": options.case.endswith("compiled"),
    }
    # What both sides import is not counted; TRL's own side must not meet dpokit, which changes TRL's head on CPUs.
    importlib.import_module("trl.trainer.dpo_trainer" if stock else "dpokit.run")
    before, began = read_peak(), time.perf_counter()
    if stock:
        rows = load_rows(options.folder / "data" / "train.jsonl")
        settings |= TRAINING | {"output_dir": str(options.output / "run")}
        trainer = build_stock(options.folder / options.model, rows, **settings)
    else:
        trainer = build_trainer(options, **settings)
    clock = Clock()
    trainer.add_callback(clock)
    start = time.perf_counter() - began
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if ON_GPU else read_peak() - before
    seconds, copies = statistics.median(clock.seconds[1:]), 16 if "cached" in options.case else 20
    row = {
        "seconds": seconds,
        "pairs_per_second": options.pairs / seconds,
        "gib": (peak - copies * trainer.model.num_parameters()) / 2**30,
        "start_seconds": start,
        "numbers": [record["loss"] for record in trainer.state.log_history if "rewards/chosen" in record],
    }
    if options.case == "live":
        row["peak_share"] = count_flops(options, trainer.model) / seconds / measure_matrix_flops(options.matrix)
    return row


def read_peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_matrix_flops(size: int) -> float:
    """FLOP a second of matrix products on this machine, the best of a few: fp32 on a CPU, bf16 on a GPU."""
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        _ = matrix @ matrix
        if ON_GPU:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def count_flops(options: SimpleNamespace, model: Any) -> float:
    """Useful FLOPs of a mean step with a live reference: 6 and 2 a weight and token, the head at answers alone."""
    tokenizer = AutoTokenizer.from_pretrained(Path(options.folder, options.model))
    rows = read_pairs(options.pairs * (options.steps + 1))
    lengths = [[len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected")] for row in rows]
    most = options.max_length
    tokens = sum(min(p, most - max(c, r) - 1) + c + r + 2 for p, c, r in lengths) / len(rows)
    answers = sum(c + r + 2 for _, c, r in lengths) / len(rows)
    layers = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2 and ".weight" in name)
    embeddings = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    untied = 0 if model.config.tie_word_embeddings else model.get_output_embeddings().weight.numel()
    head = model.config.vocab_size * model.config.hidden_size
    return options.pairs * 8 * ((layers - embeddings - untied) * tokens + head * answers)


BENCHMARK = Benchmark(
    title="Steps",
    about="""
Real HH rows; GPT-2 and Qwen2 have random weights, SmolLM2 is pretrained. The median of 5 steps after the first
counts. On a CPU a step has 8 pairs, and glibc is set to keep freed memory on both sides. On a GPU it has
64 pairs in bf16, and Qwen2 0.5B is measured, too.

- "GiB beyond the model" is peak memory less weights, gradients, optimizer states and a live reference.
- "Start" includes the time to compute the reference without a cache.
- "Difference" is the largest relative difference of a logged loss from that of TRL with a live reference.
- "Useful work" is the useful FLOPs, as a share of what the machine reaches in matrix products (fp32 on a CPU).
""",
    columns={
        "case": ("case", ""),
        "model": ("model", ""),
        "max_length": ("max_length", ""),
        "seconds": ("s per step", ".2f"),
        "pairs_per_second": ("pairs/s", ".2f"),
        "relative": ("relative to TRL", ".1f"),
        "gib": ("GiB beyond the model", ".2f"),
        "start_seconds": ("start, s", ".0f"),
        "difference": ("difference", ".0e"),
        "peak_share": ("useful work", ".0%"),
    },
    cases=CASES,
    measure=measure,
    prepare=prepare_training,
    options={"steps": 5, "pairs": 64 if ON_GPU else 8, "matrix": 8192 if ON_GPU else 3072},
    axes={"model": ["gpt2", "qwen2"] if ON_GPU else ["gpt2"], "max_length": [512]},
    quick={
        "steps": 1,
        "pairs": 2,
        "matrix": 256,
        "model": ["tiny"],
        "cases": ["stock", "live", "cached", "live-bf16"],
    },
    baseline="stock",
)
