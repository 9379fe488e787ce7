"""Chooses pairs among several answers to one prompt, by their scores. No torch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from dpokit.data.formats import MARGIN, Row
from dpokit.data.messages import UnusableError
from dpokit.data.published import Ranking


@dataclass(frozen=True)
class PairChoice:
    """The pairs that a row of several answers gives.

    Attributes:
        ranked: "best_worst" and "random" give one pair a row; "adjacent" gives each answer with
            those of the next lower score, and "all" each two answers.
        min_score_gap: pairs whose scores differ by less are left out.
    """

    ranked: str = "best_worst"
    min_score_gap: float = 0.0

    @property
    def is_several(self) -> bool:
        """Whether a row may give several pairs."""
        return self.ranked in ("adjacent", "all")

    def build_rows(self, ranking: Ranking) -> list[Row]:
        """Returns a row of prompt, chosen, rejected and margin, the difference of the scores, for each pair.

        The choice of "random" depends on the answers alone, so that it is the same in each run and for each seed.

        Raises: UnusableError: fewer than two answers, or no two whose scores differ enough.
        """
        answers = [(answer, score) for answer, score in ranking.answers if answer]
        if len(answers) < 2:
            raise UnusableError("one_answer")
        ordered = sorted(answers, key=lambda entry: -entry[1])
        if ordered[0][1] == ordered[-1][1]:
            raise UnusableError("tie")
        couples = [
            (chosen, rejected, high - low)
            for (chosen, high), (rejected, low) in self._list_couples(ordered)
            if high > low and high - low >= self.min_score_gap
        ]
        if not couples:
            raise UnusableError("small_gap")
        if self.ranked == "random":
            couples = [random.Random(repr(ranking.answers)).choice(couples)]
        prompt = {} if ranking.prompt is None else {"prompt": ranking.prompt}
        return [
            {**prompt, "chosen": chosen, "rejected": rejected, MARGIN: margin} for chosen, rejected, margin in couples
        ]

    def _list_couples(self, ordered: Sequence[tuple[Any, float]]) -> list[tuple[tuple[Any, float], tuple[Any, float]]]:
        if self.ranked == "best_worst":
            return [(ordered[0], min(ordered, key=lambda entry: entry[1]))]
        couples = list(combinations(ordered, 2))
        if self.ranked != "adjacent":
            return couples
        next_lower = dict(pairwise(dict.fromkeys(score for _, score in ordered)))
        return [(better, worse) for better, worse in couples if next_lower.get(better[1]) == worse[1]]
