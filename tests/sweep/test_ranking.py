"""What a search says at its end: an interval that is right, and a sentence that follows from it."""

import pytest

from dpokit.sweep.ranking import Ranked, find_interval, judge


def make(number: int, *values: float) -> Ranked:
    return Ranked(number, "finished", {"beta": 0.1}, list(values), [], None)


def test_the_interval_is_welchs():
    """By hand: variances 1e-4 and 4e-4 of three values each, so an error of 0.01291, freedom of 2.94, t of 4.303."""
    low, high = find_interval([0.61, 0.62, 0.63], [0.64, 0.66, 0.68])
    assert (low, high) == pytest.approx((-0.04 - 4.303 * 0.0129099, -0.04 + 4.303 * 0.0129099), abs=1e-5)


@pytest.mark.parametrize(
    ("ranked", "words"),
    [
        ([], "No trial has finished."),
        ([make(3, 0.6)], "Trial 3 has the lowest eval_loss, 0.6; no other has finished."),
        ([make(3, 0.6), make(1, 0.7)], "nobody knows whether that is noise"),
        ([make(3, 0.61, 0.62, 0.63), make(1, 0.62, 0.63, 0.64)], "within noise"),
        ([make(3, 0.51, 0.52, 0.53), make(1, 0.62, 0.63, 0.64)], "beyond noise"),
        ([make(3, 0.5, 0.5), make(1, 0.6, 0.6)], "beyond noise"),
    ],
)
def test_the_sentence_says_whether_the_best_is_better_than_the_second_beyond_noise(ranked, words):
    assert words in judge(ranked, "eval_loss")
