"""Held-out HH pairs evaluated: TRL's own DPOTrainer.evaluate and `dpokit evaluate`."""

import time
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.benchmark import Benchmark
from benchmarks.workloads import build_stock, load_rows, make_model, read_pairs, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

# dpokit's names of the numbers that both have, and TRL's.
METRICS = {
    "loss": "eval_loss",
    "accuracy": "eval_rewards/accuracies",
    "margin": "eval_rewards/margins",
    "logps/chosen": "eval_logps/chosen",
    "logps/rejected": "eval_logps/rejected",
}


def prepare(options: SimpleNamespace) -> None:
    """Each model, its tuned twin, and pairs that neither side cuts: TRL and dpokit cut other ends."""
    for name in options.model:
        folder = make_model(options.folder, name)
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.002 * torch.randn_like(weight)
        tuned = folder.with_name(f"{name}-tuned")
        model.save_pretrained(tuned)
        tokenizer.save_pretrained(tuned)
        pairs = (
            pair
            for pair in read_pairs(10_000, "test")
            if max(len(tokenizer(pair["prompt"] + pair[side]).input_ids) for side in ("chosen", "rejected"))
            < options.max_length
        )
        write_rows(options.folder / f"{name}-data" / "test.jsonl", islice(pairs, options.pairs))


def measure(options: SimpleNamespace) -> dict[str, Any]:
    return measure_stock(options) if options.case == "stock" else measure_dpokit(options)


def measure_stock(options: SimpleNamespace) -> dict[str, Any]:
    """TRL as it comes."""
    base = options.folder / options.model
    pairs = load_rows(options.folder / f"{options.model}-data" / "test.jsonl")
    trainer = build_stock(
        options.folder / f"{options.model}-tuned",
        pairs,
        reference=base,
        output_dir=str(options.output / "run"),
        max_length=options.max_length,
        # TRL averages the averages of batches, which therefore divide the pairs.
        per_device_eval_batch_size=next(size for size in range(10, 0, -1) if len(pairs) % size == 0),
    )
    began = time.perf_counter()
    metrics = trainer.evaluate()
    seconds = time.perf_counter() - began
    return {"pairs": len(pairs), "seconds": seconds, "numbers": [metrics[name] for name in METRICS.values()]}


def measure_dpokit(options: SimpleNamespace) -> dict[str, Any]:
    """`dpokit evaluate`, from loaded models on."""
    from dpokit.evaluate.inputs import load_subject
    from dpokit.evaluate.pairs import evaluate_pairs

    base = str(options.folder / options.model)
    subject = load_subject(
        f"{base}-tuned", base=base, data=f"{base}-data", split="test", argv=["--max_length", str(options.max_length)]
    )
    began = time.perf_counter()
    evaluation = evaluate_pairs(subject)
    seconds = time.perf_counter() - began
    numbers = [evaluation["tuned"][name]["value"] for name in METRICS]
    return {"pairs": evaluation["data"]["pairs"], "seconds": seconds, "numbers": numbers}


BENCHMARK = Benchmark(
    title="Evaluation",
    about="""
Held-out HH pairs of at most 512 tokens. Models are loaded and pairs are tokenised before. `dpokit evaluate` also
computes the base's numbers, intervals and groups in its time. "Difference" is the largest relative difference of
loss, accuracy, margin and log-probs.
""",
    columns={
        "case": ("case", ""),
        "model": ("model", ""),
        "pairs": ("pairs", ",.0f"),
        "seconds": ("seconds", ".0f"),
        "relative": ("relative to TRL", ".1f"),
        "difference": ("difference", ".0e"),
    },
    cases={"stock": "`DPOTrainer.evaluate` of TRL", "dpokit": "`dpokit evaluate`"},
    measure=measure,
    prepare=prepare,
    options={"pairs": 300, "max_length": 512},
    axes={"model": ["gpt2"]},
    quick={"pairs": 12, "max_length": 128, "model": ["tiny"]},
    baseline="stock",
)
