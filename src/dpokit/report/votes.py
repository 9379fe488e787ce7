"""Votes of those who talked to base and tuned: counted, with a win rate and its interval. No torch."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHOICES = ("tuned", "base", "tie", "both_bad")
Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class VoteCount:
    """Votes by what was preferred.

    Attributes:
        counts: by CHOICES.
        win_rate: of tuned where one of the two was preferred, `{value, low, high}`; None where none was.
    """

    counts: dict[str, int]
    win_rate: dict[str, float] | None

    @property
    def votes(self) -> int:
        return sum(self.counts.values())


def count_votes(votes: Iterable[Mapping[str, Any]]) -> VoteCount:
    """Counts them, with the Wilson interval of the win rate (Wilson 1927, "Probable Inference, the Law of Succession,
    and Statistical Inference")."""
    seen = Counter(vote.get("vote") for vote in votes if isinstance(vote.get("vote"), str))
    counts = {choice: seen[choice] for choice in CHOICES}
    return VoteCount(counts, find_wilson(counts["tuned"], counts["tuned"] + counts["base"]))


def find_wilson(wins: int, decided: int) -> dict[str, float] | None:
    """`{value, low, high}` of a share, 95 %; None of nothing."""
    if not decided:
        return None
    share, weight = wins / decided, Z * Z / decided
    middle = (share + weight / 2) / (1 + weight)
    reach = Z * math.sqrt(share * (1 - share) / decided + weight / (4 * decided)) / (1 + weight)
    return {"value": share, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}


def is_between(vote: Mapping[str, Any], names: Mapping[str, str], *, run: str | None) -> bool:
    """Whether a vote compared these models: those of the names, or, of a run, its own model with this base.

    A run's model is known by the token of its first start: the path that it was named by may be another one.
    """
    models = vote.get("models")
    if not isinstance(models, dict) or vote.get("run") != run:
        return False
    return models == names if run is None else models.get("base") == names.get("base")


def read_votes(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file of votes; nothing where there is none. A torn last line was never counted.

    Raises: OSError for one that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    votes = []
    for line in lines:
        try:
            vote = json.loads(line)
        except ValueError:
            continue
        if isinstance(vote, dict):
            votes.append(vote)
    return votes
