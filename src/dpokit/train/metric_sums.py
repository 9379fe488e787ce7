"""Metrics as sums and counts over real pairs and tokens, added up on all ranks once per log.

TRL averages the averages of batches, and counts the rows twice that accelerate repeats to even out a last batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator


class Sums:
    """What is to be logged of one mode, training or evaluation, since the last log."""

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = {}  # name: sum, weight
        self._totals: dict[str, float] = {}

    def add(
        self, means: Mapping[str, float], over: float, *, others: Mapping[str, float] | None = None, real: bool = True
    ) -> None:
        """A batch's means, each times what it is a mean over.

        Args:
            means: of one batch.
            over: what most of them are means over: the number of pairs, or of tokens.
            others: for the metrics that are means over something else, how much of it there is.
            real: False for a stand-in, which adds the names alone.
        """
        for name, mean in means.items():
            weight = (others or {}).get(name, over) if real else 0.0
            sums = self._means.setdefault(name, [0.0, 0.0])
            sums[0] += mean * weight if real else 0.0
            sums[1] += weight

    def count(self, **totals: float) -> None:
        """Adds to numbers that are logged as totals over all ranks."""
        for name, number in totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + number

    def record(self) -> dict[str, Any]:
        """What was added so far, for JSON."""
        return {"means": self._means, "totals": self._totals}

    def restore(self, record: Mapping[str, Any], *, counts: bool) -> None:
        """Adds what `record` gave; where it does not count here, the names alone, as every rank must have them."""
        for name, (total, weight) in record["means"].items():
            sums = self._means.setdefault(name, [0.0, 0.0])
            sums[0] += total if counts else 0.0
            sums[1] += weight if counts else 0.0
        for name, number in record["totals"].items():
            self.count(**{name: number if counts else 0.0})

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, float]]:
        """Means and totals over all ranks, and begins anew; collective. Both are empty where nothing was added."""
        means, totals = self._means, self._totals
        self._means, self._totals = {}, {}
        if not means:
            return {}, {}
        # MPS has no float64; there is one process then, and nothing to send.
        device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
        table = torch.tensor(
            [*means.values(), *([number, 0.0] for number in totals.values())], dtype=torch.float64, device=device
        )
        added: list[list[float]] = accelerator.reduce(table, reduction="sum").tolist()
        found = {name: total / max(count, 1.0) for name, (total, count) in zip(means, added, strict=False)}
        return found, {name: row[0] for name, row in zip(totals, added[len(means) :], strict=True)}
