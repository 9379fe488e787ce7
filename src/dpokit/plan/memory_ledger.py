"""Counts the memory of a training step: every storage that an operation allocates, until it is freed."""

import weakref
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("weights", "reference", "gradients", "optimizer", "activations", "logits")


class Ledger(TorchDispatchMode):
    """Counts the bytes of all live tensors by kind while it is active; for fake tensors, which have no memory.

    Attributes:
        kind: the kind of new tensors.
        by_kind: live bytes.
        peak_bytes: the most bytes alive at once; `at_peak` is `by_kind` at that moment.
        moments: `{gradients: (activations, logits)}` in bytes: for each size of the gradients, the most activations and
            logits alive beside them. From these, placements that shard gradients find their own peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.kind = "activations"
        self.by_kind: Counter[str] = Counter()
        self.peak_bytes = 0
        self.at_peak: dict[str, int] = {}
        self.moments: dict[int, tuple[int, int]] = {}
        self._total = 0
        self._live: dict[int, tuple[int, str, Any]] = {}

    def hold(self, tensor: torch.Tensor, kind: str) -> None:
        """Counts a tensor that was allocated before."""
        self._add(tensor, kind)

    def relabel(self, tensor: torch.Tensor, kind: str) -> None:
        """Moves a tensor to another kind: to `gradients`, once it is the gradient of a parameter."""
        key = tensor.untyped_storage()._cdata
        size, old, reference = self._live[key]
        self.by_kind[old] -= size
        self.by_kind[kind] += size
        self._live[key] = (size, kind, reference)

    def _add(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._live or size == 0:
            return
        self._live[key] = (size, kind, weakref.ref(storage, partial(self._drop, key)))
        self._total += size
        self.by_kind[kind] += size
        if self._total > self.peak_bytes:
            self.peak_bytes, self.at_peak = self._total, dict(self.by_kind)
        beside = (self.by_kind["activations"], self.by_kind["logits"])
        if sum(beside) > sum(self.moments.get(self.by_kind["gradients"], (0, 0))):
            self.moments[self.by_kind["gradients"]] = beside

    def _drop(self, key: int, _: Any) -> None:
        size, kind, _ = self._live.pop(key)
        self._total -= size
        self.by_kind[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, self.kind)
        return result
