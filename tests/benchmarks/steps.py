"""Pairs per second and memory of training steps: TRL's own DPOTrainer and ours, same rows, same seed, one run.

    python tests/benchmarks/steps.py                     # every row that this machine can measure
    python tests/benchmarks/steps.py --steps 5 --cases stock shared kept

On a CPU: GPT-2 124M, 8 pairs a step, fp32 and bf16. On a GPU: GPT-2 124M and a Qwen2 of 0.5B, 64 pairs a step, bf16.
Each case is a process of its own, so that its peak memory is its own; the median of the steps after the first counts.
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from hh import TOKENIZER, Clock, read_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedConfig, Qwen2Config

ON_GPU = torch.cuda.is_available()
PAIRS_A_STEP = 64 if ON_GPU else 8
CASES = {
    "stock": "TRL, live reference",
    "stock-kept": "TRL, precomputed reference",
    "shared": "dpokit, live reference",
    "kept": "dpokit, kept reference",
    "shared-bf16": "dpokit, live reference, bf16",
    "kept-bf16": "dpokit, kept reference, bf16",
    "shared-compiled": "dpokit, live reference, torch.compile",
}
# glibc keeps freed memory, on both sides: else much of a CPU step is page faults.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
# On a GPU every case is in bf16.
CASES_THERE = [case for case in CASES if not (ON_GPU and case.endswith("bf16"))]


def build_config(shape: str) -> PreTrainedConfig:
    """GPT-2 124M, or Qwen2 0.5B (Qwen/Qwen2-0.5B's config.json)."""
    if shape == "gpt2":
        return GPT2Config()
    return Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )


def make_model(folder: Path, shape: str) -> int:
    """Random weights of a shape; returns its parameters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(build_config(shape))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return int(model.num_parameters())


def run_case(case: str, folder: Path, steps: int) -> dict[str, object]:
    """One side, in this process."""
    common = {
        "output_dir": str(folder / case),
        "per_device_train_batch_size": PAIRS_A_STEP,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": steps + 1,
        "max_length": 512,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "bf16": ON_GPU or case.endswith("bf16"),
        "precompute_ref_log_probs": "kept" in case,
        "precompute_ref_batch_size": PAIRS_A_STEP,
        "torch_compile": case.endswith("compiled"),
    }
    # What both sides import is not counted; TRL's own side must not meet dpokit, which changes TRL's head on CPUs.
    importlib.import_module("trl.trainer.dpo_trainer" if case.startswith("stock") else "dpokit.run")
    clock, began = Clock(), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if case.startswith("stock"):
        from datasets import load_dataset
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model"),
            args=DPOConfig(use_cpu=not ON_GPU, **common),
            train_dataset=load_dataset("json", data_files=str(folder / "data" / "train.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
    else:
        from dpokit.run import build_trainer
        from dpokit.rundir import RunDir
        from dpokit.settings.load import load_settings
        from dpokit.train.gates import Gates

        places = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data")}
        settings = load_settings("benchmark", {**common, **places}, [])
        run = RunDir(common["output_dir"])
        run.path.mkdir(exist_ok=True)
        trainer, _ = build_trainer(run, settings, Gates("stop"))
    trainer.add_callback(clock)
    ready = time.perf_counter() - began
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "seconds": clock.seconds[1:],
        "ready_seconds": ready,
        "peak_bytes": torch.cuda.max_memory_allocated() if ON_GPU else peak,
        "losses": [record["loss"] for record in trainer.state.log_history if "rewards/chosen" in record],
    }


def measure_peak() -> tuple[float, str]:
    """Matrix products of this machine, FLOP a second, the best of a few; and their precision."""
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    size = 8192 if ON_GPU else 3072
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        _ = a @ a
        if ON_GPU:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best, str(dtype).removeprefix("torch.")


def count_flops(rows: list[dict[str, str]], shape: str) -> float:
    """Useful FLOPs of a mean step with a live reference: 6 and 2 a weight and token, the head at answers alone."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = [[len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected")] for row in rows]
    tokens = sum(min(p, 512 - max(c, r) - 1) + c + r + 2 for p, c, r in lengths) / len(rows)
    answers = sum(c + r + 2 for _, c, r in lengths) / len(rows)
    config = build_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2 and ".weight" in name)
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    head = config.vocab_size * config.hidden_size
    return PAIRS_A_STEP * 8 * ((layers - embeddings) * tokens + head * answers)


def measure(shape: str, cases: list[str], steps: int) -> None:
    """One table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = read_pairs(PAIRS_A_STEP * (steps + 1))
        (folder / "data").mkdir()
        (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        weights = make_model(folder / "model", shape)
        results = {}
        for case in cases:
            print(f"{CASES[case]} ...", file=sys.stderr, flush=True)
            words = [sys.executable, __file__, "--case", case, "--folder", name, "--steps", str(steps)]
            environment = os.environ | KEEP_MEMORY
            environment |= {"DPOKIT_CACHE": str(folder / case), "HF_DATASETS_CACHE": str(folder / "hf")}
            done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                print(done.stderr[-2000:], file=sys.stderr)
                continue
            results[case] = json.loads(found[0].removeprefix("RESULT "))
        print_table(results, weights)
        if "shared" in results:
            peak, dtype = measure_peak()
            share = count_flops(rows, shape) / statistics.median(results["shared"]["seconds"]) / peak
            print(f"\nuseful FLOPs with a live reference: {share:.0%} of {peak / 1e9:,.0f} GFLOP/s ({dtype}, measured)")
        device = torch.cuda.get_device_name() if ON_GPU else f"{os.cpu_count()} CPU cores"
        print(f"{date.today()}, {device}, {shape} {weights / 1e6:.0f}M, {PAIRS_A_STEP} pairs a step\n", flush=True)


def print_table(results: dict[str, dict], weights: int) -> None:
    """Markdown: seconds a step, ratio to TRL's live reference, memory above weights, gradients and optimizer states."""
    base = statistics.median(results["stock"]["seconds"]) if "stock" in results else None
    print("| case | s a step | pairs/s | against TRL | GiB above the model's | start, s |\n|---|---|---|---|---|---|")
    for case, result in results.items():
        seconds = statistics.median(result["seconds"])
        copies = 16 + (0 if "kept" in case else 4)
        above = (result["peak_bytes"] - copies * weights) / 2**30
        ratio = f"{base / seconds:.1f}" if base else "-"
        numbers = [f"{seconds:.2f}", f"{PAIRS_A_STEP / seconds:.2f}", ratio, f"{above:.2f}"]
        print("| " + " | ".join([CASES[case], *numbers, f"{result['ready_seconds']:.0f}"]) + " |")
    for case, result in results.items():
        print(f"  losses, {CASES[case]}: {[round(loss, 5) for loss in result['losses']]}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES_THERE, default=CASES_THERE)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print("RESULT " + json.dumps(run_case(asked.case, asked.folder, asked.steps)))
        return
    for shape in ("gpt2", "qwen2") if ON_GPU else ("gpt2",):
        measure(shape, asked.cases, asked.steps)
    if not ON_GPU:
        print("not run, as there is no GPU: GPT-2 124M and Qwen2 0.5B in bf16, 64 pairs a step")


if __name__ == "__main__":
    main()
