"""The result of a search: the interval of a difference, and the sentence that follows from it."""

import pytest

from dpokit.sweep.ranking import Ranked, compare_best_two, find_interval


def make(number: int, *values: float) -> Ranked:
    return Ranked(number, "finished", {"beta": 0.1}, list(values), [], None)


def test_the_interval_equals_welchs_by_hand():
    """Variances 1e-4 and 4e-4 of three values each: standard error 0.01291, 2.94 degrees of freedom, t 4.303."""
    low, high = find_interval([0.61, 0.62, 0.63], [0.64, 0.66, 0.68]) or (0, 0)
    assert (low, high) == pytest.approx((-0.04 - 4.303 * 0.0129099, -0.04 + 4.303 * 0.0129099), abs=1e-5)


@pytest.mark.parametrize(
    ("ranked", "sentence"),
    [
        ([], "No trial has finished."),
        ([make(3, 0.6)], "Trial 3 has the lowest eval_loss, 0.6; no other has finished."),
        ([make(3, 0.6), make(1, 0.7)], "the noise is unknown"),
        ([make(3, 0.61, 0.62, 0.63), make(1, 0.62, 0.63, 0.64)], "within noise"),
        ([make(3, 0.51, 0.52, 0.53), make(1, 0.62, 0.63, 0.64)], "beyond noise"),
        ([make(3, 0.5, 0.5), make(1, 0.6, 0.6)], "equal values, so the noise is unknown"),
        ([make(3, 0.5, 0.5), make(1, 0.6, 0.61)], "beyond noise"),
    ],
)
def test_the_sentence_compares_the_best_two_with_the_noise(ranked, sentence):
    assert sentence in compare_best_two(ranked, "eval_loss")
