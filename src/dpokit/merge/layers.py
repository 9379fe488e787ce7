"""Merges an adapter into its base layer by layer in fp32."""

import hashlib
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
from dpokit.model.tuned_folder import plan_dtypes
from dpokit.settings.load import Settings

MERGED_ALREADY = "All adapters are already merged"  # PEFT's warning when it unwraps layers that are merged here
NO_LONGER_TIED = "Input and output embeddings are no longer tied"  # `_settle_ties` reports this instead


def check_adapter_file(folder: Path) -> str:
    """Returns the sha256 of an adapter's weights file. Raises: ModelError: it is missing, damaged or not finite."""
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
            expected="the complete file that training wrote",
            do="restore it from a copy, or merge a checkpoint: --checkpoint N",
        ) from error
    if broken:
        raise ModelError(
            f"the adapter {file} holds values that are not finite, in {broken[0]}"
            + (f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""),
            expected="finite values",
            do="merge an earlier checkpoint (--checkpoint N), and check metrics.jsonl for the step that broke it",
        )
    return digest


def load_trained(settings: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """Loads the policy as in training: on the run's device, and quantised if it was. Raises: ModelError."""
    return load_frozen(settings, str(folder), tokenizer)


def load_to_merge(
    settings: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase, *, dequantised: bool
) -> PreTrainedModel | PeftModel:
    """Loads the policy on the CPU, without quantisation, in the dtype of the training.

    Args:
        dequantised: give the base's layers their dequantised 4-bit or 8-bit values, with which the adapter was trained.

    Raises: ModelError.
    """
    model = name_model(settings, str(folder))
    model.load_in_4bit = model.load_in_8bit = False
    policy = load_policy(replace(settings, model=model), tokenizer).requires_grad_(False)
    if isinstance(policy, PeftModel) and dequantised:
        _set_dequantised(policy, settings, str(find_base(model)), tokenizer)
    return policy


def _set_dequantised(policy: PeftModel, settings: Settings, base: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the base's layers that were quantised to their dequantised values.

    transformers' own `dequantize` puts a Linear in place of GPT-2's Conv1D, whose weights are transposed, so the result
    could not be loaded.
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
    """Whether the run loaded its base in 4 or 8 bits."""
    return get_quantization_config(settings.model) is not None


def merge_layers(policy: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Merges the policy in place and returns a plain model in `dtype`; needs memory for the model and one layer.

    Each layer's base and adapter are upcast to fp32, merged, and rounded once.

    Raises: ModelError: a value is not finite in `dtype`.
    """
    model = _merge_adapter(policy, dtype) if isinstance(policy, PeftModel) else policy
    weights = dict(model.named_parameters())
    for name, plan in plan_dtypes(model, list(weights), dtype).items():
        weight = weights[name]
        if weight.is_floating_point():
            weight.data = weight.data.to(plan)
            if not torch.isfinite(weight.data).all():
                raise ModelError(
                    f"{name} of the merged model holds values that are not finite in {str(plan).split('.')[1]}",
                    expected="weights within the range of the dtype",
                    do="--dtype bfloat16 or --dtype float32"
                    if plan == torch.float16
                    else "restore the base or the adapter from a copy: one of them is damaged",
                )
    return model


def _merge_adapter(policy: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    _untie_adapted(policy, layers)
    for layer in layers:
        for weight in layer.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:  # not finite; `check_adapter_file` has checked the adapter's own values
            raise ModelError(
                f"merging a layer gives values that are not finite: {error}",
                expected="a base and an adapter with finite values",
                do="check the base's weights, and lora_alpha and r in adapter_config.json",
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


def _untie_adapted(policy: PeftModel, layers: list[Any]) -> None:
    """Copies each adapted weight that another module shares (a tied embedding), which the merge must not change."""
    owners: dict[int, int] = {}
    for module in policy.modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    for base in {id(layer.get_base_layer()): layer.get_base_layer() for layer in layers}.values():
        for name, weight in list(base.named_parameters(recurse=False)):
            if owners[id(weight)] > 1:
                setattr(base, name, nn.Parameter(weight.detach().clone(), requires_grad=False))


def _settle_ties(merged: PreTrainedModel, *, tied: bool) -> None:
    """Ties embedding and head again if they are still equal; otherwise sets the config to untied."""
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if not tied or embedding is None or head is None:
        return
    same = torch.equal(embedding.weight, head.weight)
    if same:
        head.weight = embedding.weight
    else:
        say("the adapter changed only the embedding or only the LM head: the merged model has two separate weights")
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = same
