"""Loads tokenizer, policy and reference from a Hub id, a folder or a GGUF file, of a whole model or an adapter."""

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraModel, PeftConfig, PeftModel, get_peft_model_state_dict
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
    check_finite_weights,
    check_loaded,
    check_size,
    check_weights_file,
    is_gguf,
)
from dpokit.model.gguf import find_model_folder
from dpokit.reachable_hub import use_cache_without_hub
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.load import Settings

# Errors of loading that are not caused by the model's files.
UNRELATED_TO_FILES = (DpokitError, MemoryError, torch.OutOfMemoryError)


def load_tokenizer(model: ModelConfig, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the model, or of an adapter's base; without a padding token, it pads with EOS.

    Raises: ModelError if there is no tokenizer. The code that renders answers checks for an EOS token.
    """
    name, revision, base = model.model_name_or_path, model.model_revision, find_base(model)
    if base is not None and _find_file(model, "tokenizer_config.json") is None:
        name, revision = base, "main"
    if name:
        name = find_model_folder(name)
        check_config(str(name), revision)
    tokenizer: PreTrainedTokenizerBase = _load(
        AutoTokenizer, name, revision=revision, trust_remote_code=trust_remote_code
    )
    if not tokenizer.encode("a", add_special_tokens=False):  # without a file transformers builds an empty tokenizer
        raise ModelError(
            f"{name}: the tokenizer has no vocabulary",
            expected="tokenizer files (tokenizer.json, or those of its class) in the folder of the weights",
            do="take the whole folder of the model",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The tokenizer warns once about a text longer than its limit; `find_max_length` checks the model's own limit, and
    # prompts are truncated later. The limit itself stays, because it is saved with the tuned model.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_policy(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """Returns the model to train, in `--dtype`, quantised by the settings; for an adapter, its base with the adapter.

    The training of an adapter continues on its own base; DPOTrainer keeps a copy of the adapter as the reference.

    Raises:
        ModelError: the model cannot be loaded, or has fewer embedding rows than the tokenizer has tokens.
        SettingsError: an adapter without `--use_peft`.
    """
    base = find_base(settings.model)
    policy: Any = _load_causal_lm(settings, base)
    if base is not None:
        policy = _attach_adapter(policy, settings.model)
    embedding = policy.get_input_embeddings()
    # Under ZeRO-3 a rank's weight may be empty, so its shape says nothing; an adapter on the embedding wraps it.
    rows = getattr(embedding, "base_layer", embedding).num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,} rows",
            expected="a tokenizer that belongs to the model",
            do="use the tokenizer that the model was saved with",
        )
    return policy


def _attach_adapter(policy: PreTrainedModel, model: ModelConfig) -> PeftModel:
    """Returns the base with the settings' adapter attached. Raises: ModelError if the adapter is damaged or misfits."""
    name, revision = model.model_name_or_path, model.model_revision
    check_weights_file(str(name), revision, (ADAPTER_FILE,))
    try:
        file = _find_file(model, ADAPTER_FILE)
        rows = None if file is None else _find_embedding_rows(policy, file)
        if rows is not None and rows != policy.get_input_embeddings().num_embeddings:
            # Tokens were added before the adapter was trained: its file has the embedding, so the base is only resized.
            policy.resize_token_embeddings(rows, mean_resizing=False)
        adapted = PeftModel.from_pretrained(policy, name, revision=revision, is_trainable=True)
        _check_adapter_fits(adapted, file or str(name))
        check_finite_weights(f"the adapter {name}", _find_adapter_weights(adapted))
        return adapted
    except SafetensorError as error:
        problem, do = f"cannot be read: {error}", "take another copy of it, or merge or evaluate an older checkpoint"
    except UNRELATED_TO_FILES:
        raise
    except Exception as error:  # PEFT may raise anything for unexpected file contents
        first = re.search(r"size mismatch for .*", str(error))
        problem = f"does not fit its base {policy.name_or_path}: {first[0] if first else ' '.join(str(error).split())}"
        do = "name the base that the adapter was trained on, in base_model_name_or_path of its adapter_config.json"
    raise ModelError(f"the adapter {name} {problem[:400]}", expected="a complete adapter on its own base", do=do)


def _find_adapter_weights(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yields the weights that an adapter's file may set: trainable ones and embeddings; the others are checked."""
    ends = [end for end in (adapted.get_input_embeddings(), adapted.get_output_embeddings()) if end is not None]
    embeddings = {id(weight) for end in ends for weight in end.parameters()}
    for place, weight in adapted.named_parameters():
        if weight.requires_grad or id(weight) in embeddings:
            yield place, weight


def _check_adapter_fits(policy: PeftModel, file: str) -> None:
    """Raises ModelError if the file lacks a tensor of the adapter, or holds one that neither adapter nor base has."""
    with safe_open(file, framework="pt") as tensors:
        in_file = set(tensors.keys())
    # Without this argument PEFT asks the Hub whether the adapter includes the embedding; the file itself shows it.
    of_adapter = set(get_peft_model_state_dict(policy, save_embedding_layers=False))
    for names, problem in (
        (of_adapter - in_file, "lacks tensors of the adapter"),
        (in_file - of_adapter - set(policy.state_dict()), "holds tensors that its base has no layer for"),
    ):
        if names:
            raise ModelError(
                f"{file} {problem}: {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                expected="the adapter that adapter_config.json describes, on the base it was trained on",
                do="take another copy of the adapter, or correct base_model_name_or_path in adapter_config.json",
            )


def _find_embedding_rows(policy: PreTrainedModel, file: str) -> int | None:
    """Returns the rows of the input embedding in an adapter's file; None if the file has no embedding."""
    embedding = policy.get_input_embeddings()
    path = next(name for name, module in policy.named_modules() if module is embedding)
    with safe_open(file, framework="pt") as tensors:
        in_file = set(tensors.keys())
        for name in (f"base_model.model.{path}.weight", f"base_model.model.{path}.base_layer.weight"):
            if name in in_file:
                return int(tensors.get_slice(name).get_shape()[0])
    return None


def name_model(settings: Settings, name: str) -> ModelConfig:
    """Returns a run's model settings with another model: the run's result or its base, a whole model or an adapter."""
    config = deepcopy(settings.model)
    config.model_name_or_path = name
    config.use_peft = True
    if name != settings.model.model_name_or_path and find_base(config) != settings.model.model_name_or_path:
        config.model_revision = "main"  # the run's revision belongs to the run's own model
    return config


def load_frozen(settings: Settings, name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PeftModel:
    """Loads a model with a run's settings, without gradients and dropout, on the run's device. Raises: ModelError."""
    model = load_policy(replace(settings, model=name_model(settings, name)), tokenizer).requires_grad_(False).eval()
    return model if getattr(model, "hf_device_map", None) else model.to(settings.training.device)


def find_base(model: ModelConfig) -> str | None:
    """Returns the base model of the adapter that `--model_name_or_path` names; None if it names a whole model.

    Raises:
        SettingsError: an adapter without `--use_peft`.
        ModelError: an adapter_config.json that does not describe a LoRA adapter.
    """
    name, revision = model.model_name_or_path, model.model_revision
    if is_gguf(name):
        return None
    use_cache_without_hub(name)
    try:
        file = find_adapter_config_file(name, revision=revision) if name else None
    except OSError:  # no such model: loading it reports the error
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


def find_revision(model: ModelConfig, base: str | None) -> str | None:
    """Returns the revision of the whole model to load: of an adapter's base, or of the model itself without `base`.

    An adapter's revision on the Hub does not apply to its base; a folder has no revision, so it is the base's.
    """
    return "main" if base and not Path(str(model.model_name_or_path)).is_dir() else model.model_revision


def load_reference(settings: Settings) -> PreTrainedModel | None:
    """Returns a frozen copy of the initial weights; None if the run needs no reference model in memory.

    With an adapter, the policy with the adapter switched off is the reference; with precomputed log-probs TRL runs the
    untrained policy before the first step.
    """
    if settings.kind != "dpo" or settings.model.use_peft or settings.training.precompute_ref_log_probs:
        return None
    return _load_causal_lm(settings).requires_grad_(False)


def build_peft_config(settings: Settings, policy: PreTrainedModel | PeftModel) -> PeftConfig | None:
    """Returns the LoRA config of TRL's flags; None if the run trains the whole model or continues an adapter.

    Raises: SettingsError for target modules that the model does not have.
    """
    if not settings.model.use_peft:
        return None
    if isinstance(policy, PeftModel):
        ignored = [
            name for name in flags_with(Fact.LORA) if not settings.origins.get(name, "recipe").startswith("recipe")
        ]
        if ignored:
            say(f"no effect: {', '.join(ignored)}, as the adapter that model_name_or_path names keeps its own settings")
        return None
    config: PeftConfig = get_peft_config(settings.model)
    if isinstance(config.target_modules, str) and re.fullmatch(r"[\w.]+", config.target_modules):
        # TRL passes a single name as a string, which PEFT would match as a regular expression of the whole path.
        config.target_modules = {config.target_modules}
    if config.target_modules is None and not config.target_parameters:
        _check_default_modules(policy)
    check_target_modules(config, policy)
    return config


def _check_default_modules(policy: PreTrainedModel) -> None:
    """Raises SettingsError for a type of model that PEFT has no default target modules for."""
    kind = policy.config.model_type
    if kind not in LoraModel.target_module_mapping:
        raise SettingsError(
            f"--use_peft without --lora_target_modules: PEFT has no default layers for a model of type {kind}",
            expected="the layers that get an adapter",
            do="--lora_target_modules all-linear",
        )


def check_target_modules(config: PeftConfig, policy: PreTrainedModel) -> None:
    """Raises SettingsError for a target module that the model lacks; PEFT ignores it if another one exists."""
    names = [name for name, _ in policy.named_modules()]
    targets = config.target_modules if isinstance(config.target_modules, (set, list)) else ()
    missing = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    if missing:
        layers = {name.rsplit(".", 1)[-1] for name, layer in policy.named_modules() if hasattr(layer, "weight")}
        raise SettingsError(
            f"lora_target_modules names {', '.join(missing)}, which the model does not have",
            expected=f"all-linear, or some of: {', '.join(sorted(layers))}",
            do="correct --lora_target_modules",
        )
    head = next((n for n, layer in policy.named_modules() if layer is policy.get_output_embeddings()), None)
    if head is not None and (head in targets or head.rpartition(".")[2] in targets):
        raise SettingsError(
            f"lora_target_modules names {head}, the LM head: scoring uses its base weight, so its adapter would never "
            "be trained",
            expected="layers below the head",
            do=f"remove {head} from --lora_target_modules, or train it whole: --lora_modules_to_save {head}",
        )


def find_max_length(settings: Settings, policy: PreTrainedModel) -> int | None:
    """Returns the most tokens of a pair: `--max_length`, else the lesser of TRL's default and the model's positions.

    Raises: SettingsError if `--max_length` exceeds the model's positions.
    """
    positions: int | None = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    max_length = settings.training.max_length
    if max_length is None or positions is None:
        return max_length or positions
    if max_length > positions and "max_length" in settings.origins:
        raise SettingsError(
            f"max_length is {max_length}, but the model has only {positions} positions",
            expected=f"at most {positions}",
            do=f"--max_length {positions}",
        )
    return min(max_length, positions)


def _load_causal_lm(settings: Settings, base: str | None = None) -> PreTrainedModel:
    model = settings.model
    name = base or model.model_name_or_path
    folder, revision = find_model_folder(name) if name else name, find_revision(model, base)
    if folder:
        check_weights_file(folder, revision)
        check_config(folder, revision)
        check_size(folder, revision)
    policy: PreTrainedModel
    policy, info = _load(
        AutoModelForCausalLM,
        folder,
        revision=revision,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_loaded` reports them
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=settings.training.trust_remote_code,
        quantization_config=get_quantization_config(model),
    )
    # An adapter records this name as its base: of a GGUF file its own, not that of a folder in the cache.
    policy.name_or_path = policy.config.name_or_path = str(name)
    try:
        check_loaded(str(name), info)
    except ModelError as error:
        if settings.data.gates != "warn":
            raise
        say(f"gates: warn: {error.seen}")
    check_finite_weights(str(name), policy.named_parameters())
    for module in policy.modules():
        # On processors with AVX512-BF16, bitsandbytes (0.50.2) repacks 4-bit weights in place during evaluation, and a
        # repacked layer passes no gradient back: each rank that evaluated and has not saved since would train wrongly.
        # Delete when bitsandbytes unpacks the weights for training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return policy


def _find_file(model: ModelConfig, file: str) -> str | None:
    path: str | None = cached_file(model.model_name_or_path, file, revision=model.model_revision, **QUIET)
    return path


def _load(kind: Any, name: str | None, **options: Any) -> Any:
    if not name:
        raise ModelError(
            "no model was named",
            expected="a Hub id, a folder or a GGUF file",
            do="--model_name_or_path ID|FOLDER|FILE.gguf",
        )
    noun = "tokenizer" if kind is AutoTokenizer else "model"
    try:
        return kind.from_pretrained(name, **options)
    except UNRELATED_TO_FILES:
        raise
    except Exception as error:  # transformers and tokenizers may raise anything for unexpected file contents
        attention = options.get("attn_implementation")
        if attention is not None and re.search("attention|attn|flash", str(error), re.I):
            raise ModelError(
                f"--attn_implementation {attention}: {' '.join(str(error).split())[:300]}",
                expected="sdpa (the default, required for shared prompts), eager, or an installed kernel",
                do="--attn_implementation sdpa",
            ) from error
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"--model_name_or_path {name}: the {noun} has Python code of its own, which is not run",
                expected="a model that transformers supports, or permission to run the model's code",
                do="read that code; if you trust it, add --trust_remote_code true",
            ) from error
        raise ModelError(
            f"--model_name_or_path {name}: no {noun} could be loaded: {' '.join(str(error).split())[:300]}",
            expected="a Hub id that this machine can reach, or a folder with config.json, weights and tokenizer",
            do="check the name; for a gated model log in with `hf auth login`; without a network name a folder",
        ) from error
