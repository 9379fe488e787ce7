"""How often nominal 95 % intervals contain the truth; `python tests/interval_coverage.py` prints the table of the docs.

Shares of independent pairs are enumerated exactly; all others are simulated with a seed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dpokit.intervals import LEAST_PROMPTS, count_effective, find_intervals, find_wilson
from dpokit.sweep.ranking import find_interval

Generator = np.random.Generator
SHARES = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)
# Probabilities that only the tuned model, and that only the base, ranks a pair as its data does.
CHANGES = ((0.01, 0.01), (0.05, 0.0), (0.3, 0.1), (0.5, 0.5), (0.9, 0.05))
SIZES: dict[str, Callable[[int], np.ndarray]] = {
    "1 pair each": lambda prompts: np.ones(prompts, dtype=int),
    "5 pairs each": lambda prompts: np.full(prompts, 5),
    "1 to 8 pairs each": lambda prompts: np.resize([1, 8, 1, 2, 1], prompts),
    "half of all pairs are of one": lambda prompts: np.append(prompts - 1, np.ones(prompts - 1, dtype=int)),
}
ALIKE = 0.3  # correlation of the pairs of a prompt


def softplus(margin: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, -margin)


# Of a pair, as functions of a normal number: DPO losses of margins with mean 0.3 and deviation 0.5, or 1 and 2.
NUMBERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, float]] = {
    "normal": (lambda x: x, 0.0, 1.0),
    "loss of small margins": (softplus, 0.3, 0.5),
    "loss of large margins": (softplus, 1.0, 2.0),
    "log-normal": (np.exp, 0.0, 1.0),
}


@dataclass(frozen=True)
class Case:
    """One row of the table: the kind of number, the prompts, and the lowest and highest rate over all truths."""

    kind: str
    prompts: int
    sizes: str
    lowest: float
    highest: float


def cover_independent_shares(prompts: int) -> Case:
    """By enumeration: the probability of each number of hits, and whether its interval contains the truth."""
    rates = []
    intervals = [find_wilson(hits, prompts) for hits in range(prompts + 1)]
    for share in SHARES:
        chances = [
            math.comb(prompts, hits) * share**hits * (1 - share) ** (prompts - hits) for hits in range(len(intervals))
        ]
        rates.append(sum(c for c, i in zip(chances, intervals, strict=True) if i and i["low"] <= share <= i["high"]))
    return Case("share", prompts, "1 pair each", min(rates), max(rates))


def cover_shares(prompts: int, sizes: str, rounds: int, generator: Generator) -> Case:
    counts = SIZES[sizes](prompts)
    rates = []
    for share in SHARES:
        weight = (1 - ALIKE) / ALIKE
        of_prompts = generator.beta(share * weight, (1 - share) * weight, (rounds, prompts))
        hits = generator.random((rounds, counts.sum())) < np.repeat(of_prompts, counts, axis=1)
        rates.append(count_covered(hits, counts, share, "shares"))
    return Case("share, prompts with several pairs", prompts, sizes, min(rates), max(rates))


def cover_differences(prompts: int, sizes: str, rounds: int, generator: Generator) -> Case:
    """In half of the prompts, all pairs have the same difference."""
    counts, rates = SIZES[sizes](prompts), []
    for better, worse in CHANGES:
        chances = [better, worse, 1 - better - worse]
        of_prompts = generator.choice([1.0, -1.0, 0.0], (rounds, prompts), p=chances)
        of_pairs = generator.choice([1.0, -1.0, 0.0], (rounds, counts.sum()), p=chances)
        alike = np.repeat(generator.random((rounds, prompts)) < 0.5, counts, axis=1)
        differences = np.where(alike, np.repeat(of_prompts, counts, axis=1), of_pairs)
        rates.append(count_covered(differences, counts, better - worse, "share_differences"))
    return Case("difference of shares", prompts, sizes, min(rates), max(rates))


def cover_means(number: str, prompts: int, sizes: str, rounds: int, generator: Generator) -> Case:
    function, mean, deviation = NUMBERS[number]
    grid = np.linspace(-12, 12, 20_001)
    density = np.exp(-(grid**2) / 2)
    truth = float((function(mean + deviation * grid) * density).sum() / density.sum())
    counts = SIZES[sizes](prompts)
    shared = np.repeat(generator.normal(size=(rounds, prompts)), counts, axis=1) * math.sqrt(ALIKE)
    own = generator.normal(size=(rounds, counts.sum())) * math.sqrt(1 - ALIKE)
    rate = count_covered(function(mean + deviation * (shared + own)), counts, truth, "")
    return Case(f"mean, {number}", prompts, sizes, rate, rate)


def cover_seeds(seeds: int, rounds: int, generator: Generator) -> Case:
    """Of Welch's interval for two trials of a sweep, also with unequal noise."""
    rates = []
    for ratio in (1.0, 4.0):
        first, second = generator.normal(size=(2, rounds, seeds)) * np.array([1.0, ratio])[:, None, None]
        intervals = [find_interval(a.tolist(), b.tolist()) for a, b in zip(first, second, strict=True)]
        rates.append(float(np.mean([ends is not None and ends[0] <= 0 <= ends[1] for ends in intervals])))
    return Case("difference of two trials of a sweep, by seeds", seeds, "seeds each", min(rates), max(rates))


def count_covered(samples: np.ndarray, counts: np.ndarray, truth: float, kind: str) -> float:
    """The share of samples, `(rounds, pairs)`, whose interval contains the truth; none has no interval."""
    columns = {str(number): sample for number, sample in enumerate(samples)}
    prompts = np.repeat(np.arange(len(counts)), counts).tolist()
    intervals = find_intervals(columns, prompts, **({kind: columns.keys()} if kind else {}))
    ends = np.array([(interval["low"], interval["high"]) for interval in intervals.values()])
    return float(np.mean((ends[:, 0] <= truth + 1e-12) & (truth - 1e-12 <= ends[:, 1])))


def list_cases(rounds: int, seed: int = 0) -> Iterator[Case]:
    """All cases: each kind of number, of 3 to 300 prompts (a sweep: of 2 to 10 seeds)."""
    generator = np.random.default_rng(seed)
    for prompts in (1, 3, 10, 30, 100, 300):
        yield cover_independent_shares(prompts)
    for prompts in (3, 10, 30, 100):
        for sizes in list(SIZES)[1:]:
            yield cover_shares(prompts, sizes, rounds, generator)
        for sizes in SIZES:
            yield cover_differences(prompts, sizes, rounds, generator)
            if count_effective(SIZES[sizes](prompts)) >= LEAST_PROMPTS:
                yield from (cover_means(number, prompts, sizes, rounds, generator) for number in NUMBERS)
    for seeds in (2, 3, 10):
        yield cover_seeds(seeds, rounds, generator)


def print_table() -> None:
    """A row for each kind of number, a column for each number of prompts: the lowest and the highest rate."""
    rates: dict[str, dict[int, list[float]]] = {}
    for case in list_cases(4000):
        rates.setdefault(case.kind, {}).setdefault(case.prompts, []).extend([case.lowest, case.highest])
    columns = sorted({prompts for row in rates.values() for prompts in row})
    print(f"| % of intervals that contain the truth | {' | '.join(map(str, columns))} |")
    print(f"|---|{'---:|' * len(columns)}")
    for kind, row in rates.items():
        ends = [
            sorted({f"{100 * rate:.0f}" for rate in (min(row[n]), max(row[n]))}, key=int) if n in row else []
            for n in columns
        ]
        print(f"| {kind} | {' | '.join(' to '.join(cell) for cell in ends)} |")


if __name__ == "__main__":
    print_table()
