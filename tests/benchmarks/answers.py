"""The gain of computing a prompt once for all of its pairs: the policy's forward and backward pass."""

import statistics
import time
from operator import truediv
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.benchmark import Benchmark
from benchmarks.workloads import make_model, read_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from dpokit.model.packed_rows import IGNORED, pack_pairs
from dpokit.model.score import ScoredTokenCollator, score_batch, share_prefix

PAIRS, PROMPTS = 4, 2  # of a prompt, and of a micro-batch
Row = dict[str, list[int]]


def prepare(options: SimpleNamespace) -> None:
    for name in options.model:
        make_model(options.folder, name)


def encode_answers(tokenizer: Any, prompts: int) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of each prompt and of eight answers: those of its own row, and of the three rows after it."""
    rows = read_pairs(prompts + PAIRS - 1)
    encoded = [[tokenizer(row[name]).input_ids for name in ("prompt", "chosen", "rejected")] for row in rows]
    ends = [[[*answer, tokenizer.eos_token_id] for answer in row[1:]] for row in encoded]
    return [(encoded[at][0], [answer for row in ends[at : at + PAIRS] for answer in row]) for at in range(prompts)]


def build_pairs(prompt: list[int], answers: list[list[int]], options: SimpleNamespace) -> list[Row]:
    """The pairs of a prompt: answers of at most half of `max_length`, and the end of the prompt that fits."""
    chosen = answers[0::2] if options.case == "different" else answers[:1] * PAIRS
    longest = min(max(map(len, answers)), options.max_length // 2)
    kept = prompt[-(options.max_length - longest) :]
    return [
        {"prompt_ids": kept, "chosen_ids": left[:longest], "rejected_ids": right[:longest]}
        for left, right in zip(chosen, answers[1::2], strict=True)
    ]


def set_apart(rows: list[Row]) -> list[Row]:
    """The rows, each with another first token of its prompt, so that no two pairs share one."""
    return [{**row, "prompt_ids": [number, *row["prompt_ids"][1:]]} for number, row in enumerate(rows)]


def measure_step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """CPU seconds of all threads for the forward and the backward pass."""
    model.zero_grad()
    began = time.process_time()
    scores = score_batch(model, batch)
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    return time.process_time() - began


def measure(options: SimpleNamespace) -> dict[str, Any]:
    folder = options.folder / options.model
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    disable_dropout_in_model(model)
    add_fused_lm_head(model)
    share_prefix(model)
    model.train()
    prompts, collate = encode_answers(tokenizer, options.batches * PROMPTS), ScoredTokenCollator(tokenizer.eos_token_id)
    seconds: dict[str, list[float]] = {"apart": [], "grouped": []}
    tokens = {"apart": 0, "grouped": 0, "prompts": 0}
    for at in range(0, len(prompts), PROMPTS):
        rows = [row for prompt, answers in prompts[at : at + PROMPTS] for row in build_pairs(prompt, answers, options)]
        sides = {"apart": collate(set_apart(rows)), "grouped": collate(rows)}
        tokens["prompts"] += sum(len(row["prompt_ids"]) for row in rows)
        for side, batch in sides.items():
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
            tokens[side] += pack_pairs(batch["input_ids"], labels).input_ids.shape[1]
            if at == 0:
                measure_step(model, batch)  # memory is allocated
        for side in (*sides, *reversed(sides)):
            seconds[side].append(measure_step(model, sides[side]))
    halves = {
        side: [sum(pair) / 2 for pair in zip(times[0::2], times[1::2], strict=True)] for side, times in seconds.items()
    }
    return {
        "prompts": tokens["prompts"] / tokens["apart"],
        "tokens": tokens["apart"] / tokens["grouped"],
        **{f"{side}_seconds": statistics.median(times) for side, times in halves.items()},
        "ratio": statistics.median(map(truediv, halves["apart"], halves["grouped"])),
    }


BENCHMARK = Benchmark(
    title="Several pairs of one prompt",
    about="""
CPU seconds of the policy's forward and backward pass in fp32, max_length 512. Each prompt is that of a real HH row and
has 4 pairs, of real answers; a micro-batch has 2 prompts. Pair by pair, each pair has its own copy of the prompt; in
groups, the pairs of a prompt share it. Both sides take turns in one process; the median of the micro-batches counts.
Answers that differ share nothing but the prompt, and the LM head sees answers alone, so that it gains nothing.
""",
    columns={
        "model": ("model", ""),
        "case": ("pairs of a prompt", ""),
        "prompts": ("prompts' share of tokens", ".0%"),
        "tokens": ("fewer tokens", ".2f"),
        "apart_seconds": ("pair by pair, s", ".2f"),
        "grouped_seconds": ("in groups, s", ".2f"),
        "ratio": ("ratio", ".2f"),
    },
    cases={"different": "eight different answers", "one": "one chosen answer against four rejected ones"},
    measure=measure,
    prepare=prepare,
    axes={"model": ["gpt2"]},
    options={"batches": 3, "max_length": 512},
    quick={"model": ["tiny"], "batches": 1, "max_length": 64},
)
