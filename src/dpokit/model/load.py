"""Tokenizer, policy and reference from a name or a folder; the folder may be an adapter's."""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from dpokit.console import say
from dpokit.errors import DpokitError, ModelError, SettingsError
from dpokit.model.check import (
    ADAPTER_FILE,
    QUIET,
    check_adapter_config,
    check_config,
    check_finite,
    check_loaded,
    check_size,
    check_weights_file,
)
from dpokit.settings.load import Settings

# What loading may raise though the files are right.
NOT_OF_THE_FILES = (DpokitError, MemoryError, torch.OutOfMemoryError)


def load_tokenizer(model: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or its base's for an adapter; EOS pads where it has no padding token of its own.

    Raises: ModelError where there is none. That it has an EOS is checked where answers are rendered.
    """
    name, revision, base = model.model_name_or_path, model.model_revision, find_base(model)
    if base is not None and _find_file(model, "tokenizer_config.json") is None:
        name, revision = base, "main"
    if name:
        check_config(str(name), revision)
    tokenizer: PreTrainedTokenizerBase = _load(
        AutoTokenizer, name, revision=revision, trust_remote_code=trust_remote_code
    )
    if not tokenizer.encode("a", add_special_tokens=False):  # transformers builds an empty one where there is no file
        raise ModelError(
            f"{name}: the tokenizer has no vocabulary",
            expected="the files of a tokenizer (tokenizer.json, or those of its kind) beside the weights",
            do="take the whole folder of the model",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The model's own limit is checked by `find_max_length`; the tokenizer's would warn about prompts yet to be cut.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_policy(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """The model to train, in `--dtype`, quantised where asked for; with its adapter, where the name is an adapter's.

    An adapter is trained further on its own base; DPOTrainer keeps a copy of it as the reference.

    Raises:
        ModelError: it cannot be loaded, or is not the tokenizer's.
        SettingsError: an adapter without `--use_peft`.
    """
    base = find_base(settings.model)
    policy: Any = _load_causal_lm(settings, base)
    if base is not None:
        policy = _attach_adapter(policy, settings.model)
    embedding = policy.get_input_embeddings()
    # Under ZeRO-3 the weight itself is empty on a rank; an adapter on the embedding wraps it.
    rows = getattr(embedding, "base_layer", embedding).num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,} rows",
            expected="a tokenizer that belongs to the model",
            do="use the tokenizer that the model was saved with",
        )
    return policy


def _attach_adapter(policy: PreTrainedModel, model: ModelConfig) -> PeftModel:
    """The base with the adapter that the settings name. Raises: ModelError where it is damaged or does not fit."""
    name, revision = model.model_name_or_path, model.model_revision
    check_weights_file(str(name), revision, (ADAPTER_FILE,))
    try:
        file = _find_file(model, ADAPTER_FILE)
        rows = None if file is None else _find_embedding_rows(policy, file)
        if rows is not None and rows != policy.get_input_embeddings().num_embeddings:
            # Tokens were added before the adapter was trained: it brings the embedding, the base only makes room.
            policy.resize_token_embeddings(rows, mean_resizing=False)
        adapted = PeftModel.from_pretrained(policy, name, revision=revision, is_trainable=True)
        _check_adapter_fits(adapted, file or str(name))
        check_finite(f"the adapter {name}", _find_brought(adapted))
        return adapted
    except SafetensorError as error:
        seen, do = f"cannot be read: {error}", "take another copy of it, or merge or evaluate an older checkpoint"
    except NOT_OF_THE_FILES:
        raise
    except Exception as error:  # of PEFT, for whatever in the files it did not expect
        first = re.search(r"size mismatch for .*", str(error))
        seen = f"does not fit its base {policy.name_or_path}: {first[0] if first else ' '.join(str(error).split())}"
        do = "name the base that the adapter was trained on, in base_model_name_or_path of its adapter_config.json"
    raise ModelError(f"the adapter {name} {seen[:400]}", expected="a whole adapter, on the base it belongs to", do=do)


def _find_brought(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    """The weights that an adapter's file may bring: all that is trained, and the embeddings; the base is checked."""
    ends = [end for end in (adapted.get_input_embeddings(), adapted.get_output_embeddings()) if end is not None]
    embeddings = {id(weight) for end in ends for weight in end.parameters()}
    for place, weight in adapted.named_parameters():
        if weight.requires_grad or id(weight) in embeddings:
            yield place, weight


def _check_adapter_fits(policy: PeftModel, file: str) -> None:
    """Raises ModelError where the file lacks a tensor of the adapter, or has one that nothing on the base takes."""
    with safe_open(file, framework="pt") as tensors:
        held = set(tensors.keys())
    # PEFT would ask the Hub whether the embedding belongs to the adapter; here the file itself says so.
    wanted = set(get_peft_model_state_dict(policy, save_embedding_layers=False))
    for names, what in (
        (wanted - held, "lacks tensors of the adapter"),
        (held - wanted - set(policy.state_dict()), "holds tensors that its base has no layer for"),
    ):
        if names:
            raise ModelError(
                f"{file} {what}: {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                expected="the adapter of adapter_config.json, on the base it was trained on",
                do="take another copy of the adapter, or correct base_model_name_or_path in adapter_config.json",
            )


def _find_embedding_rows(policy: PreTrainedModel, file: str) -> int | None:
    """Rows of the input embedding that an adapter's file brings along; None where it brings none."""
    embedding = policy.get_input_embeddings()
    place = next(name for name, module in policy.named_modules() if module is embedding)
    with safe_open(file, framework="pt") as tensors:
        held = set(tensors.keys())
        for name in (f"base_model.model.{place}.weight", f"base_model.model.{place}.base_layer.weight"):
            if name in held:
                return int(tensors.get_slice(name).get_shape()[0])
    return None


def name_model(settings: Settings, name: str) -> ModelConfig:
    """A run's model settings for another model: what the run made, or its base. It may be an adapter's."""
    asked = deepcopy(settings.model)
    asked.model_name_or_path = name
    asked.use_peft = True
    if name != settings.model.model_name_or_path and find_base(asked) != settings.model.model_name_or_path:
        asked.model_revision = "main"  # the run's own says nothing of another model
    return asked


def load_frozen(settings: Settings, name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """Another model by a run's settings, on its device; nothing of it is trained. Raises: ModelError."""
    model = load_policy(replace(settings, model=name_model(settings, name)), tokenizer).requires_grad_(False)
    return model if getattr(model, "hf_device_map", None) else model.to(settings.training.device)


def find_base(model: ModelConfig) -> str | None:
    """The base model of the adapter that `--model_name_or_path` names; None where it names a whole model.

    Raises:
        SettingsError: an adapter without `--use_peft`.
        ModelError: an adapter_config.json that describes no LoRA adapter.
    """
    name, revision = model.model_name_or_path, model.model_revision
    try:
        file = find_adapter_config_file(name, revision=revision) if name else None
    except OSError:  # no such model: said where it is loaded
        return None
    if file is None:
        return None
    check_adapter_config(str(name), file)
    base = PeftConfig.from_pretrained(name, revision=revision).base_model_name_or_path
    if not model.use_peft:
        raise SettingsError(
            f"--model_name_or_path {name} is an adapter (of {base}), and use_peft is not set",
            expected="--use_peft, to train the adapter further, or the name of a whole model",
            do="add --use_peft; to train every weight, merge the adapter into its base first",
        )
    return str(base)


def load_reference(settings: Settings) -> PreTrainedModel | None:
    """The same weights once more, frozen; None where none is kept in memory.

    With an adapter, the policy with the adapter switched off is the reference; with precomputed log-probs TRL asks the
    untrained policy before the first step.
    """
    if settings.kind != "dpo" or settings.model.use_peft or settings.training.precompute_ref_log_probs:
        return None
    return _load_causal_lm(settings).requires_grad_(False)


def build_peft_config(settings: Settings, policy: PreTrainedModel | PeftModel) -> PeftConfig | None:
    """LoRA by TRL's flags for the policy; None where the whole model or an adapter of its own is trained.

    Raises: SettingsError for target modules that the model does not have.
    """
    if not settings.model.use_peft or isinstance(policy, PeftModel):
        return None
    config: PeftConfig = get_peft_config(settings.model)
    if isinstance(config.target_modules, str) and re.fullmatch(r"[\w.]+", config.target_modules):
        # TRL hands a single name over as text, which PEFT takes for a pattern of the whole path.
        config.target_modules = {config.target_modules}
    check_target_modules(config, policy)
    return config


def check_target_modules(config: PeftConfig, policy: PreTrainedModel) -> None:
    """Raises SettingsError for a target module that is not there; PEFT passes over it as long as another is."""
    names = [name for name, _ in policy.named_modules()]
    wanted = config.target_modules if isinstance(config.target_modules, (set, list)) else ()
    missing = sorted(w for w in wanted if not any(name == w or name.endswith(f".{w}") for name in names))
    if missing:
        layers = {name.rsplit(".", 1)[-1] for name, layer in policy.named_modules() if hasattr(layer, "weight")}
        raise SettingsError(
            f"lora_target_modules names {', '.join(missing)}, which the model does not have",
            expected=f"all-linear, or some of: {', '.join(sorted(layers))}",
            do="correct --lora_target_modules",
        )
    head = next((n for n, layer in policy.named_modules() if layer is policy.get_output_embeddings()), None)
    if head is not None and (head in wanted or head.rpartition(".")[2] in wanted):
        raise SettingsError(
            f"lora_target_modules names {head}, the LM head: answers are scored by its base weight, so an adapter "
            "there would never be trained",
            expected="layers below the head",
            do=f"remove {head} from --lora_target_modules, or train it whole: --lora_modules_to_save {head}",
        )


def find_max_length(settings: Settings, policy: PreTrainedModel) -> int | None:
    """Most tokens a pair may have: `--max_length`, else TRL's default or the model's positions, whichever is less.

    Raises: SettingsError where more is asked for than the model has positions.
    """
    positions: int | None = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    asked = settings.training.max_length
    if asked is None or positions is None:
        return asked or positions
    if asked > positions and "max_length" in settings.origins:
        raise SettingsError(
            f"max_length is {asked}, but the model has only {positions} positions",
            expected=f"at most {positions}",
            do=f"--max_length {positions}",
        )
    return min(asked, positions)


def _load_causal_lm(settings: Settings, base: str | None = None) -> PreTrainedModel:
    model = settings.model
    name = base or model.model_name_or_path
    # The revision of an adapter on the Hub says nothing of its base; an adapter's folder has none of its own.
    revision = "main" if base and not Path(str(model.model_name_or_path)).is_dir() else model.model_revision
    if name:
        check_weights_file(name, revision)
        check_config(name, revision)
        check_size(name, revision)
    policy: PreTrainedModel
    policy, info = _load(
        AutoModelForCausalLM,
        name,
        revision=revision,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_loaded` names them
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=settings.training.trust_remote_code,
        quantization_config=get_quantization_config(model),
    )
    try:
        check_loaded(str(name), info)
    except ModelError as error:
        if settings.data.gates != "warn":
            raise
        say(f"gates: warn: {error.seen}")
    check_finite(str(name), policy.named_parameters())
    for module in policy.modules():
        # On processors with AVX512-BF16 bitsandbytes repacks 4-bit weights in place when it evaluates (0.50.2), and a
        # repacked layer passes no gradient back: each rank that evaluated and did not save since would train wrongly.
        # Delete when bitsandbytes unpacks them to train.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return policy


def _find_file(model: ModelConfig, file: str) -> str | None:
    found: str | None = cached_file(model.model_name_or_path, file, revision=model.model_revision, **QUIET)
    return found


def _load(kind: Any, name: str | None, **options: Any) -> Any:
    if not name:
        raise ModelError("no model was named", expected="a Hub id or a folder", do="--model_name_or_path ID|FOLDER")
    what = "tokenizer" if kind is AutoTokenizer else "model"
    try:
        return kind.from_pretrained(name, **options)
    except NOT_OF_THE_FILES:
        raise
    except Exception as error:  # of transformers or tokenizers, for whatever in the files they did not expect
        asked = options.get("attn_implementation")
        if asked is not None and re.search("attention|attn|flash", str(error), re.I):
            raise ModelError(
                f"--attn_implementation {asked}: {' '.join(str(error).split())[:300]}",
                expected="sdpa, the default and what shared prompts need; eager; or a kernel that is installed",
                do="--attn_implementation sdpa",
            ) from error
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"--model_name_or_path {name}: the {what} has Python code of its own, which is not run",
                expected="a model that transformers knows, or this command line's word that its code may run",
                do="read that code; if you trust it, add --trust_remote_code true",
            ) from error
        raise ModelError(
            f"--model_name_or_path {name}: no {what} could be loaded: {' '.join(str(error).split())[:300]}",
            expected="a Hub id that this machine can reach, or a folder with config.json, weights and tokenizer",
            do="check the name; for a gated model log in with `hf auth login`; without a network give a folder",
        ) from error
