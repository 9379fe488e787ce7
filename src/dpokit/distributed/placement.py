"""Where weights, gradients and optimizer states live: what the launcher was asked for, and what is in force.

accelerate drops some placements without a word (FSDP on CPU becomes DDP), so the prepared model itself is looked at.
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


def find_asked_placement(training: DPOConfig) -> str:
    """`one device`, `DDP`, `ZeRO-1` to `ZeRO-3` (with ` + CPU offload`), `FSDP1` or `FSDP2`.

    From accelerate's config file, by the environment that its launcher sets, or from `--deepspeed` and `--fsdp`.
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
    """The placement that a prepared model is in, in the words of `find_asked_placement`, offload left out.

    A sharded model counts as sharded only if its parameters are: with every parameter whole on this rank, it is not.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    parameters: list[Any] = list(model.parameters())
    if type(model).__name__ == "DeepSpeedEngine":  # by name: DeepSpeed is imported through accelerate alone
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
    alone = PartialState().num_processes == 1  # DDP of one process is none
    return "DDP" if isinstance(model, DistributedDataParallel) and not alone else "one device"


def check_placement(training: DPOConfig, model: ModelConfig) -> None:
    """Raises SettingsError for what is known not to work under the placement asked for, with the nearest that does."""
    placement = find_asked_placement(training)
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
    elif getattr(training, "precompute_ref_log_probs", False):  # a flag of DPO's alone
        why, nearest = find_precompute_trouble(training, model) or ("", "")
    if nearest:
        raise SettingsError(
            f"this does not work under {placement}: {why}",
            expected="a combination that works: docs/placements.md has the table of placements",
            do=f"{nearest} (accelerate_configs/ has a file for each placement)",
        )


def find_precompute_trouble(training: DPOConfig, model: ModelConfig) -> tuple[str, str] | None:
    """Why the reference cannot be computed ahead under the placement asked for, and the nearest that works."""
    placement = find_asked_placement(training)
    if placement.startswith("FSDP") and not training.use_cpu:
        # TRL 1.16, `_precompute_ref_logps`: it wraps the model for DeepSpeed alone. Delete when it does for FSDP.
        return (
            "--precompute_ref_log_probs comes before the model is sharded, while its weights are not on the GPU",
            "--precompute_ref_log_probs false, or ZeRO-3",
        )
    if placement.startswith("ZeRO-3") and model.use_peft:
        # Its trace of the modules breaks where the adapter's were passed over: "pop from an empty deque".
        return (
            "DeepSpeed 0.19.8 loses track of an adapter's model that precomputed the reference",
            "--precompute_ref_log_probs false (the adapter switched off is the reference), or ZeRO-2",
        )
    return None


def shard_on_cpu(training: DPOConfig) -> None:
    """Makes accelerate shard by FSDP2 where the devices are CPU processes; called before its Accelerator is built.

    accelerate asks for FSDP only where the processes are GPUs or the like, and runs DDP on CPU. Told that these are
    such, it shards them for real, over gloo. Delete when accelerate knows FSDP on CPU.
    """
    if training.use_cpu and PartialState().distributed_type != DistributedType.NO and _asks_for_fsdp(training):
        PartialState().distributed_type = DistributedType.MULTI_GPU


def _asks_for_fsdp(training: DPOConfig) -> bool:
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
