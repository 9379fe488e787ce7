"""Every fault: runs killed at random and in the middle of each file, compared with whole ones; then the suite's.

    python tests/soak/faults.py                      # some two hours on two cores; prints a table
    python tests/soak/faults.py --kills 3 --cases ddp

The suite's are damaged files, full disks, signals, lost processes, other numbers of processes, and a real Slurm whose
nodes lose power or network.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from compare_runs import check_same
from soak.lives import Lives

from dpokit.checkpoint.store import find_checkpoints
from dpokit.rundir import RunDir

STEPS, SAVE_STEPS = 60, 4
SUITE = ("test_faults.py", "test_lost_processes.py", "distributed/test_coordination.py", "checkpoint", "cluster")
# (placement's config, flags): each placement with two or three options. All pairs: tests/checkpoint/test_resume.py.
CASES = {
    "one": (None, ["--gradient_accumulation_steps", "2", "--precompute_ref_log_probs"]),
    "one, dropout": (None, ["--disable_dropout", "false", "--max_train_samples", "30"]),
    "ddp": ("ddp_cpu", ["--gradient_accumulation_steps", "2", "--max_train_samples", "30"]),
    "ddp, dropout": ("ddp_cpu", ["--disable_dropout", "false", "--precompute_ref_log_probs"]),
    "zero2": ("zero2_cpu", ["--disable_dropout", "false", "--gradient_accumulation_steps", "2"]),
    "zero3": ("zero3_cpu", ["--precompute_ref_log_probs", "--max_train_samples", "30"]),
    "qlora": ("ddp_cpu", ["--use_peft", "--load_in_4bit", "--max_train_samples", "30"]),
    "qlora, zero2": ("zero2_cpu", ["--use_peft", "--load_in_4bit", "--gradient_accumulation_steps", "2"]),
}


def make_flags(folder: Path, more: list[str]) -> list[str]:
    """What all runs have in common; the model and the pairs are made on first use."""
    import torch
    from conftest import build_tokenizer, write_pairs
    from transformers import GPT2Config, GPT2LMHeadModel

    if not (folder / "model").exists():
        tokenizer = build_tokenizer(["<|endoftext|>"], eos_token="<|endoftext|>", bos_token="<|endoftext|>")
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=256,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        GPT2LMHeadModel(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        write_pairs(folder / "pairs.jsonl", 40)
    data = [] if "--dataset_name" in more else ["--dataset_name", str(folder / "pairs.jsonl")]
    return [
        *("--model_name_or_path", str(folder / "model"), *data),
        *("--eval_fraction", "0.2", "--max_length", "64", "--learning_rate", "1e-3", "--logging_steps", "1"),
        *("--eval_steps", str(2 * SAVE_STEPS), "--save_steps", str(SAVE_STEPS), "--load_best_model_at_end", "false"),
        *("--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--report_to", "none"),
        *("--gradient_accumulation_steps", "1", *more),
    ]


def soak(case: str, folder: Path, kills: int, seed: int) -> dict[str, object]:
    """One case: the run that nobody disturbs, and the one that is killed so many times."""
    config, more = CASES[case]
    flags, chance = make_flags(folder, more), random.Random(f"{case} {seed}")
    whole = Lives(RunDir(folder / "whole"), flags, config, folder / "cache")
    whole.finish()
    done, lost, runs = 0, 0, 0
    while done < kills:
        runs += 1
        lives = Lives(RunDir(folder / f"killed-{runs}"), flags, config, folder / "cache")
        while done < kills:
            # The cache of reference log-probs is warm for half of the lives, and wiped before the others.
            if chance.random() < 0.5:
                shutil.rmtree(lives.cache, ignore_errors=True)
            if not lives.kill_at_random(chance, most_seconds=1.5):
                break  # it was through
            done += 1
            lost += max(0, lives.last_step() - lives.last_good())
        if (lives.run.read_run() or {}).get("state") != "finished":
            lives.finish()
        check_same(lives.run, whole.run)
    return {"kills": done, "runs": runs, "steps computed again": lost}


def soak_files(folder: Path) -> dict[str, object]:
    """Killed while each file of a checkpoint is being written."""
    flags = make_flags(folder, [])
    whole = Lives(RunDir(folder / "whole"), flags, None, folder / "cache")
    whole.finish()
    names = [*json.loads((whole.run.checkpoints()[-1] / "manifest.json").read_text())["files"], "manifest.json"]
    lives = Lives(RunDir(folder / "killed"), flags, None, folder / "cache")
    hit = []
    for name in names:
        seen = set(lives.run.path.glob(".checkpoint-*.part"))

        def is_written(name: str = name, seen: set[Path] = seen) -> bool:
            return any((part / name).exists() for part in set(lives.run.path.glob(".checkpoint-*.part")) - seen)

        if not lives.kill_when(is_written):
            break
        hit.append(name)
        assert not any(checkpoint.resume_problem for checkpoint in find_checkpoints(lives.run, deep=True))
    lives.finish()
    check_same(lives.run, whole.run)
    return {"kills": len(hit), "files": hit}


def run_suite() -> dict[str, object]:
    """The suite's own tests of faults. Raises: AssertionError where one fails."""
    tests = [str(Path(__file__).parents[1] / name) for name in SUITE]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--slow", *tests], stdout=sys.stderr, check=False)
    assert done.returncode == 0, "see the tests' output"
    return {"kills": "-", "tests": ", ".join(SUITE)}


def main() -> None:
    cases = [*CASES, "files", "suite"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    asked = parser.parse_args()
    print("| case | processes | kills | losses and weights | minutes | |\n|---|---|---|---|---|---|")
    failed = False
    for case in asked.cases:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            try:
                if case == "suite":
                    told = run_suite()
                elif case == "files":
                    told = soak_files(Path(name))
                else:
                    told = soak(case, Path(name), asked.kills, asked.seed)
                end = "passed" if case == "suite" else "the same, bit for bit"
            except AssertionError as error:
                told, end, failed = {"kills": "-"}, "FAILED" if case == "suite" else "DIFFERENT", True
                print(error, file=sys.stderr)
        config = CASES[case][0] if case in CASES else None
        more = "; ".join(f"{name}: {value}" for name, value in told.items() if name != "kills")
        minutes = (time.monotonic() - began) / 60
        processes = 1 if config is None else 2
        print(f"| {case} | {processes} | {told['kills']} | {end} | {minutes:.1f} | {more} |", flush=True)
    what = f"{STEPS} steps, a checkpoint every {SAVE_STEPS}, seed {asked.seed}"
    print(f"\n{date.today()}, {os.cpu_count()} CPU cores, {what}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
