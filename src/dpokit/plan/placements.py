"""The memory of one device under each placement: the traced step, and the share of the states that a device keeps.

P is the number of parameters, T of trained parameters, N of devices. Sources: DeepSpeed 0.19
(`estimate_zero2_model_states_mem_needs`, `estimate_zero3_model_states_mem_needs`), the paper of ZeRO (arXiv 1910.02054)
and accelerate 1.15 (`fsdp2_prepare_model`).
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from dpokit.distributed.placement import check_placement
from dpokit.errors import SettingsError
from dpokit.plan.blueprint import Blueprint
from dpokit.plan.devices import GIB, Devices
from dpokit.plan.optimizer_memory import count_state_bytes
from dpokit.plan.trace import StepMemory
from dpokit.settings.load import Settings

PARTS = ("weights", "gradients", "optimizer", "reference", "activations", "logits", "other")
ONE_DEVICE, DDP, ZERO2, ZERO3, FSDP2, OFFLOAD = (
    *("one device", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-3 + CPU offload"),
)
# In order of recommendation: the simplest and fastest first; offload only if nothing else fits.
CONFIGS = {
    ONE_DEVICE: "single_gpu",
    DDP: "ddp",
    ZERO2: "zero2",
    ZERO3: "zero3",
    FSDP2: "fsdp2",
    OFFLOAD: "zero3_offload",
}

# Assumed, not measured: CUDA's context with the workspaces of libraries, NCCL's buffers, and the share that the caching
# allocator reserves beyond the tensors.
CONTEXT_GIB = 1.0
NCCL_GIB = 0.5
ALLOCATOR_SHARE = 0.05

# DeepSpeed's defaults (runtime/zero/config.py), in numbers; accelerate_configs/ does not change them.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
# DeepSpeed's `additional_buffer_factor`: pinned host memory is allocated in larger pieces than needed.
HOST_FACTOR = 1.5


@dataclass(frozen=True)
class Estimate:
    """The memory of one device under a placement.

    Attributes:
        placement: its name in `dpokit.distributed.placement`.
        parts: bytes of each of `PARTS`.
        host: bytes of host memory for offloaded states.
        fits: whether device and host have this much memory; a host of unknown memory has.
        refused: why a run with these settings refuses the placement; None if it accepts it.
    """

    placement: str
    parts: dict[str, int]
    host: int
    fits: bool
    refused: str | None = None

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Model:
    """A blueprint and its two traces.

    Attributes:
        whole: the step with weights in `--dtype` under autocast, for one device and DDP.
        sharded: the step with weights in the compute dtype, as ZeRO and FSDP2 use them.
        quantised: whether base weights are 4- or 8-bit.
        compute_bytes: bytes of one number in the compute dtype.
        optim: the optimizer's name.
    """

    blueprint: Blueprint
    whole: StepMemory
    sharded: StepMemory
    quantised: bool
    compute_bytes: int
    optim: Any

    def states(self, numbers: int) -> int:
        """Bytes of the optimizer states of this many fp32 numbers."""
        return count_state_bytes(self.optim, torch.empty(numbers, device="meta"))


def list_estimates(model: Model, settings: Settings, devices: Devices) -> list[Estimate]:
    """The memory of every placement that these GPUs allow, simplest first."""
    names = list(CONFIGS) if devices.count > 1 else [ONE_DEVICE, OFFLOAD]
    estimates = []
    for name in names:
        parts, host = _count(name, model, devices=devices.count)
        estimate = Estimate(name, parts, host, fits=False, refused=find_refusal(name, settings))
        enough = estimate.total <= devices.memory_gib * GIB and (
            devices.host_gib is None or host <= devices.host_gib * GIB
        )
        estimates.append(
            Estimate(name, parts, host, fits=enough and estimate.refused is None, refused=estimate.refused)
        )
    return estimates


def find_refusal(placement: str, settings: Settings) -> str | None:
    """Why a run with these settings refuses the placement; None if it accepts it."""
    training = copy.copy(settings.training)
    if placement.startswith("ZeRO"):
        device = "cpu" if placement == OFFLOAD else "none"
        zero = {"offload_optimizer": {"device": device}, "offload_param": {"device": device}}
        training.deepspeed_plugin = SimpleNamespace(
            zero_stage=2 if placement == ZERO2 else 3, deepspeed_config={"zero_optimization": zero}
        )
    elif placement == FSDP2:
        training.fsdp, training.fsdp_config = True, {"version": 2}
    try:
        check_placement(training, settings.model)
    except SettingsError as error:
        if settings.origins.get("precompute_ref_log_probs") == "this machine":
            return "it keeps the reference in memory: plan it with --precompute_ref_log_probs false"
        return error.seen.rpartition(": ")[2]
    return None


def _count(placement: str, model: Model, *, devices: int) -> tuple[dict[str, int], int]:
    """Bytes of each part on one device, and bytes on the host."""
    if placement in (ONE_DEVICE, DDP):
        return _count_whole(model, ddp=placement == DDP), 0
    if placement == FSDP2:
        return _count_fsdp2(model, devices=devices), 0
    return _count_zero(placement, model, devices=devices)


def _count_whole(model: Model, *, ddp: bool) -> dict[str, int]:
    """Each device has all; gradients and AdamW's moments have the weights' dtype. DDP's buckets copy the gradients."""
    traced = model.whole
    gradients, (activations, logits) = max(traced.moments.items(), key=lambda moment: moment[0] + sum(moment[1]))
    parts = {
        "weights": traced.weights,
        "gradients": gradients,
        "optimizer": traced.states,
        "reference": traced.reference,
        "activations": activations,
        "logits": logits,
    }
    return parts | {"other": _other(activations + logits, several=ddp) + (traced.trained if ddp else 0)}


def _count_zero(placement: str, model: Model, *, devices: int) -> tuple[dict[str, int], int]:
    """ZeRO-2 in bf16: 2P + 18T/N bytes. ZeRO-3: (2P + 18T)/N and gathered layers. Offload: the same on the host.

    18 = 2 for the weight, 2 + 4 for the gradient in 16 and 32 bit, 4 for the fp32 weight, 8 for AdamW's moments.
    """
    traced, size = model.sharded, model.compute_bytes
    trained = model.blueprint.trained_parameters
    activations, logits = max(traced.moments.values(), key=sum)
    share = 1 if placement == ZERO2 else devices
    weights = traced.weights // share
    gradients = (size + 4 if size < 4 else 4) * trained // devices
    optimizer = (4 * trained + model.states(trained)) // devices
    reference = traced.reference // share
    gathered = 0 if placement == ZERO2 else min(traced.weights, size * MAX_LIVE_PARAMETERS)
    other = _other(activations + logits, several=devices > 1) + size * REDUCE_BUCKET + gathered
    parts = dict(zip(PARTS, (weights, gradients, optimizer, reference, activations, logits, other), strict=True))
    if placement != OFFLOAD:
        return parts, 0
    on_host = devices * (weights + gradients + optimizer + reference)
    stays = dict.fromkeys(("weights", "gradients", "optimizer", "reference"), 0)
    return parts | stays, round(HOST_FACTOR * on_host)


def _count_fsdp2(model: Model, *, devices: int) -> dict[str, int]:
    """Trained weights, gradients and moments are sharded in fp32, frozen weights in their own dtype.

    FSDP2 gathers a block while the previous block and its gradients are still gathered, and gathers the LM head whole.
    4-bit weights stay whole on each device.
    """
    traced, size = model.sharded, model.compute_bytes
    trained = model.blueprint.trained_parameters
    activations, logits = max(traced.moments.values(), key=sum)
    frozen = model.whole.weights - model.whole.trained
    weights = (frozen if model.quantised else frozen // devices) + 4 * trained // devices
    block = 0 if model.quantised else model.blueprint.block_parameters
    head = 4 if trained >= model.blueprint.parameters else size
    gathered = 2 * size * block + head * model.blueprint.head_parameters
    if trained >= model.blueprint.parameters:
        gathered += (size + 4) * block  # a block's gradients, and their fp32 sum
    return {
        "weights": weights,
        "gradients": 4 * trained // devices,
        "optimizer": model.states(trained) // devices,
        "reference": model.whole.reference // devices,
        "activations": activations,
        "logits": logits,
        "other": _other(activations + logits, several=True) + gathered,
    }


def _other(step_bytes: int, *, several: bool) -> int:
    return round((CONTEXT_GIB + NCCL_GIB * several) * GIB + ALLOCATOR_SHARE * step_bytes)
