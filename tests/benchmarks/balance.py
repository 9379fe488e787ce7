"""What pairs of unequal length cost two processes, which wait for each other at every step.

    python tests/benchmarks/balance.py

GPT-2 124M under DDP on two CPU processes, 8 pairs a step: pairs with the lengths of real HH rows, against pairs that
all have their mean length, so that both have the same tokens in all. The mean of the steps after the first counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from hh import ROOT, TOKENIZER, Clock, read_pairs
from steps import make_model
from transformers import AutoTokenizer

STEPS, PAIRS_A_STEP, MOST_TOKENS = 8, 8, 512
FILLERS = (" the", " house")  # of the answers, one token each


def find_lengths(number: int) -> list[list[int]]:
    """Tokens of prompt, chosen and rejected of HH rows, cut as `max_length` cuts them; EOS is left out."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    found = []
    for row in read_pairs(number):
        prompt, *answers = (len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected"))
        found.append([max(1, min(prompt, MOST_TOKENS - 1 - max(answers))), *answers])
    return found


def write_rows(path: Path, lengths: list[list[int]]) -> None:
    rows = [
        {"prompt": " a" * prompt, "chosen": FILLERS[0] * chosen, "rejected": FILLERS[1] * rejected}
        for prompt, chosen, rejected in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_case(folder: Path, case: str) -> None:
    """One process of two."""
    from dpokit.distributed.processes import is_main_process
    from dpokit.run import build_trainer
    from dpokit.rundir import RunDir
    from dpokit.settings.load import load_settings
    from dpokit.train.gates import Gates

    defaults = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / f"{case}.jsonl"),
        "prompt_format": "raw",  # the lengths of the rows as they are
        "output_dir": str(folder / f"run-{case}"),
        "per_device_train_batch_size": PAIRS_A_STEP // 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": STEPS + 1,
        "max_length": MOST_TOKENS,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    run = RunDir(defaults["output_dir"])
    run.path.mkdir(exist_ok=True)
    trainer, _ = build_trainer(run, load_settings("benchmark", defaults, []), Gates("stop"))
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    if is_main_process():
        history = [record for record in trainer.state.log_history if "num_tokens" in record]
        print("RESULT " + json.dumps({"seconds": clock.seconds[1:], "tokens": history[-1]["num_tokens"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        run_case(asked.folder, asked.case)
        return
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", "gpt2")
        lengths = find_lengths(PAIRS_A_STEP * (STEPS + 1))
        mean = [round(statistics.mean(column)) for column in zip(*lengths, strict=True)]
        write_rows(folder / "unequal.jsonl", lengths)
        write_rows(folder / "equal.jsonl", [mean] * len(lengths))
        for case in ("equal", "unequal"):
            config = str(ROOT / "accelerate_configs" / "ddp_cpu.yaml")
            words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, __file__]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*words, "--case", case, "--folder", name], capture_output=True, text=True, env=environment, check=False
            )
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not found:
                sys.exit(done.stderr[-3000:])
            results[case] = json.loads(found[0].removeprefix("RESULT "))
    seconds = {case: statistics.mean(result["seconds"]) for case, result in results.items()}
    for case, result in results.items():
        print(f"{case}: {seconds[case]:.2f} s a step, {result['tokens']:,.0f} tokens in all")
    print(f"unequal / equal: {seconds['unequal'] / seconds['equal']:.2f}")
    print(f"{date.today()}, {os.cpu_count()} CPU cores, 2 processes, {PAIRS_A_STEP} pairs a step, {STEPS} steps")


if __name__ == "__main__":
    main()
