"""The time that two processes lose by pairs of unequal length, as they wait for each other at every step."""

import statistics
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from benchmarks.benchmark import Benchmark
from benchmarks.workloads import TOKENIZER, launch_recipe, make_model, read_pairs, read_steps, write_rows
from transformers import AutoTokenizer


def prepare(options: SimpleNamespace) -> None:
    """The model, and rows with the lengths of HH rows: of each word, GPT-2's tokenizer makes one token."""
    make_model(options.folder, options.model)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = []
    for row in read_pairs(options.pairs * (options.steps + 1)):
        prompt, *answers = (len(tokenizer(row[name]).input_ids) for name in ("prompt", "chosen", "rejected"))
        answers = [min(answer, options.max_length // 2) for answer in answers]
        lengths.append([max(1, min(prompt, options.max_length - 1 - max(answers))), *answers])
    # Each prompt begins with another word, as pairs with equal prompts would share one.
    tokens = (tokenizer.decode([number]) for number in range(1_000, 20_000))
    words = [token for token in tokens if token.startswith(" ") and token[1:].isalpha()]
    mean = [round(statistics.mean(column)) for column in zip(*lengths, strict=True)]
    for case, of_rows in {"unequal": lengths, "equal": [mean] * len(lengths)}.items():
        rows = [
            {"prompt": word + " a" * (prompt - 1), "chosen": " the" * chosen, "rejected": " house" * rejected}
            for word, (prompt, chosen, rejected) in zip(words, of_rows, strict=False)
        ]
        write_rows(options.folder / f"{case}.jsonl", rows)


def measure(options: SimpleNamespace) -> dict[str, Any]:
    process = launch_recipe(
        options,
        processes=2,
        environment={"OMP_NUM_THREADS": "1"},
        dataset_name=options.folder / f"{options.case}.jsonl",
        per_device_train_batch_size=options.pairs // 2,
        max_length=options.max_length,
        prompt_format="raw",  # the lengths of the rows as they are
        max_steps=options.steps + 1,
        precompute_ref_log_probs=False,
    )
    steps = read_steps(options, process)
    seconds = statistics.mean(after["seconds"] - before["seconds"] for before, after in pairwise(steps))
    return {"seconds": seconds, "tokens": steps[-1]["num_tokens"]}


BENCHMARK = Benchmark(
    title="Balance between processes",
    about="""
GPT-2 124M, two CPU processes with one thread each, 8 pairs a step. In one case pairs have the lengths of real HH
rows, cut at 512 tokens; in the other all have the mean length, so that both have the same number of tokens. The mean
of the steps after the first counts.
""",
    columns={
        "case": ("pairs", ""),
        "seconds": ("s per step", ".2f"),
        "tokens": ("tokens", ",.0f"),
        "relative": ("relative time", ".2f"),
    },
    cases={"equal": "all of the mean length", "unequal": "with real, unequal lengths"},
    measure=measure,
    prepare=prepare,
    options={"model": "gpt2", "steps": 8, "pairs": 8, "max_length": 512},
    quick={"model": "tiny", "steps": 1, "pairs": 4, "max_length": 64},
    baseline="equal",
    speed=False,
)
