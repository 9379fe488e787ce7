"""Metrics as sums and counts over real pairs and tokens, added up over all ranks once per log.

TRL averages the means of batches, and counts rows twice that accelerate repeats to fill up a last batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

MOST_WAITING = 1000  # batches whose means stay on the device, if nothing is logged for long


class Sums:
    """The metrics of one mode, training or evaluation, since its last log."""

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = {}  # name: sum, weight
        self._totals: dict[str, float] = {}
        # Of each batch since the last count: names, means `(names,)` in float64 on their device, and weights.
        self._waiting: list[tuple[list[str], torch.Tensor, list[float]]] = []

    def add(
        self,
        means: Mapping[str, float | torch.Tensor],
        weight: float,
        *,
        others: Mapping[str, float] | None = None,
        real: bool = True,
    ) -> None:
        """Adds the means of a batch, each multiplied by its weight.

        Tensors stay on their device until the sums are read, so that a step does not wait for them.

        Args:
            means: metrics of one batch.
            weight: number of pairs, or of tokens, that most of them are means over.
            others: the weights of the other metrics, by name.
            real: False for a dummy, which adds the names only.
        """
        weights = {name: (others or {}).get(name, weight) if real else 0.0 for name in means}
        tensors = {name: mean for name, mean in means.items() if isinstance(mean, torch.Tensor)}
        for name, mean in means.items():
            self._add_one(name, 0.0 if name in tensors else float(mean), 0.0 if name in tensors else weights[name])
        if tensors:
            values = torch.stack([_widen(mean) for mean in tensors.values()])
            self._waiting.append((list(tensors), values, [weights[name] for name in tensors]))
            if len(self._waiting) >= MOST_WAITING:
                self._count_waiting()

    def _add_one(self, name: str, mean: float, weight: float) -> None:
        sums = self._means.setdefault(name, [0.0, 0.0])
        sums[0] += mean * weight if weight else 0.0
        sums[1] += weight

    def _count_waiting(self) -> None:
        """Adds the means that are on a device: one wait."""
        if self._waiting:
            values = iter(torch.cat([values for _, values, _ in self._waiting]).tolist())
            for names, _, weights in self._waiting:
                for name, weight in zip(names, weights, strict=True):
                    self._add_one(name, next(values), weight)
            self._waiting = []

    def count(self, **totals: float) -> None:
        """Adds to the numbers that are logged as totals over all ranks."""
        for name, number in totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + number

    def record(self) -> dict[str, Any]:
        """The sums so far, for JSON."""
        self._count_waiting()
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
        self._count_waiting()
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


def _widen(mean: torch.Tensor) -> torch.Tensor:
    """The mean in float64, on its device; MPS has no float64."""
    return (mean.cpu() if mean.device.type == "mps" else mean).detach().double()
