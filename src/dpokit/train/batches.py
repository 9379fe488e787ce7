"""Which pairs make up a step, and which rank computes them.

The pairs of an optimizer step depend on the seed, the epoch and the global batch only. How they are split among ranks
and micro-batches does not change the gradient. The last step of an epoch may hold fewer pairs: no pair is dropped, and
none counts twice. A rank that is left without a pair computes a dummy, which has weight 0.
"""

import math
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

# Numbers of a batch that the model does not take: real pairs or rows; tokens that are needed, with each prompt once;
# tokens of all rows; scored tokens of the chosen and the rejected rows.
OWN_KEYS = ("real", "needed_tokens", "row_tokens", "scored_tokens")


class Batches(Sampler[list[int]]):
    """Batches of all ranks in turn: micro-batch 0 of rank 0, of rank 1, ..., micro-batch 1 of rank 0, ...

    accelerate gives a batch sampler's batches to the ranks in exactly this order. A dummy that repeats row i has the
    index `~i`.

    Args:
        pairs: number of pairs.
        per_device: pairs of one rank in one micro-batch.
        world_size: number of ranks.
        micro_batches: micro-batches of an optimizer step (gradient accumulation); 1 for evaluation.
        seed: of the shuffle; None keeps the order.
        drop_last: leave out the last, incomplete step.
        lengths: tokens of each pair, to balance the ranks and micro-batches of a step; None splits the pairs in order.
    """

    def __init__(
        self,
        pairs: int,
        *,
        per_device: int,
        world_size: int,
        micro_batches: int = 1,
        seed: int | None = None,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.pairs = pairs
        self.lengths = lengths
        self.per_device = per_device
        self.world_size = world_size
        self.per_step = per_device * world_size * micro_batches
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the order of the pairs depends."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.pairs, self.per_step)
        rest = 0 if self.drop_last else rest
        return whole * self.per_step // self.per_device + self._micro_batches(rest) * self.world_size

    def _micro_batches(self, pairs: int) -> int:
        return math.ceil(pairs / (self.per_device * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.pairs))
        if self.seed is not None:
            # One 64-bit seed of both, so that (seed 0, epoch 1) and (seed 1, epoch 0) differ.
            generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
            order = torch.randperm(self.pairs, generator=generator).tolist()
        for start in range(0, self.pairs, self.per_step):
            step = order[start : start + self.per_step]
            if self.drop_last and len(step) < self.per_step:
                return
            cells = self._micro_batches(len(step)) * self.world_size
            # The sizes differ by at most one pair; a full step is split into equal batches.
            sizes = [(cell + 1) * len(step) // cells - cell * len(step) // cells for cell in range(cells)]
            for share in self._deal(step, sizes):
                yield share or [~step[0]]

    def _deal(self, step: list[int], sizes: list[int]) -> list[list[int]]:
        """The step's pairs in shares of these sizes, each of about the same number of tokens.

        The longest remaining pair is added to the share with the fewest tokens (longest processing time first,
        R. L. Graham, 1969).
        """
        if self.lengths is None:
            ends = list(accumulate(sizes, initial=0))
            return [step[begin:end] for begin, end in pairwise(ends)]
        shares: list[list[int]] = [[] for _ in sizes]
        open_shares = [(0, cell) for cell, size in enumerate(sizes) if size]
        for pair in sorted(step, key=self.lengths.__getitem__, reverse=True):
            tokens, cell = heappop(open_shares)
            shares[cell].append(pair)
            if len(shares[cell]) < sizes[cell]:
                heappush(open_shares, (tokens + self.lengths[pair], cell))
        return shares


class Rows(TorchDataset[dict[str, Any]]):
    """A dataset's rows by index, each with `counts`: False for `~i`, the dummy that repeats row i."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[index if index >= 0 else ~index]
        return {**row, "counts": index >= 0}
