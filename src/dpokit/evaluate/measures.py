"""Measures of base and tuned model from their log-probs: means with intervals, groups of pairs, a verdict. No torch."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpokit.intervals import LEAST_PROMPTS, Value, count_effective, find_intervals, find_p_value
from dpokit.metrics import MEASURED
from dpokit.untrained_loss import LN_2

LENGTH_BANDS = 4
SHARES = tuple(name for name, measure in MEASURED.items() if measure.is_share)
NONNEGATIVE = ("loss", "kl_per_token")
COLLAPSE_PER_TOKEN = 0.5  # nats: each chosen token is 1.6 times less probable than in the base


@dataclass
class Scores:
    """Log-probs of all pairs, `(2, pairs)` each: chosen, rejected.

    Attributes:
        tuned, base: fp64; no base if only one model is evaluated.
        tokens: token counts of the answers.
    """

    tuned: np.ndarray
    base: np.ndarray | None
    tokens: np.ndarray


def summarize_scores(
    scores: Scores, drift: np.ndarray | None, prompts: Sequence[bytes], *, beta: float
) -> dict[str, dict[str, Any]]:
    """Returns `tuned`, `difference`, `always_longer`, and with a base `base`: all means with their intervals.

    Drift is measured on some of the pairs only: `pairs` is their number.
    """
    measured = {"tuned": describe_model(scores.tuned, scores.tokens)}
    if scores.base is not None:
        measured["base"] = describe_model(scores.base, scores.tokens)
        measured["base"]["loss"] = np.full(len(prompts), LN_2)  # the base is its own reference
        measured["tuned"] |= compare_models(scores, beta=beta)
    if drift is not None:
        measured["tuned"]["kl_per_token"] = drift
    columns = {f"{side} {name}": column for side, table in measured.items() for name, column in table.items()}
    chosen, rejected = scores.tokens
    columns["always_longer"] = (chosen > rejected) + 0.5 * (chosen == rejected)
    shared = sorted(set(measured["tuned"]) & set(measured.get("base", {})))
    columns |= {f"difference {name}": measured["tuned"][name].astype(float) - measured["base"][name] for name in shared}
    values = find_intervals(
        columns,
        prompts,
        shares=["always_longer", *(f"{side} {name}" for side in measured for name in SHARES)],
        share_differences=[f"difference {name}" for name in SHARES],
        nonnegative=[f"tuned {name}" for name in NONNEGATIVE],
    )
    sides = {side: {name: values[f"{side} {name}"] for name in table} for side, table in measured.items()}
    if drift is not None:
        sides["tuned"]["kl_per_token"]["pairs"] = int(np.isfinite(drift).sum())
    difference: dict[str, Any] = {
        name: values[f"difference {name}"]
        | {"p": find_p_value(measured["tuned"][name].astype(float), measured["base"][name].astype(float), prompts)}
        for name in shared
    }
    return sides | {"difference": difference, "always_longer": values["always_longer"]}


def describe_model(log_probs: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a model's measures of each pair: log-probs, and if chosen is more probable, in total and per token."""
    (chosen, rejected), per_token = log_probs, log_probs / tokens
    return {
        "ranking_accuracy": chosen > rejected,
        "ranking_accuracy_per_token": per_token[0] > per_token[1],
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps_per_token/chosen": per_token[0],
    }


def compare_models(scores: Scores, *, beta: float) -> dict[str, np.ndarray]:
    """Returns DPO's measures of each pair: loss -log sigmoid(margin), reward margin, accuracy, rewards.

    The accuracy is 1 for a margin above 0, and 0.5 for a margin of 0: the pair is a tie.

    Rafailov et al., Direct Preference Optimization, 2023 (arXiv 2305.18290), equation 7.
    """
    assert scores.base is not None
    rewards = beta * (scores.tuned - scores.base)
    margin = rewards[0] - rewards[1]
    return {
        "loss": np.logaddexp(0.0, -margin),
        "accuracy": (1 + np.sign(margin)) / 2,
        "margin": margin,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
    }


# -- groups ------------------------------------------------------------------------------------------------------------


def describe_groups(
    columns: Mapping[str, np.ndarray], kinds: Mapping[str, Sequence[str]], prompts: Sequence[bytes]
) -> dict[str, list[dict[str, Any]]]:
    """Returns accuracy, margin and loss of each group, by kind of grouping; kinds with a single group are omitted.

    Args:
        columns: of `compare_models`.
        kinds: for each kind of grouping, the group's name of each pair.
    """
    groups_of_kinds = {kind: _describe_kind(columns, names, prompts) for kind, names in kinds.items()}
    return {kind: groups for kind, groups in groups_of_kinds.items() if len(groups) > 1}


def _describe_kind(
    columns: Mapping[str, np.ndarray], names: Sequence[str], prompts: Sequence[bytes]
) -> list[dict[str, Any]]:
    groups = []
    for name in sorted(set(names), key=_by_number):
        members = [at for at, other in enumerate(names) if other == name]
        selected = {column: columns[column][members] for column in ("accuracy", "margin", "loss")}
        intervals = find_intervals(selected, [prompts[at] for at in members], shares=SHARES, nonnegative=NONNEGATIVE)
        groups.append({"name": name, "pairs": len(members), **intervals})
    return groups


def _by_number(name: str) -> tuple[float, str]:
    first = name.split()[0] if name else ""
    return (float(first), name) if first.isdigit() else (math.inf, name)


def name_bands(lengths: Sequence[int]) -> list[str]:
    """Returns for each length the range of its quartile, as text: `12 to 30`."""
    edges = np.unique(np.percentile(lengths, np.linspace(0, 100, LENGTH_BANDS + 1)).astype(int))
    places = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
    maxima = [*(edges[1:-1] - 1), edges[-1]]
    return [f"{edges[place]} to {maxima[place]}" for place in places]


def name_gap(chosen: int, rejected: int) -> str:
    """Returns the name of the group for a pair's lengths: chosen longer, shorter or about as long."""
    if chosen > 1.25 * rejected:
        return "chosen longer by a quarter"
    return "chosen shorter by a fifth" if rejected > 1.25 * chosen else "about as long"


# -- verdict -----------------------------------------------------------------------------------------------------------


def count_prompts(prompts: Sequence[Hashable]) -> dict[str, Any]:
    """Returns `prompts`, the number of different ones, and `effective_prompts`, of which `decide_verdict` needs ten.

    Args:
        prompts: the prompt of each pair.
    """
    counts = np.array(list(Counter(prompts).values()), dtype=float)
    return {"prompts": len(counts), "effective_prompts": round(count_effective(counts), 3)}


def decide_verdict(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{text, better}`: the verdict in words, and as True, False, or None if no difference is shown.

    Effectively fewer than LEAST_PROMPTS prompts, a loss that is not finite, or the same loss for all pairs, never show
    a difference.
    """
    tuned, data = record["tuned"], record["data"]
    loss, accuracy, pairs, prompts = tuned["loss"], tuned["accuracy"], data["pairs"], data["prompts"]
    reason = ""
    if data["effective_prompts"] < LEAST_PROMPTS:
        subject = "1 held-out prompt is" if prompts == 1 else f"{prompts} held-out prompts are"
        if prompts >= LEAST_PROMPTS:
            subject += f", because of their unequal numbers of pairs, effectively {data['effective_prompts']:.1f}:"
        reason = f"{subject} too few for a verdict, which needs {LEAST_PROMPTS}"
    elif loss["value"] is None:
        reason = f"the loss of the {pairs:,} held-out pairs is not a finite number"
    elif "low" not in loss:
        reason = f"all {pairs:,} held-out pairs have the same loss, so it has no interval"
    if reason:
        return {"text": f"No difference to its base is shown: {reason}.", "better": None}
    evidence = (
        f"DPO loss {_show(loss)} where the base has {LN_2:.3f}, and it prefers the chosen answer more than the base "
        f"does in {_show(accuracy, '.1%')} of {pairs:,} held-out pairs"
    )
    better = None
    if loss["high"] < LN_2 and accuracy["low"] > 0.5:
        better, conclusion = True, "Better than its base"
    elif loss["low"] > LN_2:
        better, conclusion = False, "Worse than its base by the DPO loss"
    elif accuracy["high"] < 0.5:
        better, conclusion = False, "Worse than its base"
    else:
        conclusion = "No difference to its base is shown"
    change = record["difference"]["logps_per_token/chosen"]
    text = f"{conclusion}: {evidence}."
    if change.get("high", change["value"]) < -COLLAPSE_PER_TOKEN:
        text += f" But its chosen answers lost {-change['value']:.2f} nats a token: look at what it writes."
    return {"text": text, "better": better}


def _show(value: Value, form: str = ".3f") -> str:
    return f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
