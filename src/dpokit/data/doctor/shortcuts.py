"""Measures how well an answer's look alone tells whether it is preferred: a logistic model and cross-validation.

A model of preferences that sees only the difference of two answers' features is that of Bradley and Terry (1952). Its
accuracy on pairs that it was not fitted to says how much of the preference could be learnt without reading. No torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpokit.data.doctor.texts import mask

FOLDS = 5
MOST_PAIRS = 50_000  # for one accuracy; further pairs change it by less than half a point
MOST_OPENINGS = 50
LEAST_PAIRS = 50
LEAST_ACCURACY = 0.6  # of the pairs that a shortcut decides; below, it is no finding
LEAST_DECIDED = 0.05  # of the pairs
RIDGE = 1.0
STEPS = 12  # of Newton's method

_ITEM = re.compile(r"^[ \t]*(?:[-*\u2022]|\d{1,3}[.)])[ \t]", re.M)
_HEADING = re.compile(r"^#{1,6} ", re.M)
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|afraid|unable|not able|not comfortable|not going to)|i (?:can(?:'|no)t|won't|will not|"
    r"could not|couldn't|must decline|apologi[sz]e)|as an ai\b|es tut mir leid|ich kann (?:dir|ihnen)? ?nicht|"
    r"je suis d\u00e9sol|je ne peux pas|lo siento|no puedo|desculpe|n\u00e3o posso)"
    r"|\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u6211\u65e0\u6cd5|\u7533\u3057\u8a33",
    re.I,
)
_REFUSAL_LETTERS = 200  # an answer that refuses does so at its start
_NOT_LATIN = re.compile(r"[\u0370-\u1fff\u2c80-\ua71f\ua840-\ud7ff\uf900-\ufdff\ufe70-\ufefe\U00020000-\U0003ffff]")
_ACCENTED = re.compile(r"[\u00c0-\u024f]")
_EMOJI = re.compile(r"[\u2600-\u27bf\U0001f300-\U0001faff]")
_MAY_BE_SECRET = re.compile(r"[\d@=:]")
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'"})

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "length": ("letters",),
    "refusal": ("refuses",),
    "markup": ("list items", "headings", "bold texts", "code blocks", "tables", "lines"),
    "punctuation": ("!", "?", ",", ":", "...", ";", "quotes", "emoji", "ends a sentence", "ends with ?"),
    "script": ("letters not Latin", "letters with accents", "other script than the prompt"),
}
FEATURES = tuple(name for names in FAMILIES.values() for name in names)


def read_features(text: str, prompt_scripts: tuple[float, float]) -> list[float]:
    """Returns the numbers of an answer, in the order of FEATURES; counts are logarithms."""
    tail = text.rstrip()[-1:]
    scripts = read_scripts(text)
    has_lines = "\n" in text
    counts = [
        len(text),
        len(_ITEM.findall(text)),
        len(_HEADING.findall(text)) if "#" in text else 0,
        text.count("**") // 2,
        text.count("```") // 2,
        text.count("|\n"),
        text.count("\n") if has_lines else 0,
        *(text.count(mark) for mark in ("!", "?", ",", ":", "...", ";", '"')),
        0 if text.isascii() else len(_EMOJI.findall(text)),
    ]
    letters, *others = map(math.log1p, counts)
    other_script = sum(abs(share - other) for share, other in zip(scripts, prompt_scripts, strict=True))
    ends = [float(tail in ".!?\u3002\uff01\uff1f" and tail != ""), float(tail in ("?", "\uff1f"))]
    return [letters, float(begins_as_refusal(text)), *others, *ends, *scripts, other_script]


def read_scripts(text: str) -> tuple[float, float]:
    """Returns the shares of letters that are not Latin, and of Latin ones with an accent."""
    if text.isascii():
        return 0.0, 0.0
    return len(_NOT_LATIN.findall(text)) / len(text), len(_ACCENTED.findall(text)) / len(text)


def begins_as_refusal(text: str) -> bool:
    """Whether an answer begins with the words by which models refuse, in one of six languages."""
    return _REFUSAL.search(text[:_REFUSAL_LETTERS].translate(_QUOTES)) is not None


def read_opening(text: str) -> str:
    """Returns the first two words of an answer in lower case, at most 24 letters, without personal data."""
    opening = " ".join(text[:200].split()[:2])
    # A part of a key or its small letters would not look like a key, so it is masked before.
    return (mask(opening) if _MAY_BE_SECRET.search(opening) else opening).lower()[:24]


@dataclass(frozen=True)
class Accuracy:
    """How often a shortcut chooses the preferred answer.

    Attributes:
        value: of all pairs; a pair that the shortcut does not decide counts as half.
        pairs: that were measured.
        decided: of them, those that the shortcut decides.
        right: of these, those whose preferred answer it chooses.
    """

    value: float
    pairs: int
    decided: int
    right: int

    @property
    def where_decided(self) -> float:
        """The accuracy on the decided pairs; 0.5 without any."""
        return self.right / self.decided if self.decided else 0.5

    @property
    def is_certain(self) -> bool:
        """Whether it decides enough pairs, and the lower end of its 95 % interval is above LEAST_ACCURACY.

        The half width of the interval is that of an accuracy of 0.5, which is the widest.
        """
        if self.pairs < LEAST_PAIRS or self.decided < LEAST_DECIDED * self.pairs or not self.decided:
            return False
        return self.where_decided - 0.98 / math.sqrt(self.decided) > LEAST_ACCURACY


def measure_scores(scores: np.ndarray) -> Accuracy:
    """Returns the accuracy of scores, (pairs,): positive if the preferred answer has the higher one, 0 for a tie."""
    right, wrong = int((scores > 0).sum()), int((scores < 0).sum())
    pairs = len(scores)
    value = (right + (pairs - right - wrong) / 2) / pairs if pairs else 0.5
    return Accuracy(value, pairs, right + wrong, right)


def cross_validate(differences: np.ndarray, groups: np.ndarray) -> Accuracy:
    """Returns the accuracy of a logistic model on pairs that it was not fitted to.

    Args:
        differences: features of the preferred answer minus those of the other one, (pairs, features).
        groups: a number for each pair, (pairs,). Pairs of one number, as those of one prompt, are in one fold, unless
            more than half of all pairs would be in it: then pairs are dealt out one by one.
    """
    scores = np.zeros(len(differences))
    folds = (groups % np.uint64(FOLDS)).astype(int)
    if 2 * np.bincount(folds, minlength=1).max() > len(folds):
        folds = np.arange(len(folds)) % FOLDS
    for fold in range(FOLDS):
        is_held_out = folds == fold
        if is_held_out.any() and not is_held_out.all():
            scores[is_held_out] = differences[is_held_out] @ fit_logistic(differences[~is_held_out])
    return measure_scores(np.where(np.abs(scores) < 1e-9, 0, scores))


def fit_logistic(differences: np.ndarray) -> np.ndarray:
    """Returns the weights, (features,), for which the sigmoid of `differences @ weights` is as near to 1 as it can be.

    By Newton's method, with a penalty of RIDGE / 2 on the squared weights of features in units of their size.
    """
    sizes = np.sqrt(np.einsum("ij,ij->j", differences, differences) / max(len(differences), 1))
    scaled = differences / np.where(sizes > 0, sizes, 1).astype(differences.dtype)
    weights = np.zeros(differences.shape[1], differences.dtype)
    for _ in range(STEPS):
        wrong = 1 / (1 + np.exp(np.clip(scaled @ weights, -30, 30)))
        gradient = scaled.T @ wrong - RIDGE * weights
        curvature = (scaled * (wrong * (1 - wrong))[:, None]).T @ scaled
        step = np.linalg.solve(curvature + RIDGE * np.eye(len(weights)), gradient)
        weights += (step * min(1.0, 5 / max(np.abs(step).max(), 1e-9))).astype(weights.dtype)
        if np.abs(step).max() < 1e-3:
            break
    weights[sizes == 0] = 0
    return weights / np.where(sizes > 0, sizes, 1)


def measure_shortcuts(
    differences: np.ndarray, openings: tuple[np.ndarray, np.ndarray], groups: np.ndarray
) -> dict[str, Accuracy]:
    """Returns the accuracy of each family of features, of the first words, and of all together.

    Args:
        differences: of the numbers of `read_features`, (pairs, FEATURES).
        openings: the number of the opening of the preferred and of the other answer; -1 for a rare one.
        groups: a hash of each pair's prompt.
    """
    if len(differences) > MOST_PAIRS:
        picked = np.linspace(0, len(differences) - 1, MOST_PAIRS).astype(int)
        differences, groups = differences[picked], groups[picked]
        openings = (openings[0][picked], openings[1][picked])
    columns = {family: differences[:, [FEATURES.index(name) for name in names]] for family, names in FAMILIES.items()}
    columns["opening"] = _count_openings(*openings)
    columns["all_shortcuts"] = np.concatenate(list(columns.values()), axis=1)
    return {family: cross_validate(values, groups) for family, values in columns.items()}


def _count_openings(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Returns 1 in the column of the preferred answer's opening and -1 in that of the other one."""
    size = int(max(chosen.max(initial=-1), rejected.max(initial=-1))) + 1
    table = np.zeros((len(chosen), max(size, 1)), np.float32)
    rows = np.arange(len(chosen))
    np.add.at(table, (rows[chosen >= 0], chosen[chosen >= 0]), 1)
    np.add.at(table, (rows[rejected >= 0], rejected[rejected >= 0]), -1)
    return table


def rank_openings(texts: Sequence[str], chosen: np.ndarray, rejected: np.ndarray) -> list[tuple[str, int, int]]:
    """Returns the openings with their numbers of preferred and of other answers, those furthest from even first."""
    rows = []
    for number, text in enumerate(texts):
        wins, losses = int((chosen == number).sum()), int((rejected == number).sum())
        rows.append((text, wins, losses))
    return sorted(rows, key=lambda row: -abs(row[1] - row[2]))
