"""The packed layout of a batch of pairs: one row without padding, with each prompt and each of its answers once.

TRL's batch holds `prompt + chosen` and `prompt + rejected` as two padded rows. The packed layout of a pair is

    prompt without its last token | last token + chosen | last token + rejected

and all pairs follow each other in a single row. Pairs with the same prompt are one group: the prompt, then a branch for
each different answer. All branches take the positions after the prompt. Each token of a branch predicts one answer
token. (An answer's last token predicts nothing and is left out.)

The branches begin where the rows of a pair differ, or at the first token that is scored. Tokens of an answer without a
score (a user's or a tool's turn between the turns of the assistant) are context.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

IGNORED = -100  # a position whose label is not scored
Group = tuple[int, tuple[int, ...]]  # tokens of the shared part, and of each branch


class Attended:
    """The ids of layers. An object of its own, as FSDP2 copies dataclasses and sets in a layer's arguments."""

    def __init__(self) -> None:
        self.layers: set[int] = set()


@dataclass
class Packed:
    """A batch of pairs, packed into one row of `tokens` tokens.

    For kernels of variable lengths each branch is a sequence; the first of a group has the shared part, too. The keys
    of each branch begin with those of the shared part.

    Attributes:
        input_ids, position_ids: `(1, tokens)`, int64.
        scored: `(scored,)`, int64: the tokens whose next token is scored.
        labels: `(1, scored)`, int64: the next token of each scored one.
        places: `(values,)`, int64: index of each scored token of each row in TRL's flattened `(2 pairs, width - 1)`.
        sources: `(values,)`, int64: which of `scored` each place has its value from.
        queries_at, keys_at: `(branches + 1,)`, int32: the start of each sequence, and the end of the last.
        order: `(keys,)`, int64: the tokens whose keys and values each sequence attends to.
        groups: tokens of the shared part, and of each branch, of each group.
        attended: the layers that followed this layout; any other layer has mixed the answers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    sources: torch.Tensor
    queries_at: torch.Tensor
    keys_at: torch.Tensor
    order: torch.Tensor
    groups: list[Group]
    attended: Attended = field(default_factory=Attended)

    def __post_init__(self) -> None:
        self._masks: list[list[torch.Tensor]] | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Packed":
        """Returns the layout with every tensor changed, in the order of the attributes."""
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **changed, attended=Attended())

    def masks(self) -> list[list[torch.Tensor]]:
        """Returns, for each group, the masks of the branches after the first: `(branch, shared + branch)`, bool."""
        if self._masks is None:
            device = self.input_ids.device
            self._masks = [
                [
                    torch.ones(branch, shared + branch, dtype=torch.bool, device=device).tril(diagonal=shared)
                    for branch in branches[1:]
                ]
                for shared, branches in self.groups
            ]
        return self._masks


def pack_pairs(input_ids: torch.Tensor, labels: torch.Tensor) -> Packed:
    """Packs TRL's batch, on the CPU: a GPU would have to be asked where rows differ.

    Args:
        input_ids: `(2 pairs, width)`, int64: the chosen rows, then the rejected ones, in the same order.
        labels: the same shape; `IGNORED` for every token that is not scored.

    Raises: ValueError if the two rows of a pair begin differently, or one has no scored token.
    """
    width = input_ids.shape[1]
    by_prefix, ends = _group_rows(input_ids, labels)
    tokens, positions, scored, targets, places, sources = [], [], [], [], [], []
    groups, start, values = list[Group](), 0, 0
    for prefix, rows in by_prefix.items():
        shared = len(prefix) - 1
        tokens.append(input_ids[rows[0], :shared])
        positions.append(torch.arange(shared))
        begin, branches = start + shared, list[int]()
        for same in _merge_equal_rows(input_ids, labels, rows, shared, ends):
            end = ends[same[0]]
            tokens.append(input_ids[same[0], shared : end - 1])
            positions.append(torch.arange(shared, end - 1))
            target = labels[same[0], shared + 1 : end]
            at = (target != IGNORED).nonzero()[:, 0]
            scored.append(begin + at)
            targets.append(target[at])
            for row in same:
                places.append(row * (width - 1) + shared + at)
                sources.append(torch.arange(values, values + len(at)))
            branches.append(len(target))
            begin, values = begin + len(target), values + len(at)
        groups.append((shared, tuple(branches)))
        start = begin
    queries_at, keys_at, order = _order_keys(groups)
    return Packed(
        input_ids=torch.cat(tokens)[None],
        position_ids=torch.cat(positions)[None],
        scored=torch.cat(scored),
        labels=torch.cat(targets)[None],
        places=torch.cat(places),
        sources=torch.cat(sources),
        queries_at=torch.tensor(queries_at, dtype=torch.int32),
        keys_at=torch.tensor(keys_at, dtype=torch.int32),
        order=torch.tensor(order),
        groups=groups,
    )


def _group_rows(input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[dict[tuple[int, ...], list[int]], list[int]]:
    """Returns the rows by the tokens that they share, and the end of each row. Raises: as `pack_pairs`."""
    pairs, width = len(input_ids) // 2, input_ids.shape[1]
    scored, differ = labels != IGNORED, input_ids[:pairs] != input_ids[pairs:]
    differ[:, -1] = True  # equal rows branch at their first scored token
    # Of each row the first and the last scored token, and of each pair the first difference.
    firsts = torch.cat([scored, scored.flip(1), differ]).int().argmax(1).tolist()
    begins, ends = firsts[: 2 * pairs], [width - last for last in firsts[2 * pairs : 4 * pairs]]
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for chosen, difference in enumerate(firsts[4 * pairs :]):
        rejected = chosen + pairs
        begin = min(difference, begins[chosen], begins[rejected])
        if begin == 0:
            raise ValueError("the two rows of a pair begin differently, or one has no scored token")
        by_prefix.setdefault(tuple(input_ids[chosen, :begin].tolist()), []).extend((chosen, rejected))
    return by_prefix, ends


def _merge_equal_rows(
    input_ids: torch.Tensor, labels: torch.Tensor, rows: list[int], shared: int, ends: list[int]
) -> Iterable[list[int]]:
    """The rows of a group, those with the same tokens and labels together."""
    merged: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        branch = slice(shared, ends[row])
        merged.setdefault((*input_ids[row, branch].tolist(), *labels[row, branch].tolist()), []).append(row)
    return merged.values()


def _order_keys(groups: list[Group]) -> tuple[list[int], list[int], list[int]]:
    """Returns `queries_at`, `keys_at` and `order` of a `Packed`."""
    queries, keys, order, start = [0], [0], list[int](), 0
    for shared, branches in groups:
        begin = start + shared
        for branch in branches:
            queries.append(begin + branch)
            keys.append(keys[-1] + shared + branch)
            order += [*range(start, start + shared), *range(begin, begin + branch)]
            begin += branch
        start = begin
    return queries, keys, order
