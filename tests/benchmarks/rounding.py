"""False alarms and planted faults of the proof of packed rows, on the pretrained SmolLM2-135M and real HH pairs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.benchmark import Benchmark
from benchmarks.workloads import make_model, read_pairs
from model.planted_faults import FAULTS, planted
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from dpokit.model.score import ScoredTokenCollator, prove, share_prefix

ALL_AXES = {
    "precision": ["fp32", "autocast to bf16", "weights in bf16"],
    "training": ["full", "LoRA"],
    "rows": ["HH rows", "chat rows"],
}


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


def build_rows(tokenizer: Any, options: SimpleNamespace) -> list[dict[str, list[int]]]:
    """Held-out HH pairs as token ids: as published, or each prompt as a user's turn of the chat template."""
    rows = []
    for pair in read_pairs(2 * options.batches, "test"):
        prompt, answers = pair["prompt"], {side: pair[side] for side in ("chosen", "rejected")}
        if options.rows == "chat rows":
            turns = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, *answers.values())]
        chosen, rejected = ([*ids[: options.longest - 1], tokenizer.eos_token_id] for ids in encoded[1:])
        rows.append({"prompt_ids": encoded[0][-options.longest :], "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def prepare(options: SimpleNamespace) -> None:
    make_model(options.folder, options.model, chat=True)


def measure(options: SimpleNamespace) -> dict[str, Any]:
    """False alarms, found faults and the range of the rounding, in batches of two pairs."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.precision == "weights in bf16" else torch.float32
    folder = options.folder / options.model
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    add_fused_lm_head(model)
    if options.training == "LoRA":
        lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian")
        model = get_peft_model(model, lora).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # as after some training
                torch.nn.init.normal_(weight, std=2e-3)
    shared, collate = share_prefix(model), ScoredTokenCollator(tokenizer.pad_token_id or tokenizer.eos_token_id)
    rows = build_rows(tokenizer, options)
    proofs, planted_faults = [], []
    with at_precision(model, options.precision):
        for number in range(options.batches):
            batch = collate(rows[2 * number : 2 * number + 2])
            proofs.append(prove(model, shared, batch))
            for fault in FAULTS if number < options.faulty else ():
                if fault == "another adapter" and options.training == "full":
                    continue
                with planted(fault, model):
                    planted_faults.append(prove(model, shared, batch).mismatch)
    sizes = [float(re.search(r"differ by (\S+)", mismatch)[1]) for mismatch in planted_faults if mismatch]
    roundings = [proof.rounding for proof in proofs]
    return {
        "alarms": f"{sum(proof.mismatch is not None for proof in proofs)} of {len(proofs)}",
        "faults": f"{len(sizes)} of {len(planted_faults)}",
        "smallest": min(sizes, default=None),
        "rounding": f"{min(roundings):.1e} to {max(roundings):.1e}".replace("e-0", "e-"),
    }


BENCHMARK = Benchmark(
    title="Rounding and faults",
    about="""
The proof of packed rows on the pretrained SmolLM2-135M and real HH pairs, two in a batch. Correct packed rows must
pass in every batch, and each planted fault must be found in every batch in which it is tried. In nats per token.
""",
    columns={
        **{name: (name, "") for name in ALL_AXES},
        "alarms": ("false alarms", ""),
        "faults": ("faults found", ""),
        "smallest": ("smallest fault", ".1e"),
        "rounding": ("rounding", ""),
    },
    cases={"proof": "proof"},
    measure=measure,
    prepare=prepare,
    options={"model": "smollm2", "batches": 25, "faulty": 2, "longest": 256},
    axes=ALL_AXES,
    quick={"model": "tiny", "batches": 1, "faulty": 1, "longest": 32, "precision": ["fp32"], "rows": ["HH rows"]},
)
