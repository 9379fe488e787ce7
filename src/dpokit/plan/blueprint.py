"""The model without its weights: built of its config on the meta device, wrapped and quantised as for training."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import get_quantization_config

from dpokit.errors import ModelError
from dpokit.model.load import build_peft_config, find_base
from dpokit.settings.load import Settings


@dataclass(frozen=True)
class Blueprint:
    """A policy, and the reference that is kept beside it, on the meta device.

    Attributes:
        parameters: of the whole model without adapters; a quantised weight counts once for each number it stands for.
        adapter_parameters: of the adapter that is trained.
        trained_parameters: all that the optimizer moves.
        block_parameters: of the largest repeated block, what sharded placements gather at once.
        head_parameters: of the LM head.
    """

    policy: PreTrainedModel | PeftModel
    reference: PreTrainedModel | None
    parameters: int
    adapter_parameters: int
    trained_parameters: int
    block_parameters: int
    head_parameters: int


def load_config(settings: Settings) -> Any:
    """The model's config alone. Raises: ModelError where there is none to be had; SettingsError from `find_base`."""
    model = settings.model
    if not model.model_name_or_path:
        raise ModelError("no model was named", expected="a Hub id or a folder", do="--model_name_or_path ID|FOLDER")
    try:
        name = find_base(model) or model.model_name_or_path
        return AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=settings.training.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"--model_name_or_path {model.model_name_or_path}: no config could be loaded: "
            f"{' '.join(str(error).split())[:300]}",
            expected="a Hub id that this machine can reach, or a folder with config.json and tokenizer",
            do="check the name; for a gated model log in with `hf auth login`; without a network give a folder",
        ) from error


def build_blueprint(settings: Settings, config: Any, *, dtype: torch.dtype | None = None) -> Blueprint:
    """Policy and reference as `model.load` and DPOTrainer make them, without a weight.

    Args:
        settings: of the run.
        config: the model's own.
        dtype: what the weights are kept in; None for `--dtype`.

    Raises:
        ModelError: no causal language model can be built of the config.
        SettingsError: LoRA's target modules are not there.
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
    """What `--dtype` keeps the weights in: its own name, or the config's for `auto`; float32 where nothing is said."""
    name = settings.model.dtype
    if name in ("auto", None):
        return getattr(config.get_text_config(), "dtype", None) or torch.float32
    found = getattr(torch, str(name), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def _build_causal_lm(settings: Settings, config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    asked = settings.model.attn_implementation
    # FlashAttention keeps what SDPA's own kernels keep: the output and a log-sum-exp a row (arXiv 2307.08691).
    attention = "sdpa" if asked is not None and asked.startswith("flash") else asked
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
            f"--model_name_or_path {settings.model.model_name_or_path} is no causal language model: "
            f"{' '.join(str(error).split())[:300]}",
            expected="a model that transformers knows as a causal language model",
            do="name another model; one with code of its own needs --trust_remote_code",
        ) from error
    return _disable_dropout(settings, model)


def _disable_dropout(settings: Settings, model: Any) -> Any:
    """As DPOTrainer does, adapters included."""
    for module in model.modules() if settings.training.disable_dropout else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _quantise(settings: Settings, model: PreTrainedModel) -> PreTrainedModel:
    """4-bit linear layers of bitsandbytes in place of the plain ones, as `from_pretrained` puts them."""
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
            expected="bitsandbytes, installed",
            do="pip install 'dpokit[qlora]'",
        ) from error
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as `model.load` does, and why it does
    return model.requires_grad_(False)


def _add_adapter(settings: Settings, model: PreTrainedModel, *, as_is: bool) -> PreTrainedModel | PeftModel:
    """The model with the adapter that is trained; `as_is`: in the weights' own type, as sharded placements keep it."""
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
            policy.add_adapter("ref", config)  # the copy that DPOTrainer asks as the reference
    if quantised:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as DPOTrainer does, arXiv 2305.14314
    return _disable_dropout(settings, policy)


def _block_lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]


def fill_with_fakes(model: nn.Module, settings: Settings) -> None:
    """Gives every weight of a meta model a fake CPU tensor, in place; called under a FakeTensorMode.

    A 4-bit weight gets half a byte a number and the statistics that bitsandbytes keeps: one of 8 or 32 bits a block of
    64, and where these are quantised once more one of 32 bits for 256 of them (arXiv 2305.14314, section 3).
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            if type(tensor).__name__ == "Params4bit":
                made[id(tensor)] = _fake_4bit(tensor, nested=settings.model.use_bnb_nested_quant, settings=settings)
            else:
                new = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return made[id(tensor)]

    for module in model.modules():
        stores: tuple[Any, ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = fake(tensor)


def _fake_4bit(weight: torch.Tensor, *, nested: bool, settings: Settings) -> nn.Parameter:
    from bitsandbytes.functional import QuantState

    quant_state: Any = QuantState  # without types
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
    """Parameters, buffers and 4-bit statistics: all that is kept as long as the model is."""
    found: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            found += [t for t in vars(part).values() if isinstance(t, torch.Tensor)] if part is not None else []
    return found
