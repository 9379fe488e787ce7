"""Counts the votes of people who compared base and tuned, with a win rate and its interval. No torch."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpokit.intervals import find_wilson

CHOICES = ("tuned", "base", "tie", "both_bad")


@dataclass(frozen=True)
class VoteCount:
    """Number of votes for each choice.

    Attributes:
        counts: one for each of CHOICES.
        win_rate: share of tuned in the votes for tuned or base, `{value, low, high}`; None without such votes.
    """

    counts: dict[str, int]
    win_rate: dict[str, float] | None

    @property
    def votes(self) -> int:
        return sum(self.counts.values())


def count_votes(votes: Iterable[Mapping[str, Any]]) -> VoteCount:
    """Counts votes, with the Wilson interval of the win rate."""
    totals = Counter(vote.get("vote") for vote in votes if isinstance(vote.get("vote"), str))
    counts = {choice: totals[choice] for choice in CHOICES}
    return VoteCount(counts, find_wilson(counts["tuned"], counts["tuned"] + counts["base"]))


def is_between(vote: Mapping[str, Any], names: Mapping[str, str], *, run: str | None) -> bool:
    """Whether a vote compared these models: both of `names`, or for a run its own model and the base in `names`.

    A run is identified by the token of its first start, because the path in the vote may differ.
    """
    models = vote.get("models")
    if not isinstance(models, dict) or vote.get("run") != run:
        return False
    return models == names if run is None else models.get("base") == names.get("base")


def read_votes(path: Path) -> list[dict[str, Any]]:
    """The votes in a file, without lines that are not JSON, such as a torn last line; [] without the file.

    Raises: OSError: the file cannot be read.
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
