"""Checks the files of a model or an adapter before loading, and the loaded tensors.

The files may come from anybody. A config is checked against bounds and against the size of the weights, so that no
absurd size is allocated. Weights must be safetensors. Loaded tensors must be complete and finite.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import cached_file

from dpokit.atomic_files import read_record
from dpokit.errors import ModelError
from dpokit.rundir import OTHER_FILE_BYTES

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
GGUF_MAGIC = b"GGUF"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
QUIET = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

# The largest values of a config's keys, under the names that different models use; far above any existing model.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERT_KEYS = (*EXPERTS, "moe_intermediate_size")  # 0 in a model without experts
BOUNDS = {
    **dict.fromkeys(LAYERS, 10_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 2**20),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), 2**24),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), 2**16),
    **dict.fromkeys(EXPERTS, 2**16),
    **dict.fromkeys(("vocab_size",), 2**28),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**31),
}
MOST_BLOCKS = 200_000  # layers times experts: each is a separate module
MOST_PARAMETERS_A_BYTE = 8  # weights of one bit each
FEW_PARAMETERS = 10**9  # up to this number memory suffices; `check_loaded` names those missing from the files
MOST_RANK, MOST_REPLICATED = 2**14, 10_000
# A repeated group that contains a repetition takes exponential time on a name that does not match.
NESTED_REPETITION = re.compile(r"\([^()]*[+*][^()]*\)[+*{]")
# Buffers that earlier versions of transformers saved and that models no longer need.
OLD_BUFFERS = re.compile(
    r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.(inv_freq|(cos|sin)_cached)|position_ids)$"
)
WHOLE_FILES = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")  # read in one piece
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_gguf(name: str | None) -> bool:
    """Whether a model's name is the path of a GGUF file: by its ending, or by the first bytes of an existing file."""
    if not name:
        return False
    try:
        if name.endswith(".gguf"):
            return not Path(name).is_dir()
        if not Path(name).is_file():  # a folder, a Hub id, a pipe, or a name that no file can have
            return False
        with Path(name).open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def check_weights_file(name: str, revision: str | None, names: tuple[str, ...] = WEIGHTS) -> None:
    """Raises ModelError if a model or an adapter has no safetensors file: loading a pickle may run any code.

    Args:
        name, revision: of the model or adapter.
        names: files of which one is enough.
    """
    try:
        files = [cached_file(name, file, revision=revision, **QUIET) for file in names]
    except OSError as error:
        raise ModelError(
            f"--model_name_or_path {name}: no model could be loaded: {' '.join(str(error).split())[:300]}",
            expected="a run's folder, a model's folder, or a Hub id that this machine can reach",
            do="correct the name; for a gated model log in with `hf auth login`",
        ) from error
    if not any(files):
        raise ModelError(
            f"{name} has no weights as safetensors ({', '.join(names)}) that this machine can reach",
            expected="safetensors: weights in another format can contain a program",
            do="check the name; weights in another format that you trust can be converted: load and save them "
            "with transformers",
        )


# -- a model -----------------------------------------------------------------------------------------------------------


def check_config(name: str, revision: str | None) -> None:
    """Raises ModelError for a config.json with values out of bounds, and for a huge file in the model's folder.

    An unreadable config passes: transformers reports it with the reason.
    """
    for file in sorted(Path(name).iterdir()) if Path(name).is_dir() else ():
        if file.suffix in WHOLE_FILES and file.is_file() and file.stat().st_size > OTHER_FILE_BYTES:
            raise ModelError(
                f"{file} has {file.stat().st_size:,} bytes",
                expected=f"at most {OTHER_FILE_BYTES:,} for a file other than weights",
                do="take another copy of the model",
            )
    described = read_config(name, revision)
    if not isinstance(described, dict):
        raise _bad_config(name, f"a {type(described).__name__}, not a mapping")
    for part in (described, described.get("text_config")):
        if isinstance(part, dict):
            _check_bounds(name, part)


def read_config(name: str, revision: str | None) -> Any:
    """Returns the content of a model's config.json; {} if it cannot be read, which loading the model reports."""
    try:
        file = cached_file(name, "config.json", revision=revision, **QUIET)
        return read_record(Path(file)) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _bad_config(name: str, problem: str) -> ModelError:
    return ModelError(
        f"{name}: config.json describes no model that can be built: {problem}",
        expected="the config that the model was saved with",
        do="take another copy of the model, or name another one",
    )


def _check_bounds(name: str, described: Mapping[str, Any]) -> None:
    for key, most in BOUNDS.items():
        value = described.get(key)
        if value is None:  # the config class has a default
            continue
        least = 0 if key in EXPERT_KEYS else 1
        # A list holds one size for each layer.
        for number in value if isinstance(value, list) and value and key not in LAYERS else [value]:
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
                raise _bad_config(name, f"{key} is {str(number)[:60]}, not a whole number from {least} to {most:,}")
    layers, experts = (max(_largest(described.get(key)) for key in keys) for keys in (LAYERS, EXPERTS))
    if layers * experts > MOST_BLOCKS:
        raise _bad_config(name, f"{layers:,} layers of {experts:,} experts")


def _largest(value: Any) -> int:
    return int(max(value) if isinstance(value, list) else value or 1)


def check_size(name: str, revision: str | None) -> None:
    """Raises ModelError if a local folder's config describes no model, or more weights than its files can hold.

    Counts the parameters on torch's meta device, without memory. To be called after `check_config`.
    """
    if not Path(name).is_dir() or read_config(name, revision).get("auto_map"):
        return
    weights = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except Exception:
        return  # no such model: loading it reports the reason
    try:
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in kind(config).parameters())
    except ImportError:
        return  # an attention kernel is not installed: loading the model reports it
    except Exception as error:  # a constructor may raise anything for values that it does not check
        raise _bad_config(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if parameters > max(MOST_PARAMETERS_A_BYTE * weights, FEW_PARAMETERS):
        raise _bad_config(name, f"{parameters:,} parameters, but its files have {weights:,} bytes")


def check_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raises ModelError if tensors were missing, unexpected or of another shape; a tied head may be missing.

    Args:
        name: of the model.
        info: from `from_pretrained` with `output_loading_info`.
    """
    problems = {
        "missing_keys": "lacks tensors of the model, which would be random",
        "unexpected_keys": "holds tensors that the model has no place for",
        "mismatched_keys": "holds tensors of another shape than its config describes",
    }
    for key, problem in problems.items():
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get(key) or ())
        names = [tensor for tensor in names if key != "unexpected_keys" or not OLD_BUFFERS.search(tensor)]
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise ModelError(
                f"{name} {problem}: {names[0]}{more}",
                expected="complete weights and the config.json of the same model",
                do="take another copy of the model; --gates warn continues with this one",
            )


def check_finite_weights(name: str, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raises ModelError for a weight that is not finite. Under ZeRO-3 each rank checks its own shards.

    Args:
        name: of the model.
        weights: all or some of the model's `named_parameters`.
    """
    for place, weight in weights:
        values = weight.detach() if not hasattr(weight, "ds_tensor") else _read_shard(weight)
        if values.is_meta or values.numel() == 0 or values.dtype not in FLOATS:
            continue
        if getattr(weight, "quant_state", None) is not None:  # packed 4-bit values, stored as a dtype of floats
            continue
        if not all(math.isfinite(bound) for bound in torch.aminmax(values)):
            raise ModelError(
                f"{name}: {place} holds values that are not finite",
                expected="numbers",
                do="take another copy of the model, or an earlier checkpoint",
            )


def _read_shard(weight: nn.Parameter) -> torch.Tensor:
    """Returns this rank's values of a weight that ZeRO-3 shards, without the uninitialised padding at the end."""
    # DeepSpeed sets ds_tensor and ds_numel (see upstream.py); torch's types do not have them.
    shard = weight.ds_tensor.detach().flatten()  # type: ignore[attr-defined]
    rank = dist.get_rank() if dist.is_initialized() else 0
    return shard[: max(0, weight.ds_numel - rank * shard.numel())]  # type: ignore[attr-defined]


# -- an adapter --------------------------------------------------------------------------------------------------------


def check_adapter_config(name: str, file: str) -> None:
    """Raises ModelError for an adapter_config.json that does not describe a LoRA adapter of a model.

    Args:
        name: of the adapter.
        file: path of its adapter_config.json.
    """
    try:
        described = read_record(Path(file))
    except (OSError, ValueError, RecursionError) as error:
        raise _bad_adapter(name, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(described, dict):
        raise _bad_adapter(name, f"a {type(described).__name__}, not a mapping")
    for problem in _find_problems(name, described):
        raise _bad_adapter(name, problem)


def _bad_adapter(name: str, problem: str) -> ModelError:
    return ModelError(
        f"the adapter {name} cannot be used: its {ADAPTER_CONFIG}: {problem}",
        expected="a LoRA adapter (also rsLoRA, DoRA) as PEFT saves it",
        do="take another copy of the adapter, or correct the file",
    )


def _find_problems(name: str, described: Mapping[str, Any]) -> Iterator[str]:
    if described.get("peft_type") != "LORA":
        yield f"peft_type is {_show(described.get('peft_type'))}, but only LORA is supported"
    yield from _find_base_problem(name, described.get("base_model_name_or_path"))
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
        yield from _find_names_problem(key, described.get(key))
    if described.get("megatron_config"):  # PEFT would import the module that it names
        yield "it is for Megatron (megatron_config)"
    yield from _find_replication_problem(described.get("layer_replication"))


def _find_base_problem(name: str, base: Any) -> Iterator[str]:
    if not isinstance(base, str) or not base:
        yield f"base_model_name_or_path is {_show(base)}, not the name of a model"
    elif "://" in base or base.endswith(PICKLES) or (Path(base).is_file() and not is_gguf(base)):
        yield f"base_model_name_or_path is {_show(base)}, which is neither a folder nor a Hub id"
    elif Path(base).is_dir() and Path(base).resolve() == Path(name).resolve():
        yield "base_model_name_or_path names the adapter itself"
    elif (Path(base) / ADAPTER_CONFIG).is_file() and not (Path(base) / "config.json").is_file():
        yield f"base_model_name_or_path is {_show(base)}, another adapter"


def _find_names_problem(key: str, names: Any) -> Iterator[str]:
    if isinstance(names, str):
        try:
            re.compile(names)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{key} is no regular expression ({error})"
        if NESTED_REPETITION.search(names) or len(names) > 10_000:
            yield f"{key} is a regular expression that may never finish"
    elif names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        yield f"{key} is {_show(names)}, neither a list of names nor a regular expression"


def _find_replication_problem(ranges: Any) -> Iterator[str]:
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
