"""Run folders written by the tests, with the same files as training and `dpokit evaluate` write."""

import json
import math
import random
from pathlib import Path
from typing import Any

SETTINGS: dict[str, tuple[Any, str]] = {
    "beta": (0.1, "recipe dpo_gpt2"),
    "dataset_name": ("Anthropic/hh-rlhf", "recipe dpo_gpt2"),
    "learning_rate": (5e-7, "command line"),
    "loss_type": (["sigmoid"], "recipe dpo_gpt2"),
    "model_name_or_path": ("gpt2", "recipe dpo_gpt2"),
    "weight_decay": (0.0, "default"),
}
DATA = {
    "train": {
        "source": "Anthropic/hh-rlhf, split train",
        "format": "HH transcript",
        "rows": 1500,
        "kept": 1495,
        "dropped": {"different_prompts": 4, "empty_answer": 1},
        "shortened": {"prompt": 538, "answer": 140},
    },
    "eval": {"source": "split test", "format": "HH transcript", "rows": 300, "kept": 300, "dropped": {}},
    "findings": ["12 % of the evaluation's prompts are in the training split, too"],
}


def make_steps(steps: int, *, every: int, seed: int = 0, gpu: bool = False) -> list[dict[str, Any]]:
    """Records of a run whose loss falls, with an evaluation after every `every` steps; 0 means no evaluations."""
    chance = random.Random(seed)
    records = []
    for step in range(1, steps + 1):
        learnt = 1 - math.exp(-3 * step / steps)
        margin = 1.6 * learnt
        values = {
            "loss": math.log(2) - 0.25 * learnt + chance.gauss(0, 0.05),
            "logits/chosen": -1.2 - learnt,
            "logits/rejected": -1.1 - learnt,
            "rewards/chosen": 0.3 * learnt + chance.gauss(0, 0.1),
            "rewards/rejected": -1.3 * learnt + chance.gauss(0, 0.1),
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.2 * learnt + chance.gauss(0, 0.06))),
            "rewards/margins": margin + chance.gauss(0, 0.15),
            "logps/chosen": -140 + 3 * learnt + chance.gauss(0, 6),
            "logps/rejected": -150 - 13 * learnt + chance.gauss(0, 6),
        }
        record = {"step": step, "seconds": round(0.31 * step, 3), **values}
        record |= {
            "learning_rate": 5e-7 * (1 - step / steps),
            "grad_norm": abs(chance.gauss(9, 2)),
            "epoch": step / steps,
        }
        record["tokens_per_second"] = chance.gauss(15_000, 300)
        if gpu:
            record |= {"gpu_power_watts": chance.gauss(610, 25), "gpu_memory_gib": 71.5}
            record["gpu_utilisation_percent"] = min(100.0, chance.gauss(97, 2))
        if every and step % every == 0:
            late = max(0.0, step / steps - 0.7)
            record |= {f"eval_{name}": value for name, value in values.items()}
            record |= {
                "eval_loss": math.log(2) - 0.2 * learnt + 0.3 * late + 0.003 * seed,
                "eval_rewards/margins": 0.9 * margin,
            }
        records.append(record)
    return records


def make_run(folder: Path, records: list[dict[str, Any]], **more: Any) -> Path:
    """A run folder with these records; `settings` override SETTINGS, and other arguments are fields of run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = {name: (value, "command line") for name, value in more.pop("settings", {}).items()}
    settings = {name: {"value": v, "origin": origin} for name, (v, origin) in (SETTINGS | changed).items()}
    record = {
        "generations": [
            {"token": "t0", "host": "n1", "began": "2026-11-20T09:00:00+00:00", "resumed_step": 0, "job": None}
        ],
        "recipe": "dpo_gpt2",
        "state": "finished",
        "why": None,
        "world_size": 1,
        "versions": {"dpokit": "0.1.0", "torch": "2.13.0", "trl": "1.16.0"},
        "settings": settings,
        "placement": "one device",
        "shared_prefix": "on",
        "best": None,
    }
    (folder / "run.json").write_text(json.dumps(record | more))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    (folder / "data.json").write_text(json.dumps(DATA))
    return folder


def make_starts(*steps: int) -> list[dict[str, Any]]:
    """The `generations` of a run that was preempted or killed, and resumed at these steps."""
    starts = [{"host": "n1", "began": "2026-11-20T09:00:00+00:00", "resumed_step": 0, "job": "101"}]
    for number, step in enumerate(steps):
        starts[-1] |= {"ended": "running" if number % 2 else "preempted", "ended_step": step + 3}
        began = f"2026-11-20T{10 + number:02}:00:00+00:00"
        starts.append({"host": f"n{number + 2}", "began": began, "resumed_step": step, "job": "101"})
    return starts


def v(value: float, spread: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def add_evaluation(
    folder: Path,
    *,
    prompt: str = "\n\nHuman: How do I bake bread?\n\nAssistant:",
    text: str = "",
    name: str = "",
    data: dict[str, Any] | None = None,
    answers: int | None = 3,
    **changes: Any,
) -> Path:
    """Writes the files of `dpokit evaluate` to eval/NAME, or to eval/ as older versions did; returns this folder.

    `data` and `changes` override what pairs.json says of the data and of the evaluation; no answers if they are None.
    """
    evaluation = folder / "eval" / name
    evaluation.mkdir(exist_ok=True, parents=True)
    base = {"model": "gpt2", "loss": v(0.693, 0), "ranking_accuracy": v(0.46), "ranking_accuracy_per_token": v(0.52)}
    base |= {"logps/chosen": v(-140.2, 3), "logps/rejected": v(-150.8, 3)}
    tuned = base | {"loss": v(0.571), "ranking_accuracy": v(0.55), "ranking_accuracy_per_token": v(0.63)}
    tuned |= {"accuracy": v(0.68), "margin": v(1.41, 0.1), "kl_per_token": v(0.021, 0.003)}
    pairs = {
        "format": 1,
        "end": "t0",
        "data": {"name": "Anthropic/hh-rlhf, split test", "pairs": 2312, "fingerprint": "ab12"},
        "beta": 0.1,
        "base": base,
        "tuned": tuned,
        "always_longer": v(0.55),
        "difference": {"ranking_accuracy_per_token": v(0.11) | {"p": 0.0004}},
        "groups": {
            "turns": [{"name": "1", "pairs": 1200, "accuracy": v(0.7), "margin": v(1.5), "loss": v(0.55)}],
            "source": [{"name": "harmless", "pairs": 900, "accuracy": v(0.66), "margin": v(1.3), "loss": v(0.6)}],
        },
        "verdict": {
            "text": "The tuned model is better: it prefers 11.0 % more held-out pairs (95 % interval 9.0 to 13.0).",
            "better": True,
        },
    }
    pairs["data"] |= data or {}
    (evaluation / "pairs.json").write_text(json.dumps(pairs | changes))
    if answers is None:
        return evaluation
    answer = (
        text
        or "Mix flour, water, salt and yeast. Knead the dough, let it rest for an hour, then bake it for 35 minutes."
    )
    records = [
        {
            "prompt": prompt,
            "chosen": answer,
            "base": {"text": text or "I don't know.\n\nHuman: Why not?", "tokens": 12, "ended": False},
            "tuned": {"text": answer, "tokens": 31, "ended": True},
        }
        for _ in range(answers)
    ]
    (evaluation / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    side = {"mean_tokens": 41.2, "repetition": 0.12, "distinct_2": 0.71, "ended": 0.4}
    numbers = {
        "end": changes.get("end", "t0"),
        "base": side,
        "tuned": side | {"ended": 0.9},
        "judge": {"wins": 61, "ties": 9, "losses": 30},
    }
    numbers["judge"]["win_rate"] = v(0.66, 0.09)
    numbers |= {"settings": {"prompts": answers}} if name else {}
    (evaluation / "answers.json").write_text(json.dumps(numbers))
    return evaluation
