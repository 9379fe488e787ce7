"""The model without weights: built from its config on the meta device, with adapter and quantisation as in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import get_quantization_config

from dpokit.errors import ModelError
from dpokit.model.gguf import find_model_folder
from dpokit.model.load import build_peft_config, find_base
from dpokit.settings.load import Settings


@dataclass(frozen=True)
class Blueprint:
    """A policy and its reference, if a run keeps one in memory, on the meta device.

    Attributes:
        parameters: number of parameters without adapters; a quantised weight counts as the numbers that it encodes.
        adapter_parameters: parameters of the trained adapter.
        trained_parameters: all parameters that the optimizer updates.
        block_parameters: parameters of the largest repeated block, which sharded placements gather at once.
        head_parameters: parameters of the LM head.
    """

    policy: PreTrainedModel | PeftModel
    reference: PreTrainedModel | None
    parameters: int
    adapter_parameters: int
    trained_parameters: int
    block_parameters: int
    head_parameters: int


def load_config(settings: Settings) -> Any:
    """Loads only the model's config. Raises: ModelError if it cannot be loaded; SettingsError from `find_base`."""
    model = settings.model
    if not model.model_name_or_path:
        raise ModelError("no model is named", expected="a Hub id or a folder", do="--model_name_or_path ID|FOLDER")
    try:
        name = find_model_folder(find_base(model) or model.model_name_or_path)
        return AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=settings.training.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"--model_name_or_path {model.model_name_or_path}: no config could be loaded: "
            f"{' '.join(str(error).split())[:300]}",
            expected="a Hub id that this machine can reach, or a folder with config.json and a tokenizer",
            do="check the name; for a gated model log in with `hf auth login`; without a network name a folder",
        ) from error


def build_blueprint(settings: Settings, config: Any, *, dtype: torch.dtype | None = None) -> Blueprint:
    """Builds policy and reference as `model.load` and DPOTrainer do, without weights.

    Args:
        settings: the run's settings.
        config: the model's config.
        dtype: the weights' dtype; None for `--dtype`.

    Raises:
        ModelError: the config is not one of a causal language model.
        SettingsError: the model has none of LoRA's target modules.
    """
    policy = _build_causal_lm(settings, config, dtype)
    parameters = sum(p.numel() for p in policy.parameters())
    block = max(
        (sum(p.numel() for p in child.parameters()) for layers in _block_lists(policy) for child in layers),
        default=parameters,
    )
    head = policy.get_output_embeddings().weight.numel()
    policy = _add_adapter(settings, _quantise(settings, policy), as_is=dtype is not None)
    trained = [p for p in policy.parameters() if p.requires_grad]
    alone = settings.model.use_peft or settings.training.precompute_ref_log_probs
    reference = None if alone else _build_causal_lm(settings, config, dtype).requires_grad_(False)
    return Blueprint(
        policy,
        reference,
        parameters=parameters,
        adapter_parameters=sum(p.numel() for p in trained) if settings.model.use_peft else 0,
        trained_parameters=sum(p.numel() for p in trained),
        block_parameters=block,
        head_parameters=head,
    )


def find_dtype(settings: Settings, config: Any) -> torch.dtype:
    """Returns the weights' dtype: that of `--dtype`; for `auto` that of the config, or float32 if it has none."""
    name = settings.model.dtype
    if name in ("auto", None):
        return getattr(config.get_text_config(), "dtype", None) or torch.float32
    dtype = getattr(torch, str(name), torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _build_causal_lm(settings: Settings, config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    attention = settings.model.attn_implementation
    if attention is not None and attention.startswith("flash"):
        # FlashAttention keeps the same tensors as SDPA: the output and one log-sum-exp per row (arXiv 2307.08691).
        attention = "sdpa"
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype or find_dtype(settings, config),
                attn_implementation=attention,
                trust_remote_code=settings.training.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"--model_name_or_path {settings.model.model_name_or_path} is not a causal language model: "
            f"{' '.join(str(error).split())[:300]}",
            expected="a causal language model of transformers",
            do="name another model; a model with its own code needs --trust_remote_code",
        ) from error
    return _disable_dropout(settings, model)


def _disable_dropout(settings: Settings, model: Any) -> Any:
    """Returns the model without dropout, as DPOTrainer sets it, also in adapters."""
    for module in model.modules() if settings.training.disable_dropout else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _quantise(settings: Settings, model: PreTrainedModel) -> PreTrainedModel:
    """Replaces linear layers by 4-bit layers of bitsandbytes, as `from_pretrained` does."""
    if not settings.model.load_in_4bit:
        return model
    try:
        from transformers.quantizers import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(get_quantization_config(settings.model), pre_quantized=False)
        with torch.device("meta"):
            quantizer.preprocess_model(model=model, device_map=None)
    except ImportError as error:
        raise ModelError(
            f"load_in_4bit needs bitsandbytes: {error}",
            expected="bitsandbytes",
            do="pip install 'dpokit[qlora]'",
        ) from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as in `model.load`, which has the reason
    return model.requires_grad_(False)


def _add_adapter(settings: Settings, model: PreTrainedModel, *, as_is: bool) -> PreTrainedModel | PeftModel:
    """Returns the model with the trained adapter; `as_is` keeps it in the weights' dtype, as sharded placements do."""
    if not settings.model.use_peft:
        return model
    config = build_peft_config(settings, model)
    name = settings.model.model_name_or_path
    continued = find_base(settings.model) is not None
    if continued:
        config = PeftConfig.from_pretrained(name, revision=settings.model.model_revision)
        config.inference_mode = False
    quantised = settings.model.load_in_4bit or settings.model.load_in_8bit
    with torch.device("meta"):
        policy = get_peft_model(model, config, autocast_adapter_dtype=not (as_is and not quantised))
        if continued:
            policy.add_adapter("ref", config)  # the copy that DPOTrainer uses as the reference
    if quantised:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as DPOTrainer does (arXiv 2305.14314)
    return _disable_dropout(settings, policy)


def _block_lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]


@contextmanager
def one_block_of_each_kind(model: Any) -> Iterator[None]:
    """Inside, the model has only its first blocks, down to the last kind of block that it has.

    Without gradients a block's memory is freed before the next block runs, so the other blocks do not raise the peak.
    Blocks are of one kind if they have the same class, parameters and attention.
    """
    config = model.config.get_text_config()
    number = config.num_hidden_layers
    attentions = getattr(config, "layer_types", None) or [None] * number
    removed = []
    for blocks in _block_lists(model):
        if len(blocks) != number:  # such as the experts of one block
            continue
        kinds = [
            (type(block), attention, tuple((name, p.shape, p.dtype) for name, p in block.named_parameters()))
            for block, attention in zip(blocks, attentions, strict=True)
        ]
        kept = max(kinds.index(kind) for kind in kinds) + 1
        removed.append((blocks, list(blocks[kept:])))
        del blocks[kept:]
    try:
        yield
    finally:
        for blocks, rest in removed:
            blocks.extend(rest)


def fill_with_fakes(model: nn.Module, settings: Settings) -> None:
    """Replaces every weight of a meta model by a fake CPU tensor, in place; the caller has entered a FakeTensorMode.

    A 4-bit weight takes half a byte per number, and one scale of 32 bits for each block of 64 numbers. If the scales
    are quantised too, they take 8 bits, and 256 of them share one scale of 32 bits (arXiv 2305.14314, section 3).
    """
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            if type(tensor).__name__ == "Params4bit":
                fakes[id(tensor)] = _fake_4bit(tensor, nested=settings.model.use_bnb_nested_quant, settings=settings)
            else:
                new = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                fakes[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return fakes[id(tensor)]

    for module in model.modules():
        stores: tuple[Any, ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = fake(tensor)


def _fake_4bit(weight: torch.Tensor, *, nested: bool, settings: Settings) -> nn.Parameter:
    from bitsandbytes.functional import QuantState

    quant_state: Any = QuantState  # bitsandbytes has no types
    blocks = -(-weight.numel() // 64)
    state2 = None
    if nested:
        statistics = torch.empty(-(-blocks // 256))
        state2 = quant_state(statistics, code=torch.empty(256), blocksize=256, dtype=torch.float32)
    parameter: Any = nn.Parameter(torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    parameter.quant_state = quant_state(
        torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=weight.shape,
        code=torch.empty(16),
        blocksize=64,
        quant_type=settings.model.bnb_4bit_quant_type,
        dtype=weight.dtype,
        offset=torch.empty(()) if nested else None,
        state2=state2,
    )
    return parameter


def list_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Returns parameters, buffers and 4-bit scales: all tensors that live as long as the model."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            tensors += [t for t in vars(part).values() if isinstance(t, torch.Tensor)] if part is not None else []
    return tensors
