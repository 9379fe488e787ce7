"""A state's copy on the CPU, from which it can be written while training goes on."""

from typing import Any

import psutil
import torch


def available_bytes() -> int:
    """Memory of this machine that processes may still take."""
    return int(psutil.virtual_memory().available)


class Copier:
    """Copies tensors to the CPU, one for all that share it, so that tied weights stay tied.

    Args:
        buffers: memory to use again, of an earlier copy that nobody reads any more.
    """

    def __init__(self, buffers: list[torch.Tensor]) -> None:
        self.copies: dict[tuple[Any, ...], torch.Tensor] = {}
        self._free: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for buffer in buffers:
            self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def copy(self, leaf: Any) -> Any:
        """A tensor's copy; anything else as it is."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        key = (leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, id(leaf) if leaf.data_ptr() == 0 else 0)
        if key not in self.copies:
            free = self._free.get((leaf.shape, leaf.dtype))
            buffer = free.pop() if free else torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu")
            self.copies[key] = buffer.copy_(leaf.detach())
        return self.copies[key]
