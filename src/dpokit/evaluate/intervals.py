"""Means with bootstrap intervals, and a paired test; pairs of one prompt are dependent, so they are drawn together."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

DRAWS = 4000
FLIPS = 10_000
CHUNK = 500  # draws at a time: bounds the memory if there are many prompts
Value = dict[str, float]


def find_intervals(
    columns: Mapping[str, np.ndarray], prompts: Sequence[Hashable], *, seed: int = 0, draws: int = DRAWS
) -> dict[str, Value]:
    """Returns `{name: {value, low, high}}`: means, with 95 % percentile intervals of a bootstrap over prompts.

    Args:
        columns: a number for each pair, `(pairs,)` each; booleans count as 0 and 1. Means ignore NaN.
        prompts: the prompt of each pair; pairs of one prompt are drawn together (a cluster bootstrap: Davison and
            Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
        seed: of the draws.
        draws: number of bootstrap samples.
    """
    sums, counts = _add_up(columns, prompts)
    value = _divide(sums.sum(0), counts.sum(0))
    generator, clusters, means = np.random.default_rng(seed), len(sums), []
    for start in range(0, draws, CHUNK):
        shape = (min(CHUNK, draws - start), clusters)
        weights = _draw(generator, *shape)
        means.append(_divide(weights @ sums, weights @ counts))
    low, high = np.nanpercentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return {
        name: {"value": float(value[at]), "low": float(low[at]), "high": float(high[at])}
        for at, name in enumerate(columns)
    }


def find_p_value(
    first: np.ndarray, second: np.ndarray, prompts: Sequence[Hashable], *, seed: int = 0, flips: int = FLIPS
) -> float:
    """Returns the two-sided p-value of the difference of two paired means.

    A paired randomisation test (Fisher; Good, Permutation Tests, 2000): at random, all pairs of a prompt swap their two
    numbers.
    """
    sums, _ = _add_up({"difference": first.astype(float) - second.astype(float)}, prompts)
    differences, generator = sums[:, 0], np.random.default_rng(seed)
    observed, as_large = abs(differences.sum()) - 1e-9, 0
    for start in range(0, flips, CHUNK):
        signs = generator.choice([-1.0, 1.0], size=(min(CHUNK, flips - start), len(differences)))
        as_large += int((np.abs(signs @ differences) >= observed).sum())
    return (as_large + 1) / (flips + 1)


def _add_up(columns: Mapping[str, np.ndarray], prompts: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Returns sums and counts of each prompt's pairs, `(prompts, columns)` each."""
    clusters: dict[Hashable, int] = {}
    at = np.array([clusters.setdefault(prompt, len(clusters)) for prompt in prompts])
    table = np.stack([np.asarray(column, dtype=float) for column in columns.values()], axis=1)
    is_number = ~np.isnan(table)
    sums, counts = np.zeros((len(clusters), table.shape[1])), np.zeros((len(clusters), table.shape[1]))
    np.add.at(sums, at, np.where(is_number, table, 0.0))
    np.add.at(counts, at, is_number)
    return sums, counts


def _draw(generator: np.random.Generator, draws: int, clusters: int) -> np.ndarray:
    """Returns how often each draw contains each prompt, `(draws, prompts)`; all prompts, with replacement."""
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws).astype(float)


def _divide(sums: np.ndarray, counts: np.ndarray) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts
