"""What log-probs of base and tuned say: numbers with intervals, groups of pairs, one sentence. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpokit.evaluate.intervals import Value, find_intervals, find_p_value
from dpokit.untrained_loss import LN_2

LENGTH_BANDS = 4
# Fewer independent values carry no interval. In 1,000 simulated samples the nominal 95 % interval of a normal mean
# covered the truth in 50 % of samples of 2, 85 % of samples of 5 and 92 % of samples of 10; that of 1 has no width.
LEAST_VALUES = 10
COLLAPSE_PER_TOKEN = 0.5  # nats: each chosen token is then 1.6 times less probable than before


@dataclass
class Scores:
    """Log-probs of all pairs, `(2, pairs)` each: chosen, rejected.

    Attributes:
        tuned, base: fp64; no base where one model was named alone.
        tokens: of the answers.
    """

    tuned: np.ndarray
    base: np.ndarray | None
    tokens: np.ndarray


def describe(
    scores: Scores, drift: np.ndarray | None, prompts: Sequence[bytes], *, beta: float
) -> dict[str, dict[str, Any]]:
    """`tuned`, and with a base `base`, `difference` and `always_longer`, each number with its interval.

    Drift was measured for some of the pairs only: it has their number, and an interval where they are `LEAST_VALUES`.
    """
    own = {"tuned": describe_model(scores.tuned, scores.tokens)}
    if scores.base is not None:
        own["base"] = describe_model(scores.base, scores.tokens)
        own["base"]["loss"] = np.full(len(prompts), LN_2)  # it is its own reference
        own["tuned"] |= compare(scores, beta=beta)
    if drift is not None:
        own["tuned"]["kl_per_token"] = drift
    columns = {f"{side} {name}": column for side, found in own.items() for name, column in found.items()}
    chosen, rejected = scores.tokens
    columns["always_longer"] = (chosen > rejected) + 0.5 * (chosen == rejected)
    alike = sorted(set(own["tuned"]) & set(own.get("base", {})))
    columns |= {f"difference {name}": own["tuned"][name].astype(float) - own["base"][name] for name in alike}
    values = find_intervals(columns, prompts)
    sides = {side: {name: values[f"{side} {name}"] for name in found} for side, found in own.items()}
    if drift is not None:
        known = int(np.isfinite(drift).sum())
        shown = {"value", "low", "high"} if known >= LEAST_VALUES else {"value"}
        drifted = {name: number for name, number in sides["tuned"]["kl_per_token"].items() if name in shown}
        sides["tuned"]["kl_per_token"] = drifted | {"pairs": known}
    difference: dict[str, Any] = {
        name: values[f"difference {name}"]
        | {"p": find_p_value(own["tuned"][name].astype(float), own["base"][name].astype(float), prompts)}
        for name in alike
    }
    return sides | {"difference": difference, "always_longer": values["always_longer"]}


def describe_model(log_probs: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What a model says by itself of each pair: which answer it finds more probable, as a whole and by the token."""
    (chosen, rejected), by_token = log_probs, log_probs / tokens
    return {
        "ranking_accuracy": chosen > rejected,
        "ranking_accuracy_per_token": by_token[0] > by_token[1],
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps_per_token/chosen": by_token[0],
    }


def compare(scores: Scores, *, beta: float) -> dict[str, np.ndarray]:
    """What DPO makes of each pair: loss -log sigmoid(margin), reward margin, whether it is above 0.

    Rafailov et al., Direct Preference Optimization, 2023 (arXiv 2305.18290), equation 7.
    """
    assert scores.base is not None
    rewards = beta * (scores.tuned - scores.base)
    margin = rewards[0] - rewards[1]
    return {
        "loss": np.logaddexp(0.0, -margin),
        "accuracy": margin > 0,
        "margin": margin,
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
    }


# -- groups ------------------------------------------------------------------------------------------------------------


def describe_groups(
    columns: Mapping[str, np.ndarray], kinds: Mapping[str, Sequence[str]], prompts: Sequence[bytes]
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy, margin and loss of the groups of each kind; a kind with one group is left out.

    Args:
        columns: of `compare`.
        kinds: for each kind the group of each pair.
    """
    found = {kind: _describe_kind(columns, names, prompts) for kind, names in kinds.items()}
    return {kind: groups for kind, groups in found.items() if len(groups) > 1}


def _describe_kind(
    columns: Mapping[str, np.ndarray], names: Sequence[str], prompts: Sequence[bytes]
) -> list[dict[str, Any]]:
    groups = []
    for name in sorted(set(names), key=_by_number):
        at = [place for place, other in enumerate(names) if other == name]
        taken = {column: columns[column][at] for column in ("accuracy", "margin", "loss")}
        groups.append({"name": name, "pairs": len(at), **find_intervals(taken, [prompts[place] for place in at])})
    return groups


def _by_number(name: str) -> tuple[float, str]:
    first = name.split()[0] if name else ""
    return (float(first), name) if first.isdigit() else (math.inf, name)


def name_bands(lengths: Sequence[int]) -> list[str]:
    """The quarter of all lengths that each is in, named by its range."""
    edges = np.unique(np.percentile(lengths, np.linspace(0, 100, LENGTH_BANDS + 1)).astype(int))
    places = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
    lasts = [*(edges[1:-1] - 1), edges[-1]]
    return [f"{edges[place]} to {lasts[place]}" for place in places]


def name_gap(chosen: int, rejected: int) -> str:
    """How the lengths of two answers compare, in words."""
    if chosen > 1.25 * rejected:
        return "chosen longer by a quarter"
    return "chosen shorter by a fifth" if rejected > 1.25 * chosen else "about as long"


# -- verdict -----------------------------------------------------------------------------------------------------------


def judge(record: Mapping[str, Any]) -> dict[str, Any]:
    """`{text, better}`: one sentence with its interval; `better` is None where nothing is shown.

    Fewer than `LEAST_VALUES` prompts, or one loss for all pairs, show nothing: their intervals do not hold.
    """
    tuned, pairs, prompts = record["tuned"], record["data"]["pairs"], record["data"]["prompts"]
    loss, accuracy = tuned["loss"], tuned["accuracy"]
    reason = ""
    if prompts < LEAST_VALUES:
        noun, verb = ("prompt", "has") if prompts == 1 else ("prompts", "have")
        reason = f"{prompts} held-out {noun}, fewer than {LEAST_VALUES}, {verb} no interval"
    elif math.isclose(loss["low"], loss["high"], rel_tol=1e-9):  # means of equal losses may differ in their last bits
        reason = f"all {pairs:,} held-out pairs have one loss, so no interval"
    if reason:
        return {"text": f"No difference to its base is shown: {reason}.", "better": None}
    seen = (
        f"DPO loss {_show(loss)} where the base has {LN_2:.3f}, and it prefers the chosen answer more than the base "
        f"does in {_show(accuracy, '.1%')} of {pairs:,} held-out pairs"
    )
    better = None
    if loss["high"] < LN_2 and accuracy["low"] > 0.5:
        better, word = True, "Better than its base"
    elif loss["low"] > LN_2:
        better, word = False, "Worse than its base by the DPO loss"
    elif accuracy["high"] < 0.5:
        better, word = False, "Worse than its base"
    else:
        word = "No difference to its base is shown"
    fallen = record["difference"]["logps_per_token/chosen"]
    text = f"{word}: {seen}."
    if fallen["high"] < -COLLAPSE_PER_TOKEN:
        text += f" But its chosen answers lost {-fallen['value']:.2f} nats a token: look at what it writes."
    return {"text": text, "better": better}


def _show(value: Value, form: str = ".3f") -> str:
    return f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})"
