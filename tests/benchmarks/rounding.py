"""False alarms and planted faults of the proof of packed rows, on the pretrained SmolLM2-135M and real HH pairs.

    python tests/benchmarks/rounding.py                       # 200 batches of two pairs, 25 for each line of the table
    python tests/benchmarks/rounding.py --batches 2 --faulty 1

Each line is a precision, a kind of training and a kind of rows. Correct packed rows must pass in every batch, and each
planted fault must be found in every batch that it is tried in.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from itertools import product
from typing import Any

import torch
from hh import ROOT, read_pairs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from dpokit.model.gguf import find_model_folder
from dpokit.model.score import ScoredTokenCollator, prove, share_prefix

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "model")]
from planted_faults import FAULTS, planted  # noqa: E402
from smollm2 import fetch_smollm2  # noqa: E402

PRECISIONS = ("fp32", "autocast to bf16", "weights in bf16")


@contextmanager
def at_precision(model: Any, precision: str) -> Iterator[None]:
    """Wraps the model's forward in autocast, as accelerate does, if that is the precision."""
    forward = model.forward

    def with_autocast(*arguments: Any, **named: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*arguments, **named)

    model.forward = with_autocast if precision.startswith("autocast") else forward
    try:
        yield
    finally:
        model.forward = forward


def build_rows(tokenizer: Any, number: int, longest: int, *, chat: bool) -> list[dict[str, list[int]]]:
    """Held-out HH pairs as token ids: as published, or each prompt as a user's turn of the chat template."""
    rows = []
    for pair in read_pairs(number, "test"):
        prompt, answers = pair["prompt"], {side: pair[side] for side in ("chosen", "rejected")}
        if chat:
            turns = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        encode = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *answers.values())]
        ends = [[*ids[: longest - 1], tokenizer.eos_token_id] for ids in encode[1:]]
        rows.append({"prompt_ids": encode[0][-longest:], "chosen_ids": ends[0], "rejected_ids": ends[1]})
    return rows


def measure(
    folder: str, precision: str, method: str, kind: str, *, batches: int, faulty: int, longest: int
) -> dict[str, Any]:
    """Returns false alarms, found faults and the range of the rounding."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "weights in bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_fused_lm_head(model)
    if method == "LoRA":
        lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian")
        model = get_peft_model(model, lora).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # as after some training
                torch.nn.init.normal_(weight, std=2e-3)
    shared, collate = share_prefix(model), ScoredTokenCollator(tokenizer.pad_token_id)
    rows = build_rows(tokenizer, 2 * batches, longest, chat=kind == "chat rows")
    alarms, roundings, tried, smallest = 0, [], [], float("inf")
    with at_precision(model, precision):
        for number in range(batches):
            batch = collate(rows[2 * number : 2 * number + 2])
            proof = prove(model, shared, batch)
            alarms += proof.mismatch is not None
            roundings.append(proof.rounding)
            faults = FAULTS if number < faulty else ()
            for fault in faults:
                if fault == "another adapter" and method == "full":
                    continue
                with planted(fault, model):
                    mismatch = prove(model, shared, batch).mismatch
                tried.append(mismatch is not None)
                if mismatch:
                    smallest = min(smallest, float(re.search(r"differ by (\S+)", mismatch)[1]))
    return {
        "alarms": f"{alarms} of {len(roundings)}",
        "faults": f"{sum(tried)} of {len(tried)}",
        "smallest": smallest,
        "rounding": (min(roundings), max(roundings)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=25, help="batches of two pairs, for each line")
    parser.add_argument("--faulty", type=int, default=2, help="batches in which each fault is planted, for each line")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a prompt, and of an answer")
    options = parser.parse_args()
    folder = find_model_folder(str(fetch_smollm2()))
    print("| precision | training | rows | false alarms | faults found | smallest fault | rounding |")
    print("|---|---|---|---|---|---|---|")
    for line in product(PRECISIONS, ("full", "LoRA"), ("HH rows", "chat rows")):
        measured = measure(folder, *line, **vars(options))
        least, most = measured["rounding"]
        smallest, rounding = f"{measured['smallest']:.1e}", f"{least:.1e} to {most:.1e}"
        cells = [*line, measured["alarms"], measured["faults"], smallest, rounding]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{date.today()}, {torch.get_num_threads()} threads, torch {torch.__version__}; nats a token")


if __name__ == "__main__":
    main()
