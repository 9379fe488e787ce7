"""95 % intervals of shares, means and paired differences, also of few prompts, and a paired test. No torch.

Pairs of one prompt are dependent, so a prompt counts as one observation. docs/evaluate.md has the measured coverage.
"""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval
# A mean of effectively fewer prompts (`count_effective`) has no interval, and there is no verdict. In 1,500 simulated
# samples of losses whose margins have mean 2 and deviation 6, Student's interval contained the truth in 71 % with 3
# prompts, 78 % with 5, 86 % with 10. With 1,000 pairs of one prompt and 9 single ones, it did in 6 %.
LEAST_PROMPTS = 10
FLIPS = 10_000
CHUNK = 500  # flips at a time: bounds the memory if there are many prompts
Value = dict[str, Any]


def find_intervals(
    columns: Mapping[str, np.ndarray],
    prompts: Sequence[Hashable],
    *,
    shares: Collection[str] = (),
    share_differences: Collection[str] = (),
    nonnegative: Collection[str] = (),
) -> dict[str, Value]:
    """Returns `{name: {value, low, high}}`: means of pairs with their 95 % intervals.

    Without an interval, `low` and `high` are missing: of a mean of effectively fewer than LEAST_PROMPTS prompts, or
    one whose prompts all have the same value. A column without numbers, or with an infinite one, has the value None.

    Args:
        columns: a number for each pair, `(pairs,)` each; booleans count as 0 and 1. Means ignore NaN.
        prompts: the prompt of each pair.
        shares: names of the columns with values from 0 to 1: Wilson's interval, see `_find_share`.
        share_differences: names of the columns with a difference of two shares, from -1 to 1: see `_find_difference`.
        nonnegative: names of the columns whose true means cannot be below 0, such as losses: nor are their intervals.
    """
    numbers: dict[Hashable, int] = {}
    at = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=int)
    intervals = {
        name: _find_interval(
            np.asarray(column, dtype=float),
            at,
            find_ends=_find_share if name in shares else _find_difference if name in share_differences else _find_mean,
        )
        for name, column in columns.items()
    }
    for interval in (intervals[name] for name in nonnegative if "low" in intervals.get(name, {})):
        interval["low"] = max(0.0, interval["low"])
    return intervals


def _find_interval(column: np.ndarray, prompts: np.ndarray, *, find_ends: Any) -> Value:
    is_number = ~np.isnan(column)
    if not is_number.any() or np.isinf(column).any():
        return {"value": None}
    counts = np.bincount(prompts[is_number])
    sums = np.bincount(prompts[is_number], weights=column[is_number])[counts > 0]
    counts = counts[counts > 0].astype(float)
    value = float(sums.sum() / counts.sum())
    ends = find_ends(sums, counts)
    return {"value": value} if ends is None else {"value": value, "low": ends[0], "high": ends[1]}


def _find_share(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Wilson's interval for the number of independent pairs that would have the same variance.

    Korn and Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data", Survey Methodology 24 (1998), with Wilson's interval instead of Clopper and Pearson's. Where all
    prompts agree, their variance is unknown, and each counts as one pair.
    """
    pairs, share = counts.sum(), sums.sum() / counts.sum()
    independent = pairs
    if len(counts) < pairs:
        effective = count_effective(counts)
        variance, t = _find_variance(sums, counts), find_t(effective - 1)
        binomial = share * (1 - share)
        is_known = variance > 1e-9 * binomial / pairs  # not 0 but for rounding
        independent = min(pairs, binomial / variance * (Z / t) ** 2) if is_known else effective
    return _wilson(share, max(independent, 1e-9))


def _find_difference(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """A t interval after a prompt with the difference 1 and one with -1 were added.

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data",
    Journal of Educational and Behavioral Statistics 37 (2012). An added prompt has as many pairs as the mean prompt.
    """
    size = counts.mean()
    sums, all_counts = np.append(sums, [size, -size]), np.append(counts, [size, size])
    middle = sums.sum() / all_counts.sum()
    # The added prompts stand for the correction of a sample's variance by K / (K - 1).
    variance = _find_variance(sums, all_counts) * (len(sums) - 1) / len(sums)
    reach = find_t(count_effective(counts) + 1) * math.sqrt(variance)
    return max(-1.0, float(middle - reach)), min(1.0, float(middle + reach))


def _find_mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    """Student's t interval with the variance between prompts; None if it has no width or too few prompts."""
    if count_effective(counts) < LEAST_PROMPTS:
        return None
    middle = float(sums.sum() / counts.sum())
    reach = find_t(count_effective(counts) - 1) * math.sqrt(_find_variance(sums, counts))
    # Sums of equal values may differ in their last bits.
    return None if reach <= 1e-9 * abs(middle) else (middle - reach, middle + reach)


def _find_variance(sums: np.ndarray, counts: np.ndarray) -> float:
    """The variance of the mean of all pairs if prompts are drawn at random; 0 for one prompt.

    Cochran, Sampling Techniques, 1977, section 6.4: the variance of a ratio of two sums.
    """
    number, residuals = len(counts), sums - sums.sum() / counts.sum() * counts
    return float((residuals**2).sum() / counts.sum() ** 2 * number / max(number - 1, 1))


def count_effective(counts: np.ndarray) -> float:
    """The number of prompts of equal size that are as good as prompts with these numbers of pairs, `(prompts,)`.

    Kish, Survey Sampling, 1965, section 11.7.
    """
    return float(counts.sum() ** 2 / (counts**2).sum())


def find_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, within 0.2 %; degrees of freedom are rounded down, to 1 at least.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, formula 26.7.5; exact for 1 and 2.
    """
    whole = max(1, int(freedom + 1e-9))
    if whole == 1:
        return math.tan(math.pi * 0.475)
    if whole == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92_160,
    )
    return Z + sum(term / whole**power for power, term in enumerate(terms, start=1))


def find_wilson(wins: float, decided: int) -> dict[str, float] | None:
    """Returns the share of wins with its 95 % Wilson interval, `{value, low, high}`; None if `decided` is 0.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if not decided:
        return None
    low, high = _wilson(wins / decided, decided)
    return {"value": wins / decided, "low": low, "high": high}


def _wilson(share: float, number: float) -> tuple[float, float]:
    weight = Z * Z / number
    middle = (share + weight / 2) / (1 + weight)
    reach = Z * math.sqrt(share * (1 - share) / number + weight / (4 * number)) / (1 + weight)
    return max(0.0, float(middle - reach)), min(1.0, float(middle + reach))


def find_p_value(
    first: np.ndarray, second: np.ndarray, prompts: Sequence[Hashable], *, seed: int = 0, flips: int = FLIPS
) -> float:
    """Returns the two-sided p-value of the difference of two paired means.

    A paired randomisation test (Fisher; Good, Permutation Tests, 2000): at random, all pairs of a prompt swap their two
    numbers.
    """
    numbers: dict[Hashable, int] = {}
    at = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=int)
    both = np.isfinite(first) & np.isfinite(second)
    of_pairs = np.subtract(first, second, out=np.zeros(len(at)), where=both, dtype=float)
    differences = np.bincount(at, weights=of_pairs)
    generator = np.random.default_rng(seed)
    observed, as_large = abs(differences.sum()) - 1e-9, 0
    for start in range(0, flips, CHUNK):
        signs = generator.choice([-1.0, 1.0], size=(min(CHUNK, flips - start), len(differences)))
        as_large += int((np.abs(signs @ differences) >= observed).sum())
    return (as_large + 1) / (flips + 1)
