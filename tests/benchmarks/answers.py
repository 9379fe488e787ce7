"""What is gained by computing a prompt once for all of its pairs: a policy's forward and backward, CPU seconds.

    python tests/benchmarks/answers.py

Each prompt has 4 pairs, and a micro-batch holds 2 prompts. The prompts are those of real HH rows, and the answers those
of that row and the rows after it, cut as `--max_length 512` cuts them. Pair by pair, each pair's prompt has a first
token of its own, so that no two pairs share one; in groups, the pairs of a prompt do. Both sides compute the same pairs
and take turns in one process; the median of the micro-batches' ratios counts.
"""

import argparse
import statistics
import time
from datetime import date
from operator import truediv
from typing import Any

import torch
from hh import TOKENIZER, read_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from trl.trainer.utils import add_fused_lm_head

from dpokit.model.packed_rows import IGNORED, pack_pairs
from dpokit.model.score import ScoredTokenCollator, score_batch, share_prefix

PAIRS, PROMPTS, MOST_TOKENS = 4, 2, 512
CASES = ("eight different answers", "one chosen answer against four rejected ones")
Row = dict[str, list[int]]


def encode_answers(tokenizer: Any, prompts: int) -> list[tuple[list[int], list[list[int]]]]:
    """Token ids of each prompt and of eight answers: those of its own row, and of the three rows after it."""
    rows = read_pairs(prompts + PAIRS - 1)
    encoded = [[tokenizer(row[name]).input_ids for name in ("prompt", "chosen", "rejected")] for row in rows]
    ends = [[[*answer, tokenizer.eos_token_id] for answer in row[1:]] for row in encoded]
    return [(encoded[at][0], [answer for row in ends[at : at + PAIRS] for answer in row]) for at in range(prompts)]


def build_pairs(prompt: list[int], answers: list[list[int]], case: str) -> list[Row]:
    """The pairs of a prompt, cut as a run cuts them: first the prompt's head, then the answer's tail."""
    chosen = answers[0::2] if case == CASES[0] else answers[:1] * PAIRS
    longest = min(max(map(len, answers)), MOST_TOKENS // 2)
    kept = prompt[-(MOST_TOKENS - longest) :]
    return [
        {"prompt_ids": kept, "chosen_ids": left[:longest], "rejected_ids": right[:longest]}
        for left, right in zip(chosen, answers[1::2], strict=True)
    ]


def set_apart(rows: list[Row]) -> list[Row]:
    """The rows, each with another first token of its prompt."""
    return [{**row, "prompt_ids": [number, *row["prompt_ids"][1:]]} for number, row in enumerate(rows)]


def measure_step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """CPU seconds of all threads for the forward and the backward pass."""
    model.zero_grad()
    began = time.process_time()
    scores = score_batch(model, batch)
    (scores * torch.linspace(-1, 1, len(scores))).sum().backward()
    return time.process_time() - began


def load_model(name: str | None) -> Any:
    """A causal LM without dropout that shares prompts: GPT-2 124M with random weights, or the named one."""
    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = AutoModelForCausalLM.from_pretrained(name) if name else AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model)
    share_prefix(model)
    return model.train()


def measure(model: Any, tokenizer: Any, case: str, *, batches: int) -> list[str]:
    """The cells of one line: shares of tokens, seconds of both sides, and their ratio."""
    prompts, collate = encode_answers(tokenizer, batches * PROMPTS), ScoredTokenCollator(tokenizer.eos_token_id)
    seconds: dict[str, list[float]] = {"apart": [], "grouped": []}
    tokens = {"apart": 0, "grouped": 0, "prompts": 0}
    for at in range(0, len(prompts), PROMPTS):
        rows = [row for prompt, answers in prompts[at : at + PROMPTS] for row in build_pairs(prompt, answers, case)]
        sides = {"apart": collate(set_apart(rows)), "grouped": collate(rows)}
        tokens["prompts"] += sum(len(row["prompt_ids"]) for row in rows)
        for side, batch in sides.items():
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
            tokens[side] += pack_pairs(batch["input_ids"], labels).input_ids.shape[1]
        for side in (*sides, *reversed(sides)):
            seconds[side].append(measure_step(model, sides[side]))
    halves = {
        side: [sum(pair) / 2 for pair in zip(times[0::2], times[1::2], strict=True)] for side, times in seconds.items()
    }
    ratio = statistics.median(map(truediv, halves["apart"], halves["grouped"]))
    return [
        case,
        f"{tokens['prompts'] / tokens['apart']:.0%}",
        f"{tokens['apart'] / tokens['grouped']:.2f}",
        *(f"{statistics.median(times):.2f}" for times in halves.values()),
        f"{ratio:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6, help="micro-batches of 8 pairs, for each line")
    parser.add_argument("--model", help="a folder; without it GPT-2 124M with random weights")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args()
    model = load_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model or TOKENIZER)
    measure(model, tokenizer, CASES[0], batches=1)  # memory is allocated
    print("| pairs of a prompt | prompts' share of tokens | fewer tokens | pair by pair, s | in groups, s | ratio |")
    print("|---|---|---|---|---|---|")
    for case in options.cases:
        print(f"| {' | '.join(measure(model, tokenizer, case, batches=options.batches))} |", flush=True)
    print(f"\n{date.today()}, {torch.get_num_threads()} threads, {model.num_parameters() / 1e6:.0f}M weights in fp32")


if __name__ == "__main__":
    main()
