"""Means with intervals, and a paired test: pairs of one prompt are drawn together, as they are no independent proof."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 4000
FLIPS = 10_000
CHUNK = 500  # draws at a time: bounds the memory of many prompts
Value = dict[str, float]


def find_intervals(
    columns: Mapping[str, np.ndarray], prompts: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS
) -> dict[str, Value]:
    """`{name: {value, low, high}}`: means, with 95 % percentile intervals of a bootstrap over prompts.

    Args:
        columns: numbers of each pair, `(pairs,)` each; booleans count as 0 and 1. NaN is left out of its mean.
        prompts: which prompt each pair has; those of one prompt are drawn together (a cluster bootstrap: Davison and
            Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
        seed: of the draws.
        draws: how many.
    """
    sums, counts = _add_up(columns, prompts)
    value = _divide(sums.sum(0), counts.sum(0))
    chance, clusters, means = np.random.default_rng(seed), len(sums), []
    for start in range(0, draws, CHUNK):
        shape = (min(CHUNK, draws - start), clusters)
        weights = _draw(chance, *shape)
        means.append(_divide(weights @ sums, weights @ counts))
    low, high = np.nanpercentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return {
        name: {"value": float(value[at]), "low": float(low[at]), "high": float(high[at])}
        for at, name in enumerate(columns)
    }


def find_p_value(
    one: np.ndarray, other: np.ndarray, prompts: Sequence[Hashable], *, seed: int = 0, flips: int = FLIPS
) -> float:
    """How probable a difference of the means as large as this one is, either way, if the two are alike.

    A paired randomisation test (Fisher; Good, Permutation Tests, 2000): the two numbers of a prompt's pairs change
    places at random.
    """
    sums, _ = _add_up({"difference": one.astype(float) - other.astype(float)}, prompts)
    differences, chance = sums[:, 0], np.random.default_rng(seed)
    seen, as_large = abs(differences.sum()) - 1e-9, 0
    for start in range(0, flips, CHUNK):
        signs = chance.choice([-1.0, 1.0], size=(min(CHUNK, flips - start), len(differences)))
        as_large += int((np.abs(signs @ differences) >= seen).sum())
    return (as_large + 1) / (flips + 1)


def _add_up(columns: Mapping[str, np.ndarray], prompts: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of each prompt's pairs, `(prompts, columns)` each."""
    places: dict[Hashable, int] = {}
    at = np.array([places.setdefault(prompt, len(places)) for prompt in prompts])
    table = np.stack([np.asarray(column, dtype=float) for column in columns.values()], axis=1)
    known = ~np.isnan(table)
    sums, counts = np.zeros((len(places), table.shape[1])), np.zeros((len(places), table.shape[1]))
    np.add.at(sums, at, np.where(known, table, 0.0))
    np.add.at(counts, at, known)
    return sums, counts


def _draw(chance: np.random.Generator, draws: int, clusters: int) -> np.ndarray:
    """How often each prompt is drawn, `(draws, prompts)`: as many as there are, with replacement."""
    return chance.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws).astype(float)


def _divide(sums: np.ndarray, counts: np.ndarray) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts
