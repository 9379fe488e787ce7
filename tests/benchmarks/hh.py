"""The real HH rows and the real GPT-2 tokenizer that the benchmarks share, and a clock of steps."""

import gzip
import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

ROOT = Path(__file__).parents[2]
HH = Path(os.environ.get("DPOKIT_SHARED", ROOT.parent / "shared")) / "data"
TOKENIZER = HH / "gpt2-tokenizer"


def read_transcripts(split: str = "train") -> Iterator[dict[str, str]]:
    """Rows as published: `chosen` and `rejected`, whole conversations."""
    with gzip.open(HH / "hh-rlhf" / "harmless-base" / f"{split}.jsonl.gz", "rt") as lines:
        yield from map(json.loads, lines)


def read_pairs(number: int, split: str = "train") -> list[dict[str, str]]:
    """Rows as explicit pairs, split at the transcript's own last turn, so that both sides of a case get the same."""
    mark = "\n\nAssistant:"

    def usable() -> Iterator[dict[str, str]]:
        for row in read_transcripts(split):
            cut = row["chosen"].rfind(mark) + len(mark)
            prompt, chosen, rejected = row["chosen"][:cut], row["chosen"][cut:], row["rejected"][cut:]
            if row["rejected"][:cut] == prompt and chosen.strip() and rejected.strip():
                yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    return list(islice(usable(), number))


class Clock(TrainerCallback):
    """`seconds` of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
