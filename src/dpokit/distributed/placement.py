"""Placements of weights, gradients and optimizer states: the requested one, and the one in force.

accelerate drops some placements silently (FSDP on CPU becomes DDP), so the prepared model itself is inspected.
"""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from trl import DPOConfig, ModelConfig

from dpokit.errors import SettingsError


def find_requested_placement(training: DPOConfig) -> str:
    """The requested placement: `one device`, `DDP`, `ZeRO-1` to `ZeRO-3` (or with ` + CPU offload`), `FSDP1`, `FSDP2`.

    It comes from accelerate's config file, by the environment that its launcher sets, or from `--deepspeed`, `--fsdp`.
    """
    plugin = training.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        devices = {(zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")}
        return f"ZeRO-{plugin.zero_stage}" + (" + CPU offload" if "cpu" in devices else "")
    if _asks_for_fsdp(training):
        # accelerate's own default is version 1, unless the training arguments say otherwise.
        version = (training.fsdp_config or {}).get("version") if training.fsdp else os.environ.get("FSDP_VERSION")
        return f"FSDP{version or 1}"
    return "one device" if training.world_size == 1 else "DDP"


def find_placement(model: Any) -> str:
    """The placement of a prepared model, named as in `find_requested_placement` but without offload.

    A model counts as sharded only if this rank holds less than the whole of some parameter.
    """
    model = getattr(model, "_orig_mod", model)  # the model that torch.compile wraps
    parameters: list[Any] = list(model.parameters())
    if type(model).__name__ == "DeepSpeedEngine":  # by name, because only accelerate imports DeepSpeed
        stage = model.zero_optimization_stage()
        sharded = any(hasattr(p, "ds_tensor") and p.ds_tensor.numel() < p.ds_numel for p in parameters)
        return f"ZeRO-{stage}" if stage < 3 or sharded or model.world_size == 1 else "ZeRO-3, nothing sharded"
    if isinstance(model, FSDPModule):
        shards = [p for p in parameters if isinstance(p, DTensor)]
        sharded = any(p.to_local().numel() < p.numel() for p in shards)
        return "FSDP2" if sharded or PartialState().num_processes == 1 else "FSDP2, nothing sharded"
    if isinstance(model, FullyShardedDataParallel):
        return "FSDP1"
    if isinstance(model, DataParallel):
        return "DataParallel"
    alone = PartialState().num_processes == 1  # DDP with one process counts as one device
    return "DDP" if isinstance(model, DistributedDataParallel) and not alone else "one device"


def check_placement(training: DPOConfig, model: ModelConfig) -> None:
    """Raises SettingsError for settings that do not work under the requested placement; names the nearest that do."""
    placement = find_requested_placement(training)
    fsdp, zero = placement.startswith("FSDP"), placement.startswith("ZeRO")
    optimizer = str(getattr(training.optim, "value", training.optim))
    nearest = ""
    if placement == "FSDP1":
        why, nearest = "FSDP1 is retired by PyTorch, and its sharding of LoRA is not tested here", "FSDP2"
    elif model.load_in_8bit and (fsdp or zero):
        why = "an 8-bit layer cannot be sharded" if fsdp else "a checkpoint with 8-bit layers is not read back"
        nearest = "--load_in_4bit instead of --load_in_8bit, or DDP"
    elif fsdp and ("8bit" in optimizer or "4bit" in optimizer or optimizer.startswith("paged")):
        why = f"--optim {optimizer} has no step for a sharded tensor"
        nearest = "--optim adamw_torch, or ZeRO-2 or ZeRO-3 with this optimizer"
    elif getattr(training, "precompute_ref_log_probs", False):  # SFTConfig does not have this flag
        why, nearest = find_precompute_trouble(training, model) or ("", "")
    if nearest:
        raise SettingsError(
            f"this does not work under {placement}: {why}",
            expected="a combination that works: docs/placements.md has the table of placements",
            do=f"{nearest} (accelerate_configs/ has a file for each placement)",
        )


def find_precompute_trouble(training: DPOConfig, model: ModelConfig) -> tuple[str, str] | None:
    """Why the reference cannot be precomputed under the requested placement, and the nearest option; None if it can."""
    placement = find_requested_placement(training)
    if placement.startswith("FSDP") and not training.use_cpu:
        # TRL 1.16, `_precompute_ref_logps`: wraps the model only for DeepSpeed. Delete when it also does so for FSDP.
        return (
            "--precompute_ref_log_probs comes before the model is sharded, while its weights are not on the GPU",
            "--precompute_ref_log_probs false, or ZeRO-3",
        )
    if placement.startswith("ZeRO-3") and model.use_peft:
        # DeepSpeed's trace of modules fails if the adapter's modules were skipped: "pop from an empty deque".
        return (
            "DeepSpeed 0.19.8 loses track of an adapter's model that precomputed the reference",
            "--precompute_ref_log_probs false (the adapter switched off is the reference), or ZeRO-2",
        )
    return None


def shard_on_cpu(training: DPOConfig) -> None:
    """Makes accelerate shard by FSDP2 on CPU processes; called before the Accelerator is built.

    accelerate enables FSDP only for GPUs and similar devices, and runs DDP on CPU. With the distributed type MULTI_GPU
    it shards CPU processes over gloo. Delete when accelerate supports FSDP on CPU.
    """
    if training.use_cpu and PartialState().distributed_type != DistributedType.NO and _asks_for_fsdp(training):
        PartialState().distributed_type = DistributedType.MULTI_GPU


def _asks_for_fsdp(training: DPOConfig) -> bool:
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
