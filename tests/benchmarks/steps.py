"""Pairs per second and memory of training steps: TRL's own DPOTrainer and ours, same rows, same seed, one run.

    python tests/benchmarks/steps.py                     # the table, real HH rows where ../shared has them
    python tests/benchmarks/steps.py --steps 5 --cases stock shared kept

Each case is a process of its own, so that its peak memory is its own; the median of the steps after the first counts.
"""

import argparse
import gzip
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

ROOT = Path(__file__).parents[2]
HH = Path(os.environ.get("DPOKIT_SHARED", ROOT.parent / "shared")) / "data"
PAIRS_A_STEP = 8
CASES = {
    "stock": "TRL, live reference",
    "stock-kept": "TRL, precomputed reference",
    "shared": "dpokit, live reference",
    "kept": "dpokit, kept reference",
    "shared-bf16": "dpokit, live reference, bf16",
    "kept-bf16": "dpokit, kept reference, bf16",
}
GPU_CASES = "one GPU: 124M and 0.5B, 64 pairs a step"


def make_model(folder: Path) -> int:
    """GPT-2 124M with random weights; returns its parameters."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(HH / "gpt2-tokenizer").save_pretrained(folder)
    return model.num_parameters()


def read_rows(number: int) -> list[dict[str, str]]:
    """HH rows as explicit pairs, split at the transcript's own last turn: both sides get the same."""
    mark, rows = "\n\nAssistant:", []
    with gzip.open(HH / "hh-rlhf" / "harmless-base" / "train.jsonl.gz", "rt") as lines:
        for row in map(json.loads, lines):
            cut = row["chosen"].rfind(mark) + len(mark)
            prompt, chosen, rejected = row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]
            if row["rejected"][:cut] == prompt and chosen.strip() and rejected.strip():
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            if len(rows) == number:
                return rows
    return rows


class Clock:
    """Times each optimizer step."""

    def __new__(cls):
        from transformers import TrainerCallback

        class _Clock(TrainerCallback):
            def __init__(self) -> None:
                self.seconds: list[float] = []

            def on_step_begin(self, *_, **__) -> None:
                self.began = time.perf_counter()

            def on_step_end(self, *_, **__) -> None:
                self.seconds.append(time.perf_counter() - self.began)

        return _Clock()


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
        "bf16": case.endswith("bf16"),
        "precompute_ref_log_probs": "kept" in case,
        "precompute_ref_batch_size": PAIRS_A_STEP,
    }
    # What both sides import is not counted; TRL's own side must not meet dpokit, which changes TRL's head on CPUs.
    importlib.import_module("trl.trainer.dpo_trainer" if case.startswith("stock") else "dpokit.story")
    clock, began = Clock(), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if case.startswith("stock"):
        from datasets import load_dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model"),
            args=DPOConfig(use_cpu=not torch.cuda.is_available(), **common),
            train_dataset=load_dataset("json", data_files=str(folder / "data" / "train.jsonl"), split="train"),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
    else:
        from dpokit.rundir import RunDir
        from dpokit.settings import load_settings
        from dpokit.story import build_trainer
        from dpokit.train.gates import Gates

        places = {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "data")}
        settings = load_settings("benchmark", {**common, **places}, [])
        run = RunDir(common["output_dir"])
        run.path.mkdir(exist_ok=True)
        trainer, _ = build_trainer(run, settings, Gates("stop"))
    trainer.add_callback(clock)
    ready = time.perf_counter() - began
    trainer.train()
    history = [record for record in trainer.state.log_history if "rewards/chosen" in record]
    return {
        "seconds": clock.seconds[1:],
        "ready_seconds": ready,
        "peak_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        "losses": [record["loss"] for record in history],
        "tokens": [record["num_tokens"] for record in history],
        "versions": {"torch": torch.__version__},
    }


def measure_peak() -> float:
    """fp32 matrix products of this machine, FLOP a second: the best of a few."""
    a = torch.randn(3072, 3072)
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        _ = a @ a
        best = max(best, 2 * 3072**3 / (time.perf_counter() - began))
    return best


def count_flops(rows: list[dict[str, str]], folder: Path) -> float:
    """Useful FLOPs of a mean step with a live reference: 6 and 2 a weight and token, the head at answers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lengths = [[len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected")] for row in rows]
    tokens = sum(min(p, 512 - max(c, r) - 1) + c + r + 2 for p, c, r in lengths) / len(rows)
    answers = sum(c + r + 2 for _, c, r in lengths) / len(rows)
    layers, head = 12 * 12 * 768**2, 50257 * 768
    return PAIRS_A_STEP * 8 * (layers * tokens + head * answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print("RESULT " + json.dumps(run_case(asked.case, asked.folder, asked.steps)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = read_rows(PAIRS_A_STEP * (asked.steps + 1))
        (folder / "data").mkdir()
        (folder / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        weights = make_model(folder / "model")
        results = {}
        for case in asked.cases:
            print(f"{CASES[case]} ...", file=sys.stderr, flush=True)
            words = [sys.executable, __file__, "--case", case, "--folder", name, "--steps", str(asked.steps)]
            environment = os.environ | {"DPOKIT_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "hf")}
            done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                print(done.stderr[-2000:], file=sys.stderr)
                continue
            results[case] = json.loads(found[0].removeprefix("RESULT "))
        print_table(results, weights, count_flops(rows, folder))


def print_table(results: dict[str, dict], weights: int, flops: float) -> None:
    """Markdown: seconds a step, ratio to TRL's live reference, memory above weights, gradients and optimizer states."""
    peak = measure_peak()
    base = statistics.median(results["stock"]["seconds"]) if "stock" in results else None
    print("| case | s a step | pairs/s | against TRL | GiB above the model's | start, s |\n|---|---|---|---|---|---|")
    for case, result in results.items():
        seconds = statistics.median(result["seconds"])
        copies = 16 + (0 if "kept" in case else 4)
        above = (result["peak_bytes"] - copies * weights) / 2**30
        ratio = f"{base / seconds:.1f}" if base else "-"
        cells = [
            f"{seconds:.2f}",
            f"{PAIRS_A_STEP / seconds:.2f}",
            ratio,
            f"{above:.2f}",
            f"{result['ready_seconds']:.0f}",
        ]
        print(f"| {CASES[case]} | " + " | ".join(cells) + " |")
    if "shared" in results:
        share = flops / statistics.median(results["shared"]["seconds"]) / peak
        print(
            f"\nuseful FLOPs with a live reference: {share:.0%} of {peak / 1e9:.0f} GFLOP/s (fp32 products, measured)"
        )
    if not torch.cuda.is_available():
        print(f"not run, as there is no GPU: {GPU_CASES}")
    print(f"{date.today()}, {os.cpu_count()} CPU cores, GPT-2 {weights / 1e6:.0f}M, {PAIRS_A_STEP} pairs a step")
    for case, result in results.items():
        print(f"  losses, {CASES[case]}: {[round(loss, 5) for loss in result['losses']]}", file=sys.stderr)


if __name__ == "__main__":
    main()
