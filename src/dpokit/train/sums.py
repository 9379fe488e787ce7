"""Metrics as sums and counts over real pairs and tokens, added up on all ranks once per log.

TRL averages the averages of batches, and counts the pairs twice that accelerate repeats to even out a last batch.
"""

from collections.abc import Mapping

import torch
from accelerate import Accelerator

# What each of TRL's metrics is a mean over; rewards/* and logps/* are means over pairs.
PER_TOKEN = {
    "entropy": "tokens",
    "logits/chosen": "chosen_tokens",
    "logits/rejected": "rejected_tokens",
    "mean_token_accuracy": "chosen_tokens",
}


class Sums:
    """What is to be logged of one mode, training or evaluation, since the last log."""

    def __init__(self) -> None:
        self._means: dict[str, list[float]] = {}  # name: sum, weight
        self._totals: dict[str, float] = {}

    def add(self, means: Mapping[str, float], completion_mask: torch.Tensor, *, real: bool) -> None:
        """A batch's means, each times what it is a mean over.

        Args:
            completion_mask: `(2 pairs, width)`; its first column predicts nothing.
            real: False for a stand-in, which adds the names alone.
        """
        chosen, rejected = completion_mask[:, 1:].sum(dim=1).chunk(2)
        weights = {
            "pairs": float(len(chosen)),
            "chosen_tokens": float(chosen.sum()),
            "rejected_tokens": float(rejected.sum()),
        }
        weights["tokens"] = weights["chosen_tokens"] + weights["rejected_tokens"]
        for name, mean in means.items():
            weight = weights[PER_TOKEN.get(name, "pairs")] if real else 0.0
            sums = self._means.setdefault(name, [0.0, 0.0])
            sums[0] += mean * weight if real else 0.0
            sums[1] += weight

    def count(self, **totals: float) -> None:
        """Adds to numbers that are logged as totals over all ranks."""
        for name, number in totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + number

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
