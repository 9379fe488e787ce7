"""Metrics as sums and counts over real pairs and tokens, added up over all ranks once per log.

TRL averages the means of batches, and counts rows twice that accelerate repeats to fill up a last batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator


class Sums:
    """The metrics of one mode, training or evaluation, since its last log."""

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = {}  # name: sum, weight
        self._totals: dict[str, float] = {}

    def add(
        self, means: Mapping[str, float], weight: float, *, others: Mapping[str, float] | None = None, real: bool = True
    ) -> None:
        """Adds the means of a batch, each multiplied by its weight.

        Args:
            means: metrics of one batch.
            weight: number of pairs, or of tokens, that most of them are means over.
            others: the weights of the other metrics, by name.
            real: False for a dummy, which adds the names only.
        """
        for name, mean in means.items():
            own_weight = (others or {}).get(name, weight) if real else 0.0
            sums = self._means.setdefault(name, [0.0, 0.0])
            sums[0] += mean * own_weight if real else 0.0
            sums[1] += own_weight

    def count(self, **totals: float) -> None:
        """Adds to the numbers that are logged as totals over all ranks."""
        for name, number in totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + number

    def record(self) -> dict[str, Any]:
        """The sums so far, for JSON."""
        return {"means": self._means, "totals": self._totals}

    def restore(self, record: Mapping[str, Any], *, counts: bool) -> None:
        """Adds the sums of a `record`; with `counts` False only their names, which every rank must have."""
        for name, (total, weight) in record["means"].items():
            sums = self._means.setdefault(name, [0.0, 0.0])
            sums[0] += total if counts else 0.0
            sums[1] += weight if counts else 0.0
        for name, number in record["totals"].items():
            self.count(**{name: number if counts else 0.0})

    def take(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, float]]:
        """Means and totals over all ranks, both empty if nothing was added; starts again from zero. Collective."""
        means, totals = self._means, self._totals
        self._means, self._totals = {}, {}
        if not means:
            return {}, {}
        # MPS has no float64; it runs one process, which sends nothing.
        device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
        table = torch.tensor(
            [*means.values(), *([number, 0.0] for number in totals.values())], dtype=torch.float64, device=device
        )
        added: list[list[float]] = accelerator.reduce(table, reduction="sum").tolist()
        averages = {name: total / max(weight, 1.0) for name, (total, weight) in zip(means, added, strict=False)}
        return averages, {name: row[0] for name, row in zip(totals, added[len(means) :], strict=True)}
