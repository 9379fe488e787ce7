"""Rows per second and memory of preparing a dataset: TRL's own `_prepare_dataset` and ours, same rows, one run.

    python tests/benchmarks/preparation.py                # the table: 40,000 and 160,000 HH rows, two processes

The rows are the real ones of ../shared over and over, each made different by a number in its question. Each case is a
process of its own with an empty cache; memory is the peak of its processes together, shared pages counted once and
pages of files, which the system can drop, not at all.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from itertools import cycle, islice
from pathlib import Path

import psutil
from hh import TOKENIZER, read_transcripts

CASES = {"stock": "TRL", "ours": "dpokit", "again": "dpokit, prepared before"}


def write_rows(path: Path, number: int) -> None:
    """HH transcripts as JSON lines."""
    with path.open("w") as file:
        for index, row in enumerate(islice(cycle(read_transcripts()), number)):
            first = f"\n\nHuman: {index}. "
            file.write(json.dumps({side: text.replace("\n\nHuman: ", first, 1) for side, text in row.items()}) + "\n")


def run_stock(folder: Path, processes: int) -> Iterator[int]:
    """TRL prepares in the trainer's constructor; that of a model of one layer takes no time beside it."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)).save_pretrained(folder / "model")
    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    args = DPOConfig(
        output_dir=str(folder / "out"), dataset_num_proc=processes, use_cpu=True, bf16=False, report_to="none"
    )
    yield len(rows)
    trainer = DPOTrainer(model=str(folder / "model"), args=args, train_dataset=rows, processing_class=tokenizer)
    yield len(trainer.train_dataset)


def run_ours(folder: Path, processes: int) -> Iterator[int]:
    from transformers import AutoTokenizer

    from dpokit.data.prepare import prepare_data
    from dpokit.data.sources import load_splits
    from dpokit.settings.flags import DataArguments

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    asked = DataArguments(dataset_name=str(folder / "train.jsonl"))
    yield len(load_splits(asked.dataset_name, None, streaming=False)["train"])
    data = prepare_data(asked, tokenizer, max_length=512, with_eval=False, processes=processes)
    yield len(data.train)


def run_case(case: str, folder: Path, processes: int) -> dict[str, float]:
    """One side, in this process; reading the file is not counted, as both sides read it alike."""
    stages = (run_stock if case == "stock" else run_ours)(folder, processes)
    next(stages)
    began = time.perf_counter()
    kept = next(stages)
    return {"seconds": time.perf_counter() - began, "kept": kept}


def watch(words: list[str], environment: dict[str, str]) -> tuple[str, float]:
    """Output of a command, and the most memory that its processes took together, GiB."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, env=environment)
        most = 0
        while process.poll() is None:
            total = 0
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
                    total += int(re.search(r"Pss_Anon:\s+(\d+)", rollup)[1]) * 1024
                except OSError:
                    continue
            most = max(most, total)
            time.sleep(0.5)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            print(err.read()[-2000:], file=sys.stderr)
        return out.read(), most / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[40_000, 160_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print("RESULT " + json.dumps(run_case(asked.case, asked.folder, asked.processes)))
        return
    print("| rows | case | seconds | rows/s | against TRL | GiB at most | kept |\n|---|---|---|---|---|---|---|")
    for number in asked.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "train.jsonl", number)
            base = None
            for case, title in CASES.items():
                cache = folder / ("stock" if case == "stock" else "ours")
                environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
                words = [sys.executable, __file__, "--case", case, "--folder", name]
                output, gib = watch([*words, "--processes", str(asked.processes)], environment)
                found = [line for line in output.splitlines() if line.startswith("RESULT ")]
                if not found:
                    continue
                result = json.loads(found[0].removeprefix("RESULT "))
                seconds = result["seconds"]
                base = seconds if case == "stock" else base
                ratio = f"{base / seconds:.1f}" if base else "-"
                cells = [f"{number:,}", title, f"{seconds:.1f}", f"{number / seconds:,.0f}", ratio, f"{gib:.2f}"]
                print("| " + " | ".join([*cells, f"{result['kept']:,}"]) + " |", flush=True)
    print(f"\n{date.today()}, {os.cpu_count()} CPU cores, {asked.processes} processes, real HH rows")


if __name__ == "__main__":
    main()
