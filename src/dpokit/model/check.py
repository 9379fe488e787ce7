"""What the files of a model or an adapter say, checked before anything is built of them, and the tensors after it.

The files may come from anybody. A config is held against bounds and against the size of the weights, so that nothing
absurd is allocated; weights are safetensors alone; what was loaded must be all that the files hold, and finite.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import cached_file

from dpokit.errors import ModelError
from dpokit.rundir import OTHER_FILE_BYTES, read_record

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

# The largest numbers that a config may hold, by the names that models give them; far above any model there is.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
OF_EXPERTS = (*EXPERTS, "moe_intermediate_size")  # 0 in a model without any
BOUNDS = {
    **dict.fromkeys(LAYERS, 10_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 2**20),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), 2**24),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), 2**16),
    **dict.fromkeys(EXPERTS, 2**16),
    **dict.fromkeys(("vocab_size",), 2**28),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**31),
}
MOST_BLOCKS = 200_000  # layers times experts: each is a module of its own
MOST_PARAMETERS_A_BYTE = 8  # weights of one bit each
FEW_PARAMETERS = 10**9  # so many do no harm; what of them is missing is named when they are loaded
MOST_RANK, MOST_REPLICATED = 2**14, 10_000
# A repeated group that repeats something itself takes time without end on a name that does not match.
NESTED_REPETITION = re.compile(r"\([^()]*[+*][^()]*\)[+*{]")
# Buffers that earlier versions of transformers saved and that no model needs any more.
OLD_BUFFERS = re.compile(
    r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.(inv_freq|(cos|sin)_cached)|position_ids)$"
)
WHOLE_FILES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")  # read in one piece
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_weights_file(name: str, revision: str | None, wanted: tuple[str, ...] = WEIGHTS) -> None:
    """Raises ModelError where a model or an adapter has no safetensors: to load a pickle is to run what it says."""
    try:
        found = [cached_file(name, file, revision=revision, **QUIET) for file in wanted]
    except OSError as error:
        raise ModelError(
            f"--model_name_or_path {name}: no model could be loaded: {' '.join(str(error).split())[:300]}",
            expected="a run's folder, a model's folder, or a Hub id that this machine can reach",
            do="correct the name; for a gated model log in with `hf auth login`",
        ) from error
    if not any(found):
        raise ModelError(
            f"{name} has no weights as safetensors ({', '.join(wanted)}) that this machine can reach",
            expected="safetensors: weights in another form can hold a program",
            do="check the name; weights in another form are converted by loading and saving them with transformers, "
            "where you trust them",
        )


# -- a model -----------------------------------------------------------------------------------------------------------


def check_config(name: str, revision: str | None) -> None:
    """Raises ModelError for a config.json with numbers that no model has, and for a huge file beside it.

    A config that cannot be read at all is left to transformers, which says why.
    """
    for file in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
        if file.suffix in WHOLE_FILES and file.is_file() and file.stat().st_size > OTHER_FILE_BYTES:
            raise ModelError(
                f"{file} has {file.stat().st_size:,} bytes",
                expected=f"at most {OTHER_FILE_BYTES:,} of a file that is no weights",
                do="take another copy of the model",
            )
    described = _read_config(name, revision)
    if not isinstance(described, dict):
        raise _bad_config(name, f"a {type(described).__name__}, not a mapping")
    for part in (described, described.get("text_config")):
        if isinstance(part, dict):
            _check_bounds(name, part)


def _read_config(name: str, revision: str | None) -> Any:
    try:
        file = cached_file(name, "config.json", revision=revision, **QUIET)
        return read_record(Path(file)) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _bad_config(name: str, seen: str) -> ModelError:
    return ModelError(
        f"{name}: config.json describes no model that can be built: {seen}",
        expected="the config that the model was saved with",
        do="take another copy of the model, or name another one",
    )


def _check_bounds(name: str, described: Mapping[str, Any]) -> None:
    for key, most in BOUNDS.items():
        value = described.get(key)
        if value is None:  # the class's own
            continue
        least = 0 if key in OF_EXPERTS else 1
        # A size may differ from layer to layer.
        for number in value if isinstance(value, list) and value and key not in LAYERS else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
                raise _bad_config(name, f"{key} is {str(number)[:60]}, not a whole number from {least} to {most:,}")
    layers, experts = (max(_largest(described.get(key)) for key in keys) for keys in (LAYERS, EXPERTS))
    if layers * experts > MOST_BLOCKS:
        raise _bad_config(name, f"{layers:,} layers of {experts:,} experts")


def _largest(value: Any) -> int:
    return int(max(value) if isinstance(value, list) else value or 1)


def check_size(name: str, revision: str | None) -> None:
    """Raises ModelError where a local folder's config describes no model, or more weights than its files can hold.

    The parameters are counted on torch's meta device, without memory. Comes after `check_config`.
    """
    if not Path(name).is_dir() or _read_config(name, revision).get("auto_map"):
        return
    weights = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except Exception:
        return  # no such model: loading it says why
    try:
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in kind(config).parameters())
    except ImportError:
        return  # of an attention that is not installed: loading it says so
    except Exception as error:  # a constructor may fail in any way on values that it does not check
        raise _bad_config(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if parameters > max(MOST_PARAMETERS_A_BYTE * weights, FEW_PARAMETERS):
        raise _bad_config(name, f"{parameters:,} parameters, and its files have {weights:,} bytes")


def check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raises ModelError where tensors were missing, left over or of another shape; a tied head may be missing.

    Args:
        name: of the model.
        info: what `from_pretrained` tells with `output_loading_info`.
    """
    words = {
        "missing_keys": "lacks tensors of the model, which would be random",
        "unexpected_keys": "holds tensors that the model has no place for",
        "mismatched_keys": "holds tensors of another shape than its config describes",
    }
    for key, what in words.items():
        names = sorted(str(found[0] if isinstance(found, tuple) else found) for found in info.get(key) or ())
        names = [found for found in names if key != "unexpected_keys" or not OLD_BUFFERS.search(found)]
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise ModelError(
                f"{name} {what}: {names[0]}{more}",
                expected="weights and config.json of one model, whole",
                do="take another copy of the model; --gates warn goes on with this one",
            )


def check_finite(name: str, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raises ModelError for a weight that is not finite. Of a weight that ZeRO-3 shards, this rank's part is read.

    Args:
        name: of the model.
        weights: `named_parameters`, or some of them.
    """
    for place, weight in weights:
        values = getattr(weight, "ds_tensor", weight).detach()
        if values.is_meta or values.numel() == 0 or values.dtype not in FLOATS:
            continue
        if not all(math.isfinite(bound) for bound in torch.aminmax(values)):
            raise ModelError(
                f"{name}: {place} holds values that are not finite",
                expected="numbers",
                do="take another copy of the model, or an earlier checkpoint",
            )


# -- an adapter --------------------------------------------------------------------------------------------------------


def check_adapter_config(name: str, file: str) -> None:
    """Raises ModelError for an adapter_config.json that describes no LoRA adapter of a model.

    Args:
        name: of the adapter.
        file: its adapter_config.json.
    """
    try:
        described = read_record(Path(file))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad_adapter(name, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(described, dict):
        raise _bad_adapter(name, f"a {type(described).__name__}, not a mapping")
    for trouble in _find_troubles(name, described):
        raise _bad_adapter(name, trouble)


def _bad_adapter(name: str, seen: str) -> ModelError:
    return ModelError(
        f"the adapter {name} cannot be used: its {ADAPTER_CONFIG}: {seen}",
        expected="a LoRA adapter (also rsLoRA, DoRA) as PEFT saves it",
        do="take another copy of the adapter, or correct the file",
    )


def _find_troubles(name: str, described: Mapping[str, Any]) -> Iterator[str]:
    if described.get("peft_type") != "LORA":
        yield f"peft_type is {_show(described.get('peft_type'))}, and LORA alone is supported"
    yield from _find_base_trouble(name, described.get("base_model_name_or_path"))
    ranks = {"r": described.get("r", 8), **_mapping(described.get("rank_pattern"))}
    for key, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST_RANK:
            yield f"{key} is {_show(rank)}, not a whole number from 1 to {MOST_RANK:,}"
    for key, value in {
        "lora_alpha": described.get("lora_alpha", 8),
        **_mapping(described.get("alpha_pattern")),
    }.items():
        if not _is_number(value):
            yield f"{key} is {_show(value)}, not a number"
    dropout = described.get("lora_dropout", 0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        yield f"lora_dropout is {_show(dropout)}, not a share below 1"
    for key in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        yield from _find_names_trouble(key, described.get(key))
    if described.get("megatron_config"):  # PEFT would import the module that it names
        yield "it is for Megatron (megatron_config)"
    yield from _find_replication_trouble(described.get("layer_replication"))


def _find_base_trouble(name: str, base: Any) -> Iterator[str]:
    if not isinstance(base, str) or not base:
        yield f"base_model_name_or_path is {_show(base)}, not the name of a model"
    elif "://" in base or base.endswith(PICKLES) or Path(base).is_file():
        yield f"base_model_name_or_path is {_show(base)}: a base is a folder or a Hub id"
    elif Path(base).is_dir() and Path(base).resolve() == Path(name).resolve():
        yield "base_model_name_or_path names the adapter itself"
    elif (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
        yield f"base_model_name_or_path is {_show(base)}, an adapter itself"


def _find_names_trouble(key: str, names: Any) -> Iterator[str]:
    if isinstance(names, str):
        try:
            re.compile(names)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{key} is no regular expression ({error})"
        if NESTED_REPETITION.search(names) or len(names) > 10_000:
            yield f"{key} is a regular expression that may take time without end"
    elif names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
        yield f"{key} is {_show(names)}, neither a list of names nor a regular expression"


def _find_replication_trouble(ranges: Any) -> Iterator[str]:
    if ranges is None:
        return
    try:
        total = sum(max(0, int(end) - int(begin)) for begin, end in ranges)
    except (TypeError, ValueError, OverflowError):
        total = MOST_REPLICATED + 1
    if total > MOST_REPLICATED:
        yield f"layer_replication is {_show(ranges)}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: Any) -> str:
    return repr(value)[:80]
