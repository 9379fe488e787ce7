"""Which pairs make up a step, and which rank computes them.

The pairs of an optimizer step depend on the seed, the epoch and the global batch only. How they are split among ranks
and micro-batches does not change the gradient. The last step of an epoch may hold fewer pairs: no pair is dropped, and
none counts twice. A rank that is left without a pair computes a dummy, which has weight 0.

Pairs of one prompt may be kept together, in a step and in a micro-batch, which computes their prompt once. InstructGPT
(arXiv 2203.02155, section 3.5) trains its reward model on all comparisons of a prompt as one batch element: shuffled
into one dataset, they made it overfit within one epoch.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

# Numbers of a batch that the model does not take: real pairs or rows; tokens that are needed, with each prompt once;
# tokens of all rows; scored tokens of the chosen and the rejected rows.
OWN_KEYS = ("real", "needed_tokens", "row_tokens", "scored_tokens")

# Pairs of one prompt that a step has together, and prompts of a step. Further pairs are dealt to other steps, so that
# no step is of one prompt alone.
MOST_TOGETHER, LEAST_PROMPTS = 8, 4


@dataclass(frozen=True)
class Prompts:
    """The prompt of each pair.

    Attributes:
        keys: equal for pairs with the same prompt.
        lengths: tokens of each pair's prompt.
    """

    keys: Sequence[Hashable]
    lengths: Sequence[int]

    def find_leaders(self, most: int) -> list[int]:
        """Returns for each pair the first of the pairs that it is kept together with; itself if it is alone.

        A prompt's pairs are divided, in their order, into parts of at most `most`, which differ by at most one pair.
        """
        numbers, leaders, firsts = Counter(self.keys), list[int](), dict[tuple[Hashable, int], int]()
        so_far = Counter[Hashable]()
        for pair, key in enumerate(self.keys):
            parts = math.ceil(numbers[key] / most)
            part = so_far[key] * parts // numbers[key]
            so_far[key] += 1
            leaders.append(firsts.setdefault((key, part), pair))
        return leaders


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
        prompts: keeps the pairs of one prompt together; None does not. Needs `lengths`.
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
        prompts: Prompts | None = None,
    ) -> None:
        self.pairs = pairs
        self.lengths = lengths
        self.prompts = prompts
        self.per_device = per_device
        self.world_size = world_size
        self.per_step = per_device * world_size * micro_batches
        most = min(MOST_TOGETHER, max(2, self.per_step // LEAST_PROMPTS))
        self._leaders = None if prompts is None else torch.tensor(prompts.find_leaders(most), dtype=torch.long)
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
            shuffled = torch.randperm(self.pairs, generator=generator)
            if self._leaders is not None:  # each pair takes the place of the first that it is kept together with
                shuffled = shuffled.argsort()[self._leaders].argsort(stable=True)
            order = shuffled.tolist()
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

        Pairs of one prompt are dealt to one share, unless the slowest ranks would then compute more tokens.
        """
        if self.lengths is None:
            ends = list(accumulate(sizes, initial=0))
            return [step[begin:end] for begin, end in pairwise(ends)]
        apart = self._balance([[pair] for pair in step], sizes)
        if self.prompts is None:
            return apart
        by_prompt: dict[Hashable, list[int]] = {}
        for pair in step:
            by_prompt.setdefault(self.prompts.keys[pair], []).append(pair)
        if len(by_prompt) == len(step):
            return apart
        return min(self._balance(list(by_prompt.values()), sizes), apart, key=self._count_slowest)

    def _balance(self, units: list[list[int]], sizes: list[int]) -> list[list[int]]:
        """Shares of these sizes, with the pairs of each unit in one share if one has place for them.

        Of units with the same number of pairs the longest is dealt first, to the share with the fewest tokens (longest
        processing time first, R. L. Graham, 1969). If no share has place for a unit, the largest place takes a part.
        """
        shares: list[list[int]] = [[] for _ in sizes]
        tokens = [0] * len(sizes)
        for unit in sorted(units, key=lambda unit: (len(unit), self._count_tokens(unit)), reverse=True):
            while unit:
                places = [size - len(share) for size, share in zip(sizes, shares, strict=True)]
                place = min(len(unit), max(places))
                cell = min((at for at in range(len(sizes)) if places[at] >= place), key=tokens.__getitem__)
                shares[cell] += unit[:place]
                tokens[cell] += self._count_tokens(unit[:place])
                unit = unit[place:]
        return shares

    def _count_tokens(self, pairs: Sequence[int]) -> int:
        """The tokens that a micro-batch of these pairs computes; a prompt that pairs share counts once."""
        assert self.lengths is not None
        tokens = sum(self.lengths[pair] for pair in pairs)
        if self.prompts is None or len(pairs) == 1:
            return tokens
        once = {self.prompts.keys[pair]: self.prompts.lengths[pair] for pair in pairs}
        return tokens - sum(self.prompts.lengths[pair] for pair in pairs) + sum(once.values())

    def _count_slowest(self, shares: list[list[int]]) -> int:
        """The tokens that the slowest rank computes in each micro-batch, added up."""
        micro_batches = (shares[at : at + self.world_size] for at in range(0, len(shares), self.world_size))
        return sum(max(map(self._count_tokens, of_ranks)) for of_ranks in micro_batches)


class Rows(TorchDataset[dict[str, Any]]):
    """A dataset's rows by index, each with `counts`: False for `~i`, the dummy that repeats row i."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[index if index >= 0 else ~index]
        return {**row, "counts": index >= 0}
