"""Moves a micro-batch to the GPU in one copy for which nothing waits.

A copy from ordinary memory makes the CPU wait until the GPU has computed everything before it, and so does reading a
tensor's value. The GPU then idles until the CPU has queued the next operations. So collators count and pack on the CPU,
and a batch is copied from pinned memory.
"""

from collections.abc import Callable
from typing import Any, Self

import torch

from dpokit.model.packed_rows import Packed

ALIGNED_BYTES = 16  # each tensor begins at a multiple of this, as a view of the bytes with another dtype needs


class HostBatch(dict[str, Any]):
    """A batch on the CPU, as a collator returns it: tensors, the layout of its pairs, and numbers.

    The loader calls `pin_memory`, and accelerate calls `to`.
    """

    _pinned: torch.Tensor | None = None

    def pin_memory(self) -> Self:
        """Copies all tensors into one buffer of pinned memory."""
        self._pinned = self._join().pin_memory()
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> dict[str, Any]:
        """Returns the batch on a device; its tensors are views of one buffer there, with one version counter.

        accelerate's `non_blocking` does not count: a copy must wait if its memory is not pinned, and only then.
        """
        if torch.device(device).type == "cpu":
            return dict(self)
        source = self._join() if self._pinned is None else self._pinned
        buffer, start = source.to(device, non_blocking=self._pinned is not None), 0

        def take(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal start
            part = buffer[start : start + tensor.nbytes]
            start += _pad(tensor.nbytes)
            return part.view(tensor.dtype).view(tensor.shape)

        return self._map(take)

    def _join(self) -> torch.Tensor:
        """All tensors' bytes, one after the other: `(bytes,)`, uint8."""
        tensors: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        self._map(keep)
        buffer, start = torch.zeros(sum(_pad(tensor.nbytes) for tensor in tensors), dtype=torch.uint8), 0
        for tensor in tensors:
            buffer[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
            start += _pad(tensor.nbytes)
        return buffer

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """A plain dict with every tensor changed, always in the same order."""
        changed: dict[str, Any] = {}
        for name, value in self.items():
            if isinstance(value, Packed):
                changed[name] = value.map(change)
            else:
                changed[name] = change(value) if isinstance(value, torch.Tensor) else value
        return changed


def _pad(size: int) -> int:
    return -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
