"""What the LM head allocates on a GPU, by the shapes in TRL's source.

TRL scores answer tokens alone, in tiles, by Triton kernels (trl/kernels/chunked_logprob.py, TRL 1.16). Without a GPU
these cannot run, so each of their tensors is made here instead, in the same order and with the same lives.
"""

from typing import Any

import torch

TILE_TOKENS = 4096  # TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py
TILE_VOCABULARY = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py


class GpuHead(torch.autograd.Function):
    """Answer tokens' log-probs of hidden states `(tokens, width)` and a head `(vocabulary, width)`: `(tokens,)`."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Running statistics a token, one tile of logits, one chunk of the head in the type of the products."""
        compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        statistics = [torch.empty(len(hidden)) for _ in range(7)]
        tile = torch.empty(min(len(hidden), TILE_TOKENS), TILE_VOCABULARY, dtype=compute)
        chunk = weight[:TILE_VOCABULARY].to(compute)
        ctx.save_for_backward(hidden, weight, *statistics[:2])
        ctx.compute = compute
        del tile, chunk
        return torch.empty(len(hidden))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004 - a shape is all that is wanted
        """The gradients are summed in fp32, whatever the inputs' type; each tile is computed once more."""
        hidden, weight, *_ = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad
        grad_hidden = torch.empty(hidden.shape) if needs_hidden else None
        grad_weight = torch.empty(weight.shape) if needs_weight else None
        tile = torch.empty(min(len(hidden), TILE_TOKENS), TILE_VOCABULARY, dtype=ctx.compute)
        chunk = weight[:TILE_VOCABULARY].to(ctx.compute)
        del tile, chunk
        return (
            grad_hidden.to(hidden.dtype) if grad_hidden is not None else None,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
        )
