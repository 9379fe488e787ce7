"""Adapter and base become one model, layer by layer in fp32."""

import hashlib
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from trl import get_quantization_config

from dpokit.console import say
from dpokit.errors import ModelError
from dpokit.model.check import ADAPTER_FILE
from dpokit.model.load import find_base, load_frozen, load_policy, name_model
from dpokit.settings.load import Settings

MERGED_ALREADY = "All adapters are already merged"  # PEFT, when the layers that are merged here are unwrapped
NO_LONGER_TIED = "Input and output embeddings are no longer tied"  # said by `_settle_ties` instead


def check_adapter_file(folder: Path) -> str:
    """The sha256 of an adapter's tensors file. Raises: ModelError where it is missing, torn or not finite."""
    file = folder / ADAPTER_FILE
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            broken = [name for name in names if not torch.isfinite(tensors.get_tensor(name)).all()]
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the adapter {file} cannot be read: {error}",
            expected="the whole file that training wrote",
            do="take another copy of it, or merge a checkpoint: --checkpoint N",
        ) from error
    if broken:
        raise ModelError(
            f"the adapter {file} holds values that are not finite, in {broken[0]}"
            + (f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""),
            expected="numbers",
            do="merge an earlier checkpoint (--checkpoint N), and look at metrics.jsonl for the step that broke it",
        )
    return digest


def load_trained(settings: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """The policy as it was trained, on the run's device: quantised where it was. Raises: ModelError."""
    return load_frozen(settings, str(folder), tokenizer)


def load_to_merge(
    settings: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase, *, dequantised: bool
) -> PreTrainedModel | PeftModel:
    """The policy on the CPU, nothing of it quantised, in the dtype it was trained in.

    Args:
        dequantised: the base's layers have the values that 4 or 8 bits left of them, as training saw them.

    Raises: ModelError.
    """
    asked = name_model(settings, str(folder))
    asked.load_in_4bit = asked.load_in_8bit = False
    policy = load_policy(replace(settings, model=asked), tokenizer).requires_grad_(False)
    if isinstance(policy, PeftModel) and dequantised:
        _take_dequantised(policy, settings, str(find_base(asked)), tokenizer)
    return policy


def _take_dequantised(policy: PeftModel, settings: Settings, base: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the base's quantised layers to what is left of them.

    transformers' own `dequantize` leaves Linear where GPT-2 has Conv1D, whose weights are transposed: nothing loads it.
    """
    quantised = load_frozen(settings, base, tokenizer)
    plain = policy.get_base_model()
    for name, module in quantised.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ not in ("Params4bit", "Int8Params"):
            continue
        values = dequantize_bnb_weight(weight, getattr(module, "state", None))
        layer: Any = plain.get_submodule(name)
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        layer.weight.data = (values.T if isinstance(layer, Conv1D) else values).to(layer.weight).contiguous()


def is_quantised(settings: Settings) -> bool:
    """Whether the run's base was loaded in 4 or 8 bit."""
    return get_quantization_config(settings.model) is not None


def merge_layers(policy: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """One plain model in `dtype`, made of what was given: memory of the model once, and of one layer.

    Each layer's base and adapter are upcast to fp32, merged, and rounded once.

    Raises: ModelError where a value does not fit `dtype`.
    """
    model = _merge_adapter(policy, dtype) if isinstance(policy, PeftModel) else policy
    kept = model._get_dtype_plan(dtype)  # what the model itself wants in fp32, also in 16 bit
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            plan = next((kept[part] for part in kept if re.search(rf"(^|\.){part}(\.|$)", name)), dtype)
            weight.data = weight.data.to(plan)
            if not torch.isfinite(weight.data).all():
                raise ModelError(
                    f"{name} of the merged model holds values that are not finite in {str(plan).split('.')[1]}",
                    expected="weights that fit the type",
                    do="--dtype bfloat16 or --dtype float32"
                    if plan == torch.float16
                    else "look at base and adapter: one of them is damaged",
                )
    return model


def _merge_adapter(policy: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    _part_shared(policy, layers)
    for layer in layers:
        for weight in layer.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:  # not finite; the adapter's own values were looked at before
            raise ModelError(
                f"merging a layer gives values that are not finite: {error}",
                expected="a base and an adapter of numbers",
                do="look at the base's weights, and at lora_alpha and r in adapter_config.json",
            ) from error
        for weight in layer.get_base_layer().parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        for message in (MERGED_ALREADY, NO_LONGER_TIED):
            warnings.filterwarnings("ignore", message=message)
        tied = bool(policy.get_base_model().config.get_text_config().tie_word_embeddings)
        merged: PreTrainedModel = policy.merge_and_unload(safe_merge=True)
    _settle_ties(merged, tied=tied)
    return merged


def _part_shared(policy: PeftModel, layers: list[Any]) -> None:
    """Gives each adapted layer a weight of its own: what it shares (a tied embedding) must not change with it."""
    owners: dict[int, int] = {}
    for module in policy.modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    for base in {id(layer.get_base_layer()): layer.get_base_layer() for layer in layers}.values():
        for name, weight in list(base.named_parameters(recurse=False)):
            if owners[id(weight)] > 1:
                setattr(base, name, nn.Parameter(weight.detach().clone(), requires_grad=False))


def _settle_ties(merged: PreTrainedModel, *, tied: bool) -> None:
    """Ties embedding and head again where they are still the same; else the config says that they are two."""
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if not tied or embedding is None or head is None:
        return
    same = torch.equal(embedding.weight, head.weight)
    if same:
        head.weight = embedding.weight
    else:
        say("the adapter changed the embedding or the LM head alone: the merged model holds them as two weights")
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = same
