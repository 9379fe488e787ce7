"""Intervals that hold what they promise, and a test that finds nothing where there is nothing."""

import numpy as np
import pytest

from dpokit.evaluate.intervals import find_intervals, find_p_value


def test_a_mean_is_the_mean_of_all_pairs_not_of_prompts():
    found = find_intervals({"x": np.array([1.0, 2.0, 6.0])}, ["a", "a", "b"])["x"]
    assert found["value"] == 3.0
    assert found["low"] == 1.5  # both prompts drawn are a
    assert found["high"] == 6.0


def test_a_constant_has_no_width_and_what_is_unknown_is_left_out():
    found = find_intervals({"x": np.array([2.0, np.nan, 2.0])}, [0, 1, 2])["x"]
    assert found == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_the_same_seed_gives_the_same_interval():
    column, prompts = {"x": np.random.default_rng(1).normal(size=50)}, list(range(50))
    assert find_intervals(column, prompts, seed=3) == find_intervals(column, prompts, seed=3)
    assert find_intervals(column, prompts, seed=3) != find_intervals(column, prompts, seed=4)


@pytest.mark.parametrize("pairs_of_a_prompt", [1, 5])
def test_an_interval_covers_the_truth_as_often_as_it_says(pairs_of_a_prompt):
    """Also where the pairs of a prompt are alike, which makes a plain bootstrap too sure of itself."""
    chance, covered, rounds = np.random.default_rng(0), 0, 300
    prompts = np.repeat(np.arange(80), pairs_of_a_prompt)
    for _ in range(rounds):
        of_prompt = chance.beta(3, 2, size=80)  # its mean is 0.6
        hits = chance.random(len(prompts)) < of_prompt[prompts]
        found = find_intervals({"x": hits}, prompts.tolist(), draws=400)["x"]
        covered += found["low"] <= 0.6 <= found["high"]
    assert 0.91 <= covered / rounds <= 0.98


def test_two_alike_are_called_different_as_rarely_as_p_says():
    chance, found, rounds = np.random.default_rng(0), 0, 300
    for _ in range(rounds):
        one, other = chance.random((2, 60)) < 0.6
        found += find_p_value(one, other, list(range(60)), flips=500) < 0.05
    assert found / rounds <= 0.08


def test_p_is_counted_over_all_ways_to_swap():
    # Three prompts that all differ the same way: 2 of the 8 ways to swap are as extreme.
    p = find_p_value(np.ones(3), np.zeros(3), [0, 1, 2])
    assert p == pytest.approx(0.25, abs=0.02)
    assert find_p_value(np.ones(20), np.zeros(20), list(range(20))) < 0.001
    assert find_p_value(np.ones(20), np.ones(20), list(range(20))) == 1.0
