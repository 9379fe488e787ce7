"""Tells rounding from error: runs a model in fp32, whatever the precision of its weights and of its autocast.

Two correct forward passes of a model in bf16 differ by some hundredths of a nat a token, as they round in other places.
So does a pass with positions that are wrong by one. In fp32 correct passes differ by millionths of a nat.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Result = TypeVar("Result")

HALF = {torch.float16, torch.bfloat16}
FATAL = ("allocate memory", "out of memory", "ALLOC_FAILED", "Connection closed", "Connection reset")


def find_fp32_obstacle(model: nn.Module) -> str | None:
    """Returns why a model cannot compute in fp32 beside its own precision; None if it can. Equal on all ranks."""
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}  # bitsandbytes may not be installed
        if "Linear8bitLt" in kinds:
            return "8-bit layers round activations themselves"
        if "Linear4bit" in kinds:
            if module.weight.dtype in HALF:
                return "4-bit weights are stored as 16-bit numbers"
            # In evaluation mode bitsandbytes then computes in bf16 inside its kernel.
            if getattr(module, "support_avx512bf16_for_cpu", False) and not module.training:
                return "4-bit layers compute in bf16 on this CPU"
        if isinstance(module, FSDPModule) and AcceleratorState().mixed_precision != "no":
            return "FSDP2 gathers weights in 16 bits"
    for weight in model.parameters():
        if weight.dtype in HALF and (hasattr(weight, "ds_id") or hasattr(weight, "device_mesh")):
            return "sharded weights in 16 bits are gathered while the model computes"
    return None


class Fp32Mode(TorchFunctionMode):
    """Widens 16-bit tensors before each operation, and turns each cast to 16 bits into one to fp32.

    The weights themselves stay as they are: an operation gets a copy, which is freed after it. So an operation in place
    on a 16-bit tensor changes nothing.

    Attributes:
        is_on: whether a mode is on.
    """

    is_on = False

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
    """Computes without gradients, in fp32 on this device: no 16-bit products, no TF32, no compiled graphs."""
    on_cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch has no types for it
    products: tuple[Any, ...] = (torch.backends.cuda.matmul, on_cpu)
    before, was_on = [product.fp32_precision for product in products], Fp32Mode.is_on
    for product in products:
        product.fp32_precision = "ieee"
    Fp32Mode.is_on = True
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), Fp32Mode(device):
            yield
    finally:
        Fp32Mode.is_on = was_on
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


def computes_in_fp32(model: nn.Module, device: torch.device) -> bool:
    """Returns whether a model computes in fp32 as it is, so that `in_fp32` changes nothing; known only on a CPU.

    Not for a model that a trainer has prepared: its forward may switch autocast on.
    """
    if device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    backends: tuple[Any, ...] = (torch.backends, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # no types
    is_exact = all(backend.fp32_precision in ("none", "ieee") for backend in backends)
    return is_exact and all(weight.dtype == torch.float32 for weight in model.parameters())


def try_in_fp32(model: nn.Module, device: torch.device, compute: Callable[[], Result]) -> Result | None:
    """Returns the result of a computation with a model in fp32.

    None if the model cannot compute in fp32, or if a single process has too little memory for it.
    """
    if find_fp32_obstacle(model) is not None:
        return None
    try:
        with in_fp32(device):
            return compute()
    except torch.OutOfMemoryError:
        if dist.is_initialized():  # the other ranks go on
            raise
        torch.cuda.empty_cache()
        return None
    except Exception as error:
        if not is_refusal(error):
            raise
        return None


def is_refusal(error: Exception) -> bool:
    """Returns whether an error shows that a kernel does not accept its input; not out of memory, not communication."""
    if isinstance(error, (torch.OutOfMemoryError, dist.DistError)) or any(text in str(error) for text in FATAL):
        return False
    return isinstance(error, (TypeError, ValueError, RuntimeError, AssertionError))
