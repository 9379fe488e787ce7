"""A prompt is computed once: both answers of a pair in one packed row, without padding.

TRL's batch holds `prompt + chosen` and `prompt + rejected` as two padded rows. Here a pair is laid out as

    prompt without its last token | last token + chosen | last token + rejected

one pair behind the other, in a single row. The two branches take the positions that follow the prompt, and attention
lets each see the shared part and itself. Each token of a branch predicts one answer token, so that exactly the branches
meet the LM head (an answer's last token predicts nothing, and is not computed at all). The log-probs go back to the
places where TRL's loss looks for them, so losses, metrics, PEFT, checkpointing and sharding are TRL's, untouched.

Measured and derived in arXiv 2410.20305 (prefix sharing for DPO); the layout with a branch's own copy of the prompt's
last token is ours, as it lets one forward pass of TRL's own head do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"  # under which transformers finds `attend`
IGNORED = -100  # a position whose label is not scored
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@dataclass
class Packed:
    """A batch of pairs in one row of `tokens` tokens.

    Attributes:
        input_ids, position_ids, labels: `(1, tokens)`, int64; labels are already shifted.
        places: `(scored tokens,)`, int64: where each log-prob stands in TRL's flat `(2 pairs, width - 1)`.
        lengths: tokens of the shared part, the chosen and the rejected branch of each pair.
        attended: the layers that attended by this layout; one that did not has mixed the answers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    lengths: list[tuple[int, int, int]]
    attended: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._masks: list[torch.Tensor] | None = None
        self._offsets: tuple[torch.Tensor, ...] | None = None

    def masks(self) -> list[torch.Tensor]:
        """Who a pair's rejected branch sees: `(rejected, shared + rejected)`, bool, one a pair."""
        if self._masks is None:
            device = self.input_ids.device
            self._masks = [
                torch.ones(rejected, shared + rejected, dtype=torch.bool, device=device).tril(diagonal=shared)
                for shared, _, rejected in self.lengths
            ]
        return self._masks

    def offsets(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For kernels of unequal lengths: where queries and keys of each attention begin, `(2 pairs + 1,)` int32, and

        which tokens the keys are, `(keys,)` int64: the shared part stands before each of its branches.
        """
        if self._offsets is None:
            queries, keys, order, start = [0], [0], [], 0
            for shared, chosen, rejected in self.lengths:
                queries += [queries[-1] + shared + chosen, queries[-1] + shared + chosen + rejected]
                keys += [keys[-1] + shared + chosen, keys[-1] + 2 * shared + chosen + rejected]
                second = start + shared + chosen
                order += [*range(start, start + shared + chosen), *range(start, start + shared)]
                order += range(second, second + rejected)
                start = second + rejected
            device = self.input_ids.device
            as_int32 = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (queries, keys))
            self._offsets = (*as_int32, torch.tensor(order, device=device))
        queries_at, keys_at, order_at = self._offsets
        return queries_at, keys_at, order_at


def pack_pairs(input_ids: torch.Tensor, labels: torch.Tensor) -> Packed:
    """Lays out TRL's batch.

    Args:
        input_ids: `(2 pairs, width)`, int64: the chosen rows, then the rejected ones, in the same order.
        labels: the same shape; `IGNORED` wherever the token is not an answer's.

    Raises: ValueError where the two prompts of a pair differ.
    """
    pairs, width = len(input_ids) // 2, input_ids.shape[1]
    answers = labels != IGNORED
    # One trip from the device: where each answer begins and ends.
    begins, ends = torch.stack([answers.int().argmax(1), width - answers.flip(1).int().argmax(1)]).tolist()
    tokens, positions, targets, places, lengths = [], [], [], [], []
    for chosen in range(pairs):
        rejected, begin = chosen + pairs, begins[chosen]
        if begins[rejected] != begin or not torch.equal(input_ids[chosen, :begin], input_ids[rejected, :begin]):
            raise ValueError("the two prompts of a pair differ")
        shared = begin - 1
        tokens.append(input_ids[chosen, :shared])
        targets.append(labels.new_full((shared,), IGNORED))
        positions.append(torch.arange(shared))
        for row in (chosen, rejected):
            tokens.append(input_ids[row, shared : ends[row] - 1])
            targets.append(labels[row, begin : ends[row]])
            positions.append(torch.arange(shared, ends[row] - 1))
            places.append(torch.arange(shared, ends[row] - 1) + row * (width - 1))
        lengths.append((shared, ends[chosen] - begin, ends[rejected] - begin))
    device = input_ids.device
    return Packed(
        input_ids=torch.cat(tokens)[None],
        position_ids=torch.cat(positions)[None].to(device),
        labels=torch.cat(targets)[None],
        places=torch.cat(places).to(device),
        lengths=lengths,
    )


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers: SDPA, unless a packed batch says who sees whom.

    Args:
        query: `(1, heads, tokens, width)`; key and value may have fewer heads, each serving a group of query heads.

    Returns: `(1, tokens, heads, width)`, and no weights.
    """
    if packed is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    packed.attended.add(id(module))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _attend_by_flash(query, key, value, scaling, packed), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    parts, start = [], 0
    for (shared, chosen, rejected), mask in zip(packed.lengths, packed.masks(), strict=True):
        second, end = start + shared + chosen, start + shared + chosen + rejected
        first = slice(start, second)
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True, scale=scaling
            )
        )
        keys, values = (
            torch.cat([states[:, :, start : start + shared], states[:, :, second:end]], dim=2)
            for states in (key, value)
        )
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, second:end], keys, values, attn_mask=mask, scale=scaling
            )
        )
        start = end
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _attend_by_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, packed: Packed
) -> torch.Tensor:
    """All pairs in one kernel. Flash attention aligns a causal mask with the last key, as a branch needs it."""
    queries_at, keys_at, order = packed.offsets()
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    longest_query = max(max(shared + chosen, rejected) for shared, chosen, rejected in packed.lengths)
    longest_key = max(shared + max(chosen, rejected) for shared, chosen, rejected in packed.lengths)
    out = varlen_attn(
        query.contiguous(),
        key[order],
        value[order],
        queries_at,
        keys_at,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


# Lengths differ from step to step: torch.compile would compile packing and attention anew for each set of them.
AttentionInterface.register(NAME, torch.compiler.disable(attend))
AttentionMaskInterface.register(NAME, sdpa_mask)


class SharedPrefix:
    """The switch of a model's packed forward.

    Args:
        model: a causal LM that has TRL's fused head already (`add_fused_lm_head`); its forward is replaced, and asked
            for a fused head it packs the batch while the switch is on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.on = True
        self.attended = 0  # layers that followed the layout in the last forward pass
        original = model.forward
        model.set_attn_implementation(NAME)

        @wraps(original)  # `generate` looks at the arguments
        def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if fused_lm_head and self.on:
                return self._forward(original, **kwargs)
            return original(*args, fused_lm_head=fused_lm_head, **kwargs)

        model.forward = forward

    def _forward(
        self, original: Any, *, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        packed = torch.compiler.disable(pack_pairs)(input_ids, labels)
        outputs = original(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            # Of four dimensions, so that transformers takes it for a mask made ready; `attend` does not look at it.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
            shift_labels=packed.labels,
            fused_lm_head=True,
            packed=packed,
            **kwargs,
        )
        self.attended = len(packed.attended)
        scored = packed.labels[0] != IGNORED
        shape = (len(input_ids), input_ids.shape[1] - 1)
        for name in PER_TOKEN:
            values = getattr(outputs, name)
            if values is not None:
                flat = values.new_zeros(shape[0] * shape[1])
                outputs[name] = flat.index_put((packed.places,), values[0][scored]).view(shape)
        return outputs

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """TRL's own forward meanwhile."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before
