"""Writes the merged model, and checks it by loading it again."""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpokit.atomic_files import read_record
from dpokit.errors import ModelError, SettingsError
from dpokit.merge.layers import load_to_merge, merge_layers
from dpokit.model.tuned_folder import DTYPES, find_final_dtype
from dpokit.settings.load import Settings

WHOLE = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, in powers of ten as transformers counts. Raises: SettingsError."""
    match = re.fullmatch(r"(\d+)\s*([KMGT])B", text.strip(), re.I)
    if match is None or int(match[1]) < 1:
        raise SettingsError(
            f"--max-shard-size {text} is not a size",
            expected="a whole number and KB, MB, GB or TB",
            do="--max-shard-size 5GB",
        )
    return int(match[1]) * 10 ** (3 * ("KMGT".index(match[2].upper()) + 1))


def write_model(
    part: Path,
    folder: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str | None,
    max_shard_size: str,
    dequantised: bool,
) -> dict[str, str] | None:
    """Writes config and weights; returns `hash_tensors` of the written model.

    A whole model that needs no change is hard-linked instead of written, and not hashed (None).

    Args:
        part: the target folder.
        folder: the folder of an adapter or a whole model.
        dtype: of the written weights; None for `find_final_dtype`: that of the settings, or of the base.

    Raises: ModelError.
    """
    record = _read_config(folder)
    stored = read_whole_dtype(folder)
    dtype = dtype or find_final_dtype(settings)
    files = [path for pattern in WHOLE for path in folder.glob(pattern)]
    if stored is not None and dtype in (None, stored):
        # Gathered weights are saved again, with tied weights once and under their own name; so is custom model code.
        linkable = part not in folder.parents and "auto_map" not in record
        if linkable and all(path.stat().st_size <= parse_size(max_shard_size) for path in files):
            for path in files:
                _link(path, part / path.name)
            return None
        dtype = stored
    policy = load_to_merge(settings, folder, tokenizer, dequantised=dequantised)
    trained = str(settings.model.dtype) if settings.model.dtype in DTYPES else str(policy.config.dtype).split(".")[-1]
    merged = merge_layers(policy, DTYPES[dtype or trained])
    del policy
    written = hash_tensors(merged)
    merged.save_pretrained(part, max_shard_size=max_shard_size)
    return written


def read_whole_dtype(folder: Path) -> str | None:
    """Returns the dtype of the whole model in the folder; None for an adapter's folder."""
    record = _read_config(folder)
    return str(record.get("dtype", "float32")) if record else None


def _read_config(folder: Path) -> Any:
    config = folder / "config.json"
    return read_record(config) if config.exists() else {}


def _link(path: Path, to: Path) -> None:
    """Hard-links the file, or copies it on a file system without links. Nothing changes either file later."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def hash_tensors(model: PreTrainedModel) -> dict[str, str]:
    """Dtype, shape and sha256 of each tensor in the model's state dict."""
    return {name: _hash(tensor) for name, tensor in model.state_dict().items()}


def _hash(tensor: torch.Tensor) -> str:
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def reload(folder: Path, written: dict[str, str] | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Loads the merged model with a plain `from_pretrained`, as others will, and compares it with the written tensors.

    Args:
        written: `hash_tensors` of the written model; None if its files were only linked.
        trust_remote_code: the run's setting; a model with custom code cannot be loaded without it.

    Raises: ModelError: the loaded tensors differ.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    differences = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if not differences and written is not None:
        loaded = hash_tensors(model)
        changed = sorted(name for name in written.keys() | loaded.keys() if written.get(name) != loaded.get(name))
        differences = {"changed tensors": changed} if changed else {}
    if differences:
        kind, names = next(iter(differences.items()))
        raise ModelError(
            f"the loaded model differs from the written one: {kind.replace('_', ' ')}: {', '.join(names[:3])}",
            expected="the same tensors; no merged model was kept",
            do="run the command again; if the error stays, report it with the versions in run.json",
        )
    return model
