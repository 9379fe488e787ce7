"""The coverage of bootstrap intervals, and the p-values of the paired test."""

import numpy as np
import pytest

from dpokit.evaluate.intervals import find_intervals, find_p_value


def test_a_mean_is_over_pairs_not_over_prompts():
    interval = find_intervals({"x": np.array([1.0, 2.0, 6.0])}, ["a", "a", "b"])["x"]
    assert interval["value"] == 3.0
    assert interval["low"] == 1.5  # the draw of a and a
    assert interval["high"] == 6.0


def test_a_constant_has_no_width_and_nan_is_left_out():
    interval = find_intervals({"x": np.array([2.0, np.nan, 2.0])}, [0, 1, 2])["x"]
    assert interval == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_the_same_seed_gives_the_same_interval():
    column, prompts = {"x": np.random.default_rng(1).normal(size=50)}, list(range(50))
    assert find_intervals(column, prompts, seed=3) == find_intervals(column, prompts, seed=3)
    assert find_intervals(column, prompts, seed=3) != find_intervals(column, prompts, seed=4)


@pytest.mark.parametrize("pairs_of_a_prompt", [1, 5])
def test_intervals_cover_the_true_mean_at_the_nominal_rate(pairs_of_a_prompt):
    """Also if the pairs of a prompt are similar, for which a bootstrap over pairs gives too narrow intervals."""
    generator, covered, rounds = np.random.default_rng(0), 0, 300
    prompts = np.repeat(np.arange(80), pairs_of_a_prompt)
    for _ in range(rounds):
        rates = generator.beta(3, 2, size=80)  # of each prompt; the mean is 0.6
        hits = generator.random(len(prompts)) < rates[prompts]
        interval = find_intervals({"x": hits}, prompts.tolist(), draws=400)["x"]
        covered += interval["low"] <= 0.6 <= interval["high"]
    assert 0.91 <= covered / rounds <= 0.98


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
