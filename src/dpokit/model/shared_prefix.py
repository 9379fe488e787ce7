"""Computes a pair's prompt once: packs both answers of a pair into one row, without padding.

TRL's batch holds `prompt + chosen` and `prompt + rejected` as two padded rows. The packed layout of a pair is

    prompt without its last token | last token + chosen | last token + rejected

and all pairs follow each other in a single row. Both branches take the positions after the prompt, and each attends to
the shared part and to itself. Each token of a branch predicts one answer token, and the LM head computes those that are
scored. (An answer's last token predicts nothing and is left out.) The log-probs are written back to the positions where
TRL's loss reads them, so losses, metrics, PEFT, checkpointing and sharding remain TRL's.

The branches begin where the rows differ, or at the first token that is scored. Tokens of an answer without a score (a
user's or a tool's turn between the turns of the assistant) are context.

arXiv 2410.20305 derives and measures prefix sharing for DPO. The layout here differs: each branch has its own copy of
the prompt's last token, so that one forward pass of TRL's own head is enough.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpokit.model.rounding import HALF, Fp32Mode

NAME = "shared_prefix"  # the name of `attend` in transformers' registry of attention functions
IGNORED = -100  # a position whose label is not scored
# torch 2.10's varlen_attn takes neither a scale nor fewer heads of keys; attention then uses SDPA on GPUs too.
HAS_FLASH = {"scale", "window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


class Attended:
    """The ids of layers. An object of its own, as FSDP2 copies dataclasses and sets in a layer's arguments."""

    def __init__(self) -> None:
        self.layers: set[int] = set()


@dataclass
class Packed:
    """A batch of pairs, packed into one row of `tokens` tokens.

    A pair is two sequences for kernels of variable lengths, one for each branch. The keys of a branch begin with the
    shared part.

    Attributes:
        input_ids, position_ids: `(1, tokens)`, int64.
        scored: `(scored,)`, int64: the tokens whose next token is scored.
        labels: `(1, scored)`, int64: the next token of each scored one.
        places: `(scored,)`, int64: index of each scored token in TRL's flattened `(2 pairs, width - 1)`.
        queries_at, keys_at: `(2 pairs + 1,)`, int32: the start of each sequence, and the end of the last.
        order: `(keys,)`, int64: the tokens whose keys and values each sequence attends to.
        lengths: tokens of the shared part, the chosen and the rejected branch of each pair.
        attended: the layers that followed this layout; any other layer has mixed the answers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor
    queries_at: torch.Tensor
    keys_at: torch.Tensor
    order: torch.Tensor
    lengths: list[tuple[int, int, int]]
    attended: Attended = field(default_factory=Attended)

    def __post_init__(self) -> None:
        self._masks: list[torch.Tensor] | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Packed":
        """Returns the layout with every tensor changed, in the order of the attributes."""
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **changed, attended=Attended())

    def masks(self) -> list[torch.Tensor]:
        """Returns each pair's mask of the rejected branch: `(rejected, shared + rejected)`, bool, True attends."""
        if self._masks is None:
            device = self.input_ids.device
            self._masks = [
                torch.ones(rejected, shared + rejected, dtype=torch.bool, device=device).tril(diagonal=shared)
                for shared, _, rejected in self.lengths
            ]
        return self._masks


def pack_pairs(input_ids: torch.Tensor, labels: torch.Tensor) -> Packed:
    """Packs TRL's batch, on the CPU: a GPU would have to be asked where the rows of each pair differ.

    Args:
        input_ids: `(2 pairs, width)`, int64: the chosen rows, then the rejected ones, in the same order.
        labels: the same shape; `IGNORED` for every token that is not scored.

    Raises: ValueError if the two rows of a pair begin differently, or one has no scored token.
    """
    pairs, width = len(input_ids) // 2, input_ids.shape[1]
    scored, differ = labels != IGNORED, input_ids[:pairs] != input_ids[pairs:]
    differ[:, -1] = True  # equal rows branch at their first scored token
    # Of each row the first and the last scored token, and of each pair the first difference.
    firsts = torch.cat([scored, scored.flip(1), differ]).int().argmax(1).tolist()
    begins, ends = firsts[: 2 * pairs], [width - last for last in firsts[2 * pairs : 4 * pairs]]
    tokens, positions, targets, places, lengths = [], [], [], [], []
    for chosen, difference in enumerate(firsts[4 * pairs :]):
        rejected = chosen + pairs
        begin = min(difference, begins[chosen], begins[rejected])
        if begin == 0:
            raise ValueError("the two rows of a pair begin differently, or one has no scored token")
        shared = begin - 1
        branches = [(row, shared, ends[row] - 1) for row in (chosen, rejected)]
        for row, first, last in [(chosen, 0, shared), *branches]:
            tokens.append(input_ids[row, first:last])
            targets.append(labels[row, first + 1 : last + 1])
            positions.append(torch.arange(first, last))
            places.append(positions[-1] + row * (width - 1))
        lengths.append((shared, ends[chosen] - begin, ends[rejected] - begin))
    target = torch.cat(targets)
    is_scored = target != IGNORED
    queries_at, keys_at, order = _order_keys(lengths)
    return Packed(
        input_ids=torch.cat(tokens)[None],
        position_ids=torch.cat(positions)[None],
        scored=is_scored.nonzero()[:, 0],
        labels=target[is_scored][None],
        places=torch.cat(places)[is_scored],
        queries_at=torch.tensor(queries_at, dtype=torch.int32),
        keys_at=torch.tensor(keys_at, dtype=torch.int32),
        order=torch.tensor(order),
        lengths=lengths,
    )


def _order_keys(lengths: list[tuple[int, int, int]]) -> tuple[list[int], list[int], list[int]]:
    """Returns `queries_at`, `keys_at` and `order` of a `Packed`."""
    queries, keys, order, start = [0], [0], list[int](), 0
    for shared, chosen, rejected in lengths:
        queries += [queries[-1] + shared + chosen, queries[-1] + shared + chosen + rejected]
        keys += [keys[-1] + shared + chosen, keys[-1] + 2 * shared + chosen + rejected]
        second = start + shared + chosen
        order += [*range(start, start + shared + chosen), *range(start, start + shared)]
        order += range(second, second + rejected)
        start = second + rejected
    return queries, keys, order


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
    """Attention function for transformers: SDPA, or for a packed batch attention by its layout.

    Args:
        query: `(1, heads, tokens, width)`; key and value may have fewer heads, each for a group of query heads.
        packed: the layout of a packed batch; None for any other batch.

    Returns: `(1, tokens, heads, width)`, and None instead of attention weights.
    """
    if packed is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    packed.attended.layers.add(id(module))
    flash = _find_flash_dtype(query)
    if flash is not None:
        query, key, value = (states.to(flash) for states in (query, key, value))
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


def _find_flash_dtype(query: torch.Tensor) -> torch.dtype | None:
    """The 16-bit dtype in which flash attention computes on a GPU; None if it cannot.

    Under autocast rotary embeddings make queries and keys fp32, and SDPA would cast them back.
    """
    if not HAS_FLASH or not query.is_cuda or Fp32Mode.is_on:
        return None
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    return dtype if dtype in HALF else None


def _attend_by_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, packed: Packed
) -> torch.Tensor:
    """Attends all pairs in one kernel. Flash attention aligns a causal mask with the last key, which suits a branch."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    longest_query = max(max(shared + chosen, rejected) for shared, chosen, rejected in packed.lengths)
    longest_key = max(shared + max(chosen, rejected) for shared, chosen, rejected in packed.lengths)
    out = varlen_attn(
        query.contiguous(),
        key[packed.order],
        value[packed.order],
        packed.queries_at,
        packed.keys_at,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None]


def _pack_on_cpu(input_ids: torch.Tensor, labels: torch.Tensor) -> Packed:
    return pack_pairs(input_ids.cpu(), labels.cpu()).map(lambda tensor: tensor.to(input_ids.device))


# Excluded from torch.compile, which would recompile packing and attention for the new lengths of each step.
AttentionInterface.register(NAME, torch.compiler.disable(attend))
AttentionMaskInterface.register(NAME, sdpa_mask)


class ScoredOnly:
    """Whether the backbone's hidden states are those of scored tokens alone; TRL's head then has none to select."""

    now = False


def _keep_scored(_: torch.nn.Module, __: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
    """Forward hook of a backbone: leaves the hidden states of scored tokens, `(1, scored, width)`.

    TRL's head would choose them by a mask, and a GPU then has to be asked how many there are.
    """
    packed = kwargs.get("packed")
    if packed is not None:
        outputs.last_hidden_state = outputs.last_hidden_state.index_select(1, packed.scored)
    return outputs


class SharedPrefix:
    """Replaces a model's forward by one that packs batches while `on` is True.

    Args:
        model: a causal LM that already has TRL's fused head (`add_fused_lm_head`); only calls with `fused_lm_head=True`
            are packed. The argument `packed` of a call is the layout of its batch, on the model's device. Without it
            the call packs the batch, and waits for the GPU.

    Raises: ValueError for a model whose forward is already replaced: its batches would be packed twice.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if hasattr(model.forward, "packs_batches"):
            raise ValueError("the model packs batches already")
        self.on = True
        self.attended = 0  # number of layers that followed the layout in the last forward pass
        original = model.forward
        model.set_attn_implementation(NAME)
        model.base_model.register_forward_hook(torch.compiler.disable(_keep_scored), with_kwargs=True)

        @wraps(original)  # `generate` inspects the signature
        def forward(*args: Any, fused_lm_head: bool = False, packed: Packed | None = None, **kwargs: Any) -> Any:
            if fused_lm_head and self.on:
                return self._forward(original, packed=packed, **kwargs)
            return original(*args, fused_lm_head=fused_lm_head, **kwargs)

        forward.packs_batches = True  # type: ignore[attr-defined]
        model.forward = forward

    def _forward(
        self,
        original: Any,
        *,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        packed: Packed | None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        if packed is None:
            packed = torch.compiler.disable(_pack_on_cpu)(input_ids, labels)
        packed.attended.layers.clear()
        ScoredOnly.now = True
        try:
            outputs = original(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                # Four-dimensional, so that transformers treats it as a finished mask; `attend` ignores it.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
                shift_labels=packed.labels,
                fused_lm_head=True,
                packed=packed,
                **kwargs,
            )
        finally:
            ScoredOnly.now = False
        self.attended = len(packed.attended.layers)
        shape = (len(input_ids), input_ids.shape[1] - 1)
        for name in PER_TOKEN:
            values = getattr(outputs, name)
            if values is not None:
                flat = values.new_zeros(shape[0] * shape[1])
                outputs[name] = flat.index_put((packed.places,), values[0]).view(shape)
        return outputs

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Uses TRL's own forward inside this context."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before
