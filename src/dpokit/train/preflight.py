"""Gates before the first step: the number of processes, a model that would be its own reference, quantised weights."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module
from trl import ModelConfig

from dpokit.atomic_files import read_record
from dpokit.checkpoint.resume import Start, compare_settings, describe_identity
from dpokit.distributed.processes import check_world_size
from dpokit.errors import MachineError
from dpokit.model.reference import hash_weights
from dpokit.settings.load import Settings
from dpokit.settings.mixture import is_other
from dpokit.train.gates import Gates, list_places

# The folders of models that a run writes; a base model may be in the run folder, too.
RESULTS = ("model", "adapter", "merged")

# Weights of other than linear layers (routers, small convolutions) may stay in 16 bit up to this share of all weights.
SMALL_SHARE = 0.01

# Weights of an adapter stay in 16 bit or more.
OF_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save)(\.|$)")


def check_world(gates: Gates) -> int:
    """The number of processes that train together; trips if it is not the requested number."""
    try:
        return check_world_size()
    except MachineError as error:
        gates.trip(error.seen, expected=error.expected, do=error.do)
        return PartialState().num_processes


def check_start(
    start: Start, settings: Settings, data_fingerprint: str | None, world_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that a later resume must match, and the accepted changes of this one, each `[then, now]`. Rank 0.

    Pairs and model are compared here, as they are not known earlier.

    Raises: RunFolderError if a resumed run would train on other pairs, or started with another model.
    """
    model = settings.model
    weights = hash_weights(str(model.model_name_or_path), model.model_revision)
    identity = describe_identity(settings, world_size=world_size, data_fingerprint=data_fingerprint, model=weights)
    changed = compare_settings(start.manifest["settings"], identity, settings) if start.checkpoint is not None else {}
    return identity, changed


def check_model_path(settings: Settings, gates: Gates) -> None:
    """Trips if an earlier run trained the model on the same pairs: it would become its own reference.

    That is a checkpoint of a preference run, or `model`, `adapter` or `merged` of a run folder. A model that was tuned
    on other pairs is a legitimate start (iterative DPO), and so is every model of supervised training. Rank 0.

    Raises: GateError.
    """
    if settings.kind != "dpo" or not settings.model.model_name_or_path:
        return
    if not Path(settings.model.model_name_or_path).is_dir():
        return
    folder = Path(settings.model.model_name_or_path).resolve()
    is_checkpoint = re.fullmatch(r"checkpoint-\d+", folder.name) is not None
    if not is_checkpoint and folder.name not in RESULTS:
        return
    history = _read_mapping(folder / "trainer_state.json").get("log_history", [])
    preference_run = is_checkpoint and any("rewards/margins" in record for record in history)
    then = {
        name: entry.get("value")
        for name, entry in _read_mapping(folder.parent / "run.json").get("settings", {}).items()
    }
    if then.get("kind") == "sft" or not (_are_same_pairs(settings, then) if then else preference_run):
        return
    origin = (
        f"a checkpoint of a preference run{' on the same pairs' if then else ''}"
        if is_checkpoint
        else f"the result of the run in {folder.parent} on the same pairs"
    )
    base = then.get("model_name_or_path") or "THE_MODEL_THAT_THE_RUN_STARTED_WITH"
    resume = f"--resume_from_checkpoint {folder if is_checkpoint else 'auto'}"
    gates.trip(
        f"--model_name_or_path {folder} is {origin}: it would become its own reference, with margins from 0 again",
        expected="the model that the run started with, or one tuned on other pairs",
        do=f"to resume that run: --model_name_or_path {base} --output_dir {folder.parent} {resume}",
    )


def _are_same_pairs(settings: Settings, then: dict[str, Any]) -> bool:
    now = settings.data
    names = ("dataset_config", "dataset_train_split", "columns", "format", "datasets", "dataset_mixer")
    if any(is_other(name, then.get(name), getattr(now, name)) for name in names):
        return False
    a, b = (str(name or "") for name in (now.dataset_name, then.get("dataset_name")))
    if not a:
        return bool(now.sources())  # the same mixture
    return a == b or (Path(a).exists() and Path(a).resolve() == Path(b).resolve())


def _read_mapping(path: Path) -> dict[str, Any]:
    """The JSON mapping of a file; empty if the file cannot be read or holds something else."""
    try:
        record = read_record(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def check_quantised(policy: PreTrainedModel | PeftModel, model: ModelConfig, gates: Gates) -> None:
    """Trips if weights are not in the requested 4 or 8 bit. Embeddings and the model's own exceptions do not count.

    transformers converts only plain linear layers: subclasses of them, and the experts of a mixture in one parameter,
    stay in 16 bit without a warning; and a checkpoint that is already quantised keeps its own quantisation.

    Raises: GateError.
    """
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    if bits is None:
        return
    policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy
    skipped = getattr(getattr(policy, "hf_quantizer", None), "modules_to_not_convert", None) or []
    sizes: dict[str, int] = {}
    linear, other = [], []
    for place, module in policy.named_modules():
        if isinstance(module, nn.Embedding) or module is policy.get_output_embeddings() or OF_ADAPTER.search(place):
            continue
        for name, weight in module.named_parameters(place, recurse=False):
            if weight.ndim < 2:
                continue
            state = getattr(weight, "quant_state", None)  # has the shape of packed 4-bit weights
            sizes[name] = weight.numel() if state is None else math.prod(state.shape)
            if (weight.dtype == torch.int8) if bits == 8 else (state is not None):
                continue
            if not isinstance(module, (nn.Linear, Conv1D)):
                other.append(name)
            elif should_convert_module(place, skipped):
                linear.append(name)
    total = sum(sizes.values())
    if sum(sizes[name] for name in other) > SMALL_SHARE * total:
        linear += other
    if linear:
        share = sum(sizes[name] for name in linear) / total
        gates.trip(
            f"{share:.0%} of the weights outside the embeddings are not in {bits} bit: {list_places(linear)}",
            expected=f"every layer in {bits} bit, as --load_in_{bits}bit requests",
            do=f"drop --load_in_{bits}bit and train the adapter on the model in 16 bit, or choose a model whose layers "
            "bitsandbytes can convert",
        )
