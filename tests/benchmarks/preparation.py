"""Rows per second and memory of preparing a dataset: TRL's own `_prepare_dataset` and dpokit's, with the same rows."""

import time
from collections.abc import Iterator
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.workloads import (
    TOKENIZER,
    build_stock,
    load_rows,
    make_model,
    measure_memory,
    read_transcripts,
    write_rows,
)
from transformers import AutoTokenizer


def prepare(options: SimpleNamespace) -> None:
    """HH transcripts over and over, each made different by a number in its question."""
    make_model(options.folder, "tiny")
    for number in options.rows:
        rows = (
            {side: text.replace("\n\nHuman: ", f"\n\nHuman: {index}. ", 1) for side, text in row.items()}
            for index, row in enumerate(islice(cycle(read_transcripts()), number))
        )
        write_rows(options.folder / f"{number}.jsonl", rows)


def measure(options: SimpleNamespace) -> dict[str, Any]:
    """One side; reading the file is not counted, as both sides read it alike."""
    stages = (run_stock if options.case == "stock" else run_dpokit)(options)
    next(stages)
    with measure_memory() as memory:
        began = time.perf_counter()
        kept = next(stages)
        seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "kept": kept,
        "rows_per_second": options.rows / seconds,
        "gib": memory.peak / 2**30,
    }


def run_stock(options: SimpleNamespace) -> Iterator[int]:
    """TRL prepares in the trainer's constructor; that of a tiny model takes no time beside it."""
    rows = load_rows(options.folder / f"{options.rows}.jsonl")
    settings = {"output_dir": str(options.output / "run"), "dataset_num_proc": options.processes}
    yield len(rows)
    yield len(build_stock(options.folder / "tiny", rows, **settings).train_dataset)


def run_dpokit(options: SimpleNamespace) -> Iterator[int]:
    from dpokit.data.prepare import prepare_data
    from dpokit.data.sources import load_splits
    from dpokit.settings.flags import DataArguments

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    arguments = DataArguments(dataset_name=str(options.folder / f"{options.rows}.jsonl"))
    yield len(load_splits(arguments.dataset_name, None, streaming=False)["train"])
    yield len(prepare_data(arguments, tokenizer, max_length=512, with_eval=False, processes=options.processes).train)


BENCHMARK = Benchmark(
    title="Preparation",
    about="""
HH rows, two processes, with an empty cache unless the rows were prepared before. Memory is the peak of all processes
together, shared pages counted once and pages of files not at all.
""",
    columns={
        "rows": ("rows", ",.0f"),
        "case": ("case", ""),
        "seconds": ("seconds", ".1f"),
        "rows_per_second": ("rows/s", ",.0f"),
        "relative": ("relative to TRL", ".1f"),
        "gib": ("peak GiB", ".2f"),
        "kept": ("rows kept", ",.0f"),
    },
    cases={"stock": "TRL", "dpokit": "dpokit", "again": "dpokit, prepared before"},
    measure=measure,
    prepare=prepare,
    options={"processes": 2},
    axes={"rows": [40_000, 160_000]},
    quick={"rows": [200], "processes": 1},
    baseline="stock",
    cached={"again": "dpokit"},
)
