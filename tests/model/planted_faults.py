"""Faults of a packed forward, planted one at a time: each must be found in every precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpokit.model import shared_prefix
from dpokit.model.packed_rows import Packed
from dpokit.model.shared_prefix import NAME, SharedPrefix


def shift_rejected_positions(packed: Packed) -> None:
    for begin, end in find_rejected(packed):
        packed.position_ids[:, begin:end] += 1


def continue_positions(packed: Packed) -> None:
    for (begin, end), (_, (chosen, *_)) in zip(find_rejected(packed), packed.groups, strict=True):
        packed.position_ids[:, begin:end] += chosen


def shift_labels(packed: Packed) -> None:
    packed.labels = packed.labels.roll(-1, dims=1)


def score_the_token_itself(packed: Packed) -> None:
    packed.labels = packed.input_ids[:, packed.scored]


def score_the_token_before(packed: Packed) -> None:
    packed.scored = (packed.scored - 1).clamp(min=0)


def reverse_places(packed: Packed) -> None:
    packed.places = packed.places.flip(0)


def shift_positions_of_the_third_branch(packed: Packed) -> None:
    for begin, end in find_branches(packed, 2):
        packed.position_ids[:, begin:end] += 1


def exchange_answers(packed: Packed) -> None:
    packed.sources = packed.sources.flip(0)


def find_rejected(packed: Packed) -> Iterator[tuple[int, int]]:
    return find_branches(packed, 1)


def find_branches(packed: Packed, number: int) -> Iterator[tuple[int, int]]:
    """The first and the last token, in the packed row, of the branch with this number in each group that has one."""
    start = 0
    for shared, branches in packed.groups:
        if number < len(branches):
            begin = start + shared + sum(branches[:number])
            yield begin, begin + branches[number]
        start += shared + sum(branches)


def draw_mask(shared: int, branch: int, *, diagonal: int, hidden: int) -> torch.Tensor:
    """The mask of a branch: causal from this diagonal on, with the last tokens of the prompt hidden."""
    mask = torch.ones(branch, shared + branch, dtype=torch.bool).tril(diagonal=diagonal)
    mask[:, max(shared - hidden, 0) : shared] = False
    return mask


def attend_all_before(
    module: nn.Module, query: Any, key: Any, value: Any, _: Any, packed: Any = None, **more: Any
) -> Any:
    """Causal attention over the whole row: the rejected answer sees the chosen one, and each pair those before it."""
    if packed is not None:
        packed.attended.layers.add(id(module))
    return sdpa_attention_forward(module, query, key, value, None, **more)


def attend_within_groups(
    module: nn.Module, query: Any, key: Any, value: Any, _: Any, packed: Any = None, **more: Any
) -> Any:
    """Causal attention over each group: an answer sees the answers of its prompt that are before it."""
    mask = None
    if packed is not None:
        packed.attended.layers.add(id(module))
        mask = torch.block_diag(*(torch.ones([shared + sum(branches)] * 2) for shared, branches in packed.groups))
        mask = mask.bool().tril()[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, **more)


def scale_weights(model: nn.Module, share: float = 0.01) -> Callable[[], None]:
    """Changes each weight by a random share of itself; returns what restores them."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + share * torch.randn(weight.shape))

    def restore() -> None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(before[name])

    return restore


def change_rope(model: nn.Module) -> Callable[[], None]:
    """Makes rotary embeddings those of a model with ten times the base; returns what restores them."""
    (rope,) = (module for module in model.modules() if hasattr(module, "inv_freq"))
    before = rope.inv_freq.clone()
    rope.inv_freq.mul_(10 ** -torch.linspace(0, 1, len(before)))
    return lambda: rope.inv_freq.copy_(before)


def change_adapter(model: nn.Module) -> Callable[[], None]:
    """Makes the adapter another one: the rows of its `B` matrices are reversed."""
    adapters = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert adapters

    def reverse() -> None:
        with torch.no_grad():
            for weight in adapters:
                weight.copy_(weight.flip(0))

    reverse()
    return reverse


OF_LAYOUT = {
    "positions of the rejected answer one too high": shift_rejected_positions,
    "positions that go on after the chosen answer": continue_positions,
    "labels shifted by one": shift_labels,
    "labels not shifted": score_the_token_itself,
    "log-probs of the token before": score_the_token_before,
    "log-probs written to other places": reverse_places,
}
OF_GROUPS = {
    "positions of the third branch one too high": shift_positions_of_the_third_branch,
    "log-probs written to other answers": exchange_answers,
}
OF_ATTENTION = {
    "the rejected answer sees the chosen one": attend_all_before,
    "an answer sees another pair's answer": attend_within_groups,
}
OF_MASK = {  # diagonal of the mask, given the tokens of the shared part; hidden tokens
    "each token sees its whole answer": (lambda shared: shared + 10_000, 0),
    "each token sees the next one": (lambda shared: shared + 1, 0),
    "a token does not see itself": (lambda shared: max(shared - 1, 0), 0),
    "the causal mask begins at the first key": (lambda _: 0, 0),
    "the end of the prompt is hidden": (lambda shared: shared, 1),
}
OF_WEIGHTS = {
    "weights changed by 1 %": scale_weights,
    "rotary embeddings of another model": change_rope,
    "another adapter": change_adapter,
}
FAULTS = [*OF_LAYOUT, *OF_MASK, *OF_WEIGHTS, *OF_ATTENTION]
# Of a batch in which pairs have the same prompt.
FAULTS_OF_GROUPS = [*OF_GROUPS, *OF_ATTENTION]


@contextmanager
def planted(fault: str, model: nn.Module) -> Iterator[None]:
    """Plants a fault into packed forward passes of a model with a shared prefix, not into its padded ones."""
    with pytest.MonkeyPatch.context() as patch:
        of_layout = OF_LAYOUT | OF_GROUPS
        if fault in of_layout:
            pack = shared_prefix.pack_pairs

            def pack_wrongly(*arguments: Any) -> Packed:
                packed = pack(*arguments)
                of_layout[fault](packed)
                return packed

            patch.setattr(shared_prefix, "pack_pairs", pack_wrongly)
        elif fault in OF_MASK:
            diagonal, hidden = OF_MASK[fault]

            def draw_wrongly(packed: Packed) -> list[list[torch.Tensor]]:
                return [
                    [draw_mask(shared, branch, diagonal=diagonal(shared), hidden=hidden) for branch in branches[1:]]
                    for shared, branches in packed.groups
                ]

            patch.setattr(Packed, "masks", draw_wrongly)
        elif fault in OF_WEIGHTS:
            forward = SharedPrefix._forward

            def forward_with_others(shared: SharedPrefix, *arguments: Any, **named: Any) -> Any:
                with torch._C.DisableTorchFunction():  # in fp32, changes would be made to copies
                    restore = OF_WEIGHTS[fault](model)
                try:
                    return forward(shared, *arguments, **named)
                finally:
                    with torch._C.DisableTorchFunction():
                        restore()

            patch.setattr(SharedPrefix, "_forward", forward_with_others)
        else:
            patch.setitem(shared_prefix.AttentionInterface._global_mapping, NAME, OF_ATTENTION[fault])
        yield
