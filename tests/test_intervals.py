"""Intervals of shares, means and differences: values by hand, coverage of few and extreme counts, and p-values."""

import math

import numpy as np
import pytest
from interval_coverage import (
    NUMBERS,
    SIZES,
    cover_differences,
    cover_independent_shares,
    cover_means,
    cover_seeds,
    cover_shares,
)

from dpokit.evaluate.measures import count_prompts, decide_verdict
from dpokit.intervals import LEAST_PROMPTS, find_intervals, find_p_value, find_t, find_wilson

ROUNDS = 250  # a rate of 95 % is then within 2.8 points with a probability of 95 %
NOISE = 0.04
# Student's t, 97.5 % quantile, from a printed table.
T_97_5 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 20: 2.086, 30: 2.042, 120: 1.980}


def find(values, prompts=None, **kinds) -> dict:
    names = {kind: ["x"] for kind in kinds}
    return find_intervals({"x": np.array(values)}, list(range(len(values))) if prompts is None else prompts, **names)[
        "x"
    ]


def test_quantiles_of_t_equal_those_of_a_printed_table():
    assert {freedom: find_t(freedom) for freedom in T_97_5} == pytest.approx(T_97_5, rel=2e-3)
    assert [find_t(freedom) for freedom in (-1, 0, 0.5, 1.9)] == [find_t(1)] * 4


@pytest.mark.parametrize(
    ("hits", "pairs", "low", "high"),
    # By the formula, on paper: no hits reach z^2 / (n + z^2).
    [(0, 1, 0.0, 0.7935), (0, 3, 0.0, 0.5615), (3, 3, 0.4385, 1.0), (1, 3, 0.0615, 0.7923), (0, 300, 0.0, 0.0126)],
)
def test_a_share_of_few_or_extreme_counts_has_width(hits, pairs, low, high):
    interval = find([at < hits for at in range(pairs)], shares=True)
    assert interval == pytest.approx({"value": hits / pairs, "low": low, "high": high}, abs=5e-5)
    assert interval == pytest.approx(find_wilson(hits, pairs))


def test_a_mean_is_over_pairs_and_its_interval_over_prompts():
    """Student's t by hand: 10 prompts of equal size have one variance, and the pairs of a prompt add nothing to it."""
    values = np.arange(10.0)
    reach = 2.262 * values.std(ddof=1) / math.sqrt(10)
    expected = pytest.approx({"value": 4.5, "low": 4.5 - reach, "high": 4.5 + reach}, rel=1e-3)
    assert find(values) == expected
    assert find(np.repeat(values, 7), np.repeat(np.arange(10), 7).tolist()) == expected
    assert find([0.0, 0.0, 6.0], ["a", "a", "b"])["value"] == 2.0


@pytest.mark.parametrize(
    ("values", "prompts"),
    [
        (range(9), None),
        (range(90), [at % 9 for at in range(90)]),
        ([0.1 + 0.2] * 40, None),
        ([7.0], None),
        ([1.0] * 9 + [math.nan] * 5, None),
        (range(30), ["one"] * 30),
        (range(309), [0] * 300 + list(range(1, 10))),
    ],
    ids=["9 prompts", "9 prompts of 10 pairs", "all equal", "one pair", "9 numbers", "one prompt", "mostly one prompt"],
)
def test_a_mean_without_spread_or_prompts_has_no_interval(values, prompts):
    values = np.array(list(values), dtype=float)
    assert find(values, prompts) == {"value": pytest.approx(np.nanmean(values))}


def test_nan_is_left_out_and_nothing_but_nan_is_no_number():
    values = np.arange(30.0)
    values[::3] = math.nan
    assert find(values, [at // 2 for at in range(30)])["value"] == np.nanmean(values)
    assert find([math.nan] * 3) == find([math.nan] * 3, shares=True) == {"value": None}
    assert find_p_value(np.full(3, math.nan), np.ones(3), [0, 1, 2]) == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [{}, {"shares": True}, {"share_differences": True}])
def test_an_infinite_number_has_no_mean(kind):
    values = np.append(np.arange(20.0), [math.inf, math.nan])
    assert find(values, **kind) == find(-values, **kind) == {"value": None}
    assert find_p_value(values, values, range(22)) == 1.0


def test_the_interval_of_a_loss_is_not_below_0():
    values = [0.0] * 19 + [1.0]
    assert find(values)["low"] < 0.0
    assert find(values, nonnegative=True) == find(values) | {"low": 0.0}
    assert find(values[:3], nonnegative=True) == find([math.nan], nonnegative=True) | {"value": 0.0}


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.0] * 5, [1.0] * 5, [-1.0] * 300, [0.0] * 300])
def test_equal_differences_of_shares_have_an_interval_within_1(values):
    interval = find(values, share_differences=True)
    assert -1.0 <= interval["low"] <= values[0] <= interval["high"] <= 1.0
    assert interval["high"] - interval["low"] > 1 / len(values)


def test_the_difference_of_paired_shares_is_bonett_and_prices():
    """By hand: 20 of 100 pairs got better and 10 worse, so p = 21/102 and 11/102; theirs uses the normal quantile."""
    interval = find([1.0] * 20 + [-1.0] * 10 + [0.0] * 70, share_differences=True)
    better, worse = 21 / 102, 11 / 102
    reach = find_t(101) * math.sqrt((better + worse - (better - worse) ** 2) / 102)
    assert (interval["low"], interval["high"]) == pytest.approx((better - worse - reach, better - worse + reach))


@pytest.mark.parametrize("mixture", [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
def test_prompts_with_equal_shares_count_as_one_pair_each(mixture):
    """Also if their variance is not exactly 0, because a share such as 1/3 is rounded."""
    size = len(mixture)
    interval = find(mixture * 10, np.repeat(np.arange(10), size).tolist(), shares=True)
    assert interval == pytest.approx(find_wilson(10 / size, 10))


def test_one_prompt_with_many_pairs_counts_as_one_pair():
    alone = find([1.0] * 50 + [0.0] * 50, ["a"] * 100, shares=True)
    assert alone["high"] - alone["low"] > 0.7
    one_of_many = find([1.0] * 100 + [0.0, 1.0] * 10, [0] * 100 + list(range(1, 21)), shares=True)
    assert one_of_many["low"] < 0.7 < one_of_many["value"]


# -- coverage, with more rounds in docs/evaluate.md --------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "least"), [(1, 0.79), (3, 0.85), (10, 0.90), (30, 0.93), (100, 0.92), (300, 0.94)])
def test_shares_of_independent_pairs_are_covered(prompts, least):
    case = cover_independent_shares(prompts)
    assert least <= case.lowest
    assert case.highest < 1.0 or prompts < 10


@pytest.mark.parametrize("sizes", list(SIZES)[1:])
@pytest.mark.parametrize("prompts", [3, 10, 40])
def test_shares_of_prompts_with_several_pairs_are_covered(prompts, sizes):
    case = cover_shares(prompts, sizes, ROUNDS, np.random.default_rng(0))
    assert case.lowest >= 0.91 - NOISE


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("prompts", [3, 10, 40])
def test_differences_of_shares_are_covered(prompts, sizes):
    case = cover_differences(prompts, sizes, ROUNDS, np.random.default_rng(0))
    assert case.lowest >= 0.93 - NOISE


@pytest.mark.parametrize(("sizes", "prompts"), [("1 pair each", 10), ("5 pairs each", 10), ("1 to 8 pairs each", 22)])
@pytest.mark.parametrize(
    ("number", "least"),
    list(zip(NUMBERS, (0.94, 0.92, 0.86, 0.83), strict=True)),
)
def test_means_are_covered_less_if_skewed(number, least, sizes, prompts):
    """Of as few prompts as have an interval."""
    case = cover_means(number, prompts, sizes, ROUNDS, np.random.default_rng(0))
    assert case.lowest >= least - NOISE


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_differences_of_trials_are_covered(seeds):
    assert cover_seeds(seeds, ROUNDS, np.random.default_rng(0)).lowest >= 0.94 - NOISE


@pytest.mark.parametrize("prompts", [LEAST_PROMPTS, 30])
@pytest.mark.parametrize("deviation", [0.05, 2.0])
def test_noise_is_seldom_called_better(prompts, deviation):
    """Margins without a direction: 'better' is an error. So is 'worse', for two reasons, if all margins are small."""
    generator, verdicts = np.random.default_rng(0), []
    for _ in range(ROUNDS):
        margin = generator.normal(0, deviation, prompts)
        columns = {"loss": np.logaddexp(0, -margin), "accuracy": margin > 0}
        record = {
            "data": {"pairs": prompts, **count_prompts(range(prompts))},
            "tuned": find_intervals(columns, range(prompts), shares=["accuracy"]),
            "difference": {"logps_per_token/chosen": {"value": 0.0}},
        }
        verdicts.append(decide_verdict(record)["better"])
    assert verdicts.count(True) / ROUNDS <= 0.04
    assert deviation > 1 or verdicts.count(False) / ROUNDS <= 0.05 + NOISE


# -- p-values ----------------------------------------------------------------------------------------------------------


def test_equal_distributions_have_few_small_p_values():
    generator, small, rounds = np.random.default_rng(0), 0, 300
    for _ in range(rounds):
        first, second = generator.random((2, 60)) < 0.6
        small += find_p_value(first, second, list(range(60)), flips=500) < 0.05
    assert small / rounds <= 0.08


def test_p_equals_the_share_of_swaps_as_extreme():
    # Three prompts with the same difference: 2 of the 8 ways to swap are as extreme.
    p = find_p_value(np.ones(3), np.zeros(3), [0, 1, 2])
    assert p == pytest.approx(0.25, abs=0.02)
    assert find_p_value(np.ones(20), np.zeros(20), list(range(20))) < 0.001
    assert find_p_value(np.ones(20), np.ones(20), list(range(20))) == 1.0
