"""Tells rounding from error: runs a model in fp32, whatever the precision of its weights and of its autocast.

Two correct forward passes of a model in bf16 differ by some hundredths of a nat a token, as they round in other places.
So does a pass with positions that are wrong by one. In fp32 correct passes differ by millionths of a nat.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

HALF = {torch.float16, torch.bfloat16}


class Fp32Mode(TorchFunctionMode):
    """Widens 16-bit tensors before each operation, and turns each cast to 16 bits into one to fp32.

    The weights themselves stay as they are: an operation gets a copy, which is freed after it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.float
        args, kwargs = tree_map(widen, (args, kwargs or {}))
        with torch.autocast(self._device, enabled=False):  # a wrapped forward has enabled it again
            return func(*args, **kwargs)


def widen(value: Any) -> Any:
    """Returns a tensor of 16 bits as fp32, and fp32 for a dtype of 16 bits; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALF else value
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


@contextmanager
def in_fp32(device: torch.device) -> Iterator[None]:
    """Computes without gradients, in fp32 on this device: no 16-bit products, no TF32, no compiled graphs.

    A kernel that accepts 16-bit tensors alone raises its own error (8-bit layers of bitsandbytes): see `is_refusal`.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    stance = torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad(), stance, Fp32Mode(device):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def is_refusal(error: Exception) -> bool:
    """Returns whether an error shows that a kernel does not accept its input; not out of memory, not communication."""
    if isinstance(error, (torch.OutOfMemoryError, dist.DistError)):
        return False
    return isinstance(error, (TypeError, ValueError, RuntimeError, AssertionError))
