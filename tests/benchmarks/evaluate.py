"""The held-out HH pairs evaluated with GPT-2 124M: TRL's own DPOTrainer.evaluate and `dpokit evaluate`, in one run.

    python tests/benchmarks/evaluate.py
    python tests/benchmarks/evaluate.py --pairs 40

Each side is a process of its own; loading and tokenising are not counted. Ours also has ranking accuracies, drift,
groups and intervals in its time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from itertools import islice
from pathlib import Path

import torch
from hh import TOKENIZER, read_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_LENGTH = 512
TOKENS = AutoTokenizer.from_pretrained(TOKENIZER)
# On CPU much of a step is memory given back to the system and taken again: glibc is told to keep it, on both sides.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"}
SAME = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "logps/chosen": "eval_logps/chosen",
    "logps/rejected": "eval_logps/rejected",
}


def run_stock(folder: Path) -> dict[str, float]:
    """TRL as it comes."""
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    pairs = load_dataset("json", data_files=str(folder / "data" / "test.jsonl"), split="train")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "tuned"),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "base"),
        args=DPOConfig(
            output_dir=str(folder / "stock"),
            max_length=MAX_LENGTH,
            per_device_eval_batch_size=10,  # divides the pairs: TRL averages the averages of batches
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        ),
        train_dataset=pairs.select(range(8)),
        eval_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(folder / "tuned"),
    )
    began = time.perf_counter()
    found = trainer.evaluate()
    return {"seconds": time.perf_counter() - began} | {ours: found[theirs] for ours, theirs in SAME.items()}


def run_ours(folder: Path) -> dict[str, float]:
    """`dpokit evaluate`, from loaded models on."""
    from dpokit.evaluate.inputs import load_subject
    from dpokit.evaluate.pairs import evaluate_pairs

    argv = ["--max_length", str(MAX_LENGTH)]
    subject = load_subject(
        str(folder / "tuned"), base=str(folder / "base"), data=str(folder / "data"), split="test", argv=argv
    )
    began = time.perf_counter()
    found = evaluate_pairs(subject)
    return {"seconds": time.perf_counter() - began} | {name: found["tuned"][name]["value"] for name in SAME}


def fits(pair: dict[str, str]) -> bool:
    """Whether neither side cuts it: TRL and we cut other ends."""
    return max(len(TOKENS(pair["prompt"] + pair[side])["input_ids"]) for side in ("chosen", "rejected")) < MAX_LENGTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--side", choices=["stock", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        side = run_stock if asked.side == "stock" else run_ours
        print(json.dumps(side(asked.folder)))
        return
    from steps import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "base", "gpt2")
        make_model(folder / "tuned", "gpt2")
        tuned = AutoModelForCausalLM.from_pretrained(folder / "tuned")
        torch.manual_seed(1)
        with torch.no_grad():  # another model, so that no number is trivially alike
            for weight in tuned.parameters():
                weight += 0.002 * torch.randn_like(weight)
        tuned.save_pretrained(folder / "tuned")
        (folder / "data").mkdir()
        pairs = list(islice(filter(fits, read_pairs(10_000, "test")), asked.pairs))
        (folder / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        found = {}
        for side in ("stock", "ours"):
            words = [sys.executable, __file__, "--side", side, "--folder", name]
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ | MALLOC)
            found[side] = json.loads(done.stdout.splitlines()[-1])
    print(f"{len(pairs)} pairs: TRL {found['stock']['seconds']:.1f} s, dpokit {found['ours']['seconds']:.1f} s")
    print(f"ratio: {found['stock']['seconds'] / found['ours']['seconds']:.1f}")
    for metric in SAME:
        print(f"{metric:<16}{found['stock'][metric]:>12.6f}{found['ours'][metric]:>12.6f}")
    print(f"{date.today()}, {os.cpu_count()} CPU cores")


if __name__ == "__main__":
    main()
