"""Computes a prompt once for all answers of a batch: replaces a model's forward by one of packed rows.

`packed_rows` describes the layout. Each branch attends to the shared part of its group and to itself. The LM head
computes the scored tokens alone. Their log-probs are written back to the positions where TRL's loss reads them, those
of an answer that several pairs have to each of its rows. So losses, metrics, PEFT, checkpointing and sharding remain
TRL's.

arXiv 2410.20305 derives and measures prefix sharing for DPO. The layout here differs: each branch has its own copy of
the prompt's last token, so that one forward pass of TRL's own head is enough.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpokit.model.packed_rows import Packed, pack_pairs
from dpokit.model.rounding import HALF, Fp32Mode

NAME = "shared_prefix"  # the name of `attend` in transformers' registry of attention functions
# torch 2.10's varlen_attn takes neither a scale nor fewer heads of keys; attention then uses SDPA on GPUs too.
HAS_FLASH = {"scale", "window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


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
    heads = query.shape[1] // key.shape[1]
    if heads > 1:
        key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    return _attend_by_branch(query, key, value, scaling, packed).transpose(1, 2).contiguous(), None


def _attend_by_branch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, packed: Packed
) -> torch.Tensor:
    """Attends branch by branch; returns the layout of `query`.

    Splits each tensor once: the gradient of each slice would be a tensor of the whole row's size.
    """
    lengths = [length for shared, branches in packed.groups for length in (shared, *branches)]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    results, prefix = [], 0
    for (_, branches), masks in zip(packed.groups, packed.masks(), strict=True):
        for branch, mask in enumerate((None, *masks), start=prefix + 1):
            results.append(
                functional.scaled_dot_product_attention(
                    torch.cat([queries[prefix], queries[branch]], dim=2) if mask is None else queries[branch],
                    torch.cat([keys[prefix], keys[branch]], dim=2),
                    torch.cat([values[prefix], values[branch]], dim=2),
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scaling,
                )
            )
        prefix += 1 + len(branches)
    return torch.cat(results, dim=2)


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
    """Attends all branches in one kernel. Flash attention aligns a causal mask with the last key, as a branch needs."""
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    longest_query = max(max(shared + branches[0], *branches) for shared, branches in packed.groups)
    longest_key = max(shared + max(branches) for shared, branches in packed.groups)
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

        forward.packs_batches = True  # type: ignore[attr-defined]  # a mark
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
                values = values[0].index_select(0, packed.sources)
                outputs[name] = flat.index_put((packed.places,), values).view(shape)
        return outputs

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Uses TRL's own forward inside this context."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before
