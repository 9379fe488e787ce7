"""A GPU that computes on the CPU and counts what a real one would wait for; and a run on it. A program of its own.

    ACCELERATE_TORCH_DEVICE=fake python tests/waits.py SETTINGS.json RESULT.json

The device is torch's spare backend, under the name `fake`. Its tensors wrap tensors of the CPU, so that a run has real
losses. A read of a value, a choice by a mask, and a copy between the devices that is not from pinned memory and
non-blocking are waits, as `torch.cuda.set_sync_debug_mode` would report them.
"""

import json
import os
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"
CPU = torch.device("cpu")
ATEN = torch.ops.aten
READS = (ATEN._local_scalar_dense, ATEN.equal, ATEN.is_nonzero, ATEN.nonzero, ATEN.masked_select, ATEN.unique_dim)
CHOICES = (ATEN.index, ATEN.index_put, ATEN.index_put_)  # by masks, or by indices that are on the other device
PINS = (ATEN.pin_memory, ATEN._pin_memory)


class Counter(TorchDispatchMode):
    """Runs the operations of the device, and counts.

    Attributes:
        waits: operation and place in the source of each wait since the last `take`.
        copies: copies from pinned memory, for which nothing waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies = 0

    def __enter__(self) -> "Counter":
        torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device=NAME) copies out of sight
        super().__enter__()
        return self

    def take(self) -> dict[str, Any]:
        taken = {"waits": self.waits, "copies": self.copies}
        self.waits, self.copies = [], 0
        return taken

    def note(self, name: str) -> None:
        frames = traceback.extract_stack()[:-3]  # without note, count and run
        hidden = ("__torch_dispatch__", "tolist")
        own = [f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename and f.name not in hidden]
        self.waits.append(f"{name} at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        if packet in PINS:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        is_there = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        self.count(packet, args, kwargs, is_there, device)
        own_args, own_kwargs = tree_map_only(OnDevice, lambda tensor: tensor.held, (args, kwargs))
        if device is not None:
            own_kwargs |= {"device": CPU, **({"pin_memory": False} if "pin_memory" in kwargs else {})}
        result = func(*own_args, **own_kwargs)
        if packet is ATEN.copy_:
            return args[0]
        if not (is_there if device is None else device.type == NAME):
            return result
        result = tree_map(lambda value: OnDevice(value) if isinstance(value, torch.Tensor) else value, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if is_there else result

    def count(self, packet: Any, args: Any, kwargs: Any, is_there: bool, device: torch.device | None) -> None:
        name = str(packet)
        if is_there and packet in READS:
            self.note(name)
        if is_there and packet in CHOICES:
            chosen = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool or not isinstance(index, OnDevice) for index in chosen):
                self.note(name)
        if packet is ATEN._to_copy and device is not None and is_there != (device.type == NAME):
            if not is_there and kwargs.get("non_blocking") and getattr(args[0], "is_pinned_here", False):
                self.copies += 1
            else:
                self.note(name)
        if packet is ATEN.copy_ and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            self.note(name)


COUNTER = Counter()


class OnDevice(torch.Tensor):
    """A tensor of the device; `held` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device(NAME, 0), **layout)
        wrapper.held = inner
        return wrapper

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"

    def tolist(self) -> list[Any]:  # torch has none for such tensors
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return COUNTER.run(func, args, kwargs or {})


def attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries_at: torch.Tensor,
    keys_at: torch.Tensor,
    *_: int,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Computes what `varlen_attn` documents: the causal mask of each sequence ends at its last query and last key."""
    assert window_size == (-1, 0), "causal"
    ends = [getattr(offsets, "held", offsets).tolist() for offsets in (queries_at, keys_at)]
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    parts = []
    for (first, last), (first_key, last_key) in zip(*map(pairwise, ends), strict=True):
        queries = query[first:last].transpose(0, 1)
        keys, values = (
            states[first_key:last_key].repeat_interleave(groups, dim=1).transpose(0, 1) for states in (key, value)
        )
        scores = queries @ keys.transpose(1, 2) * (queries.shape[-1] ** -0.5 if scale is None else scale)
        allowed = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device)
        allowed = allowed.tril(diagonal=(last_key - first_key) - (last - first))
        weights = scores.float().masked_fill(~allowed, float("-inf")).softmax(dim=-1).to(values.dtype)
        parts.append((weights @ values).transpose(0, 1))
    return torch.cat(parts)


# Each makes the CPU wait for a tensor of the device.
PLANTED = {
    "item": lambda loss: loss.item(),
    "float": float,
    "if": bool,
    "equal": lambda loss: torch.equal(loss, loss),
    "mask": lambda loss: loss[None][loss[None] > 0],
    "nonzero": lambda loss: loss[None].nonzero(),
    "cpu": lambda loss: loss.cpu(),
    "tolist": lambda loss: loss[None].tolist(),
    "tensor": lambda loss: torch.tensor([1, 2], device=loss.device),
    "to": lambda loss: torch.ones(2).to(loss.device),
    "to, not pinned": lambda loss: torch.ones(2).to(loss.device, non_blocking=True),
    "index of the CPU": lambda loss: loss[None][torch.tensor([0])],
}


def run_on_device(settings: dict[str, Any], *, on_device: bool, planted: list[str]) -> dict[str, Any]:
    """Trains, with a planted wait in each step after the second; returns the last log, and the waits of each step."""
    from dpokit import run
    from dpokit.model import score, shared_prefix
    from dpokit.train.dpo_trainer import PairTrainer
    from dpokit.train.saving import SavingTrainer

    steps: list[dict[str, Any]] = []
    logs: list[dict[str, Any]] = []
    plants = {number: PLANTED[name] for number, name in enumerate(planted, start=2)}

    class Marks(run.ScreenCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append(COUNTER.take())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            history.append(logs)

    history = logs
    run.ScreenCallback = Marks
    SavingTrainer.save_weights = lambda *_: None  # safetensors reads memory that the device's tensors do not have
    compute = PairTrainer.compute_loss

    def compute_and_plant(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(trainer, *args, **kwargs)
        plants.get(trainer.state.global_step, lambda _: None)(loss.detach())
        return loss

    PairTrainer.compute_loss = compute_and_plant
    shared_prefix._find_flash_dtype = lambda query: query.dtype if query.dtype == torch.bfloat16 else None
    shared_prefix.varlen_attn = attend_plainly
    score._uses_triton = lambda _: True  # as on a GPU
    if on_device:
        with COUNTER:
            run.train("waits", settings, [])
    else:
        run.train("waits", settings, [])
    return {"log": logs, "steps": [*steps[1:], COUNTER.take()]}


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    if task["on_device"]:
        _setup_privateuseone_for_python_backend(NAME)
    Path(sys.argv[2]).write_text(json.dumps(run_on_device(**task)))


if __name__ == "__main__":
    main()
