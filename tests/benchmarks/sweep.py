"""What a search costs beyond its trials, how often these compute the reference, and what two side by side take.

    python tests/benchmarks/sweep.py [--trials 8] [--jobs 1 2]

A tiny GPT-2 on made-up pairs: its runs are short, so that the search's share is larger than it would be elsewhere.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import build_tokenizer, write_pairs  # noqa: E402  (a folder of its own)


def build(folder: Path, *, trials: int, epochs: int) -> Path:
    """Model, pairs and a space of learning rates and betas; returns the space."""
    end = "<|endoftext|>"
    tokenizer = build_tokenizer([end], bos_token=end, eos_token=end, pad_token=end)
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer)}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", 600)
    space = {
        "recipe": str(ROOT / "recipes" / "dpo_gpt2.py"),
        "settings": {
            "model_name_or_path": str(folder / "model"),
            "dataset_name": str(folder / "pairs.jsonl"),
            "max_length": 96,
            "eval_fraction": 0.1,
            "num_train_epochs": epochs,
            "report_to": "none",
        },
        "parameters": {"learning_rate": [1e-5 * 2**i for i in range(trials // 2)], "beta": [0.1, 0.5]},
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder / "space.yaml"


def search(*, trials: int, epochs: int, jobs: int) -> float:
    """Trains a whole search in a new folder, prints what it cost; seconds of all of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        space, output = build(folder, trials=trials, epochs=epochs), folder / "sweep"
        caches = {"DPOKIT_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
        words = [sys.executable, "-m", "dpokit.cli", "sweep", str(space), "--output-dir", str(output), "--json"]
        began = time.time()
        done = subprocess.run(
            [*words, "--jobs", str(jobs)], env=os.environ | caches, capture_output=True, text=True, check=False
        )
        wall = time.time() - began
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found = json.loads(done.stdout)["trials"]
        spans, computed = [], 0
        for trial in found:
            run = Path(trial["runs"][0])
            # From the writing of its settings, before its processes begin, to its own last word.
            spans.append((run.with_suffix(".yaml").stat().st_mtime, (run / "run.json").stat().st_mtime))
            computed += not re.search(r"of \d+ pairs were cached", run.with_suffix(".log").read_text())
    inside = sum(end - start for start, end in spans) / jobs
    print(f"{len(found)} trials, {jobs} at a time: {wall:.1f} s, of which {inside:.1f} s in trials")
    print(f"  beyond the trials themselves: {(wall - inside) / wall:.1%}")
    print(f"  reference log-probs computed by {computed} of {len(found)} trials", flush=True)
    return wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    walls = [search(trials=asked.trials, epochs=asked.epochs, jobs=jobs) for jobs in asked.jobs]
    for jobs, wall in zip(asked.jobs[1:], walls[1:], strict=True):
        print(f"{jobs} at a time take {wall / walls[0]:.2f} times as long as {asked.jobs[0]} at a time")


if __name__ == "__main__":
    main()
