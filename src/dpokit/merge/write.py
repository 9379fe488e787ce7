"""What a merge writes, and what is read back of it."""

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpokit.errors import ModelError, SettingsError
from dpokit.merge.layers import load_to_merge, merge_layers
from dpokit.rundir import read_record
from dpokit.settings.load import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WHOLE = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, as transformers reads it: powers of ten. Raises: SettingsError."""
    found = re.fullmatch(r"(\d+)\s*([KMGT])B", text.strip(), re.I)
    if found is None or int(found[1]) < 1:
        raise SettingsError(
            f"--max-shard-size {text} is no size",
            expected="a whole number and KB, MB, GB or TB",
            do="--max-shard-size 5GB",
        )
    return int(found[1]) * 10 ** (3 * ("KMGT".index(found[2].upper()) + 1))


def write_model(
    part: Path,
    folder: Path,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str | None,
    max_shard_size: str,
    dequantised: bool,
) -> tuple[str, dict[str, str] | None]:
    """Writes config and weights; returns the dtype they were trained in, and `hash_tensors` of what was written.

    A whole model that stays as it is is linked, not copied, and nothing of it is hashed (None).

    Args:
        part: where to.
        folder: of an adapter or a whole model.
        dtype: of what is written; None for that of the training, or of the whole model as it was saved.

    Raises: ModelError.
    """
    config = folder / "config.json"
    described = read_record(config) if config.exists() else {}
    stored = described.get("dtype", "float32") if described else None
    files = [path for pattern in WHOLE for path in folder.glob(pattern)]
    if stored is not None and dtype in (None, stored):
        # What was gathered is saved anew, tied weights once and by their own name; so is a model with code of its own.
        linkable = part not in folder.parents and "auto_map" not in described
        if linkable and all(path.stat().st_size <= parse_size(max_shard_size) for path in files):
            for path in files:
                _link(path, part / path.name)
            return stored, None
        dtype = stored
    policy = load_to_merge(settings, folder, tokenizer, dequantised=dequantised)
    trained = str(settings.model.dtype) if settings.model.dtype in DTYPES else str(policy.config.dtype).split(".")[-1]
    merged = merge_layers(policy, DTYPES[dtype or trained])
    del policy
    written = hash_tensors(merged)
    merged.save_pretrained(part, max_shard_size=max_shard_size)
    return stored or trained, written


def _link(path: Path, to: Path) -> None:
    """The same file under a second name; a copy where the file system has no links. Neither is ever changed."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def hash_tensors(model: PreTrainedModel) -> dict[str, str]:
    """The sha256 of each tensor that a model is saved with."""
    return {name: _hash(tensor) for name, tensor in model.state_dict().items()}


def _hash(tensor: torch.Tensor) -> str:
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def reload(folder: Path, written: dict[str, str] | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that others will load from the folder, by the plainest call.

    Args:
        written: `hash_tensors` of what was saved; None where its files were only linked.
        trust_remote_code: the run's; where it is not set, a model with code of its own cannot be loaded.

    Raises: ModelError where it is not what was written.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    told = {name: sorted(map(str, found)) for name, found in info.items() if found}
    if not told and written is not None:
        read = hash_tensors(model)
        changed = sorted(name for name in written.keys() | read.keys() if written.get(name) != read.get(name))
        told = {"changed tensors": changed} if changed else {}
    if told:
        name, found = next(iter(told.items()))
        raise ModelError(
            f"what was written is not what is read back: {name.replace('_', ' ')}: {', '.join(found[:3])}",
            expected="the same tensors; nothing was kept",
            do="run it again; where it stays so, report it with the versions in run.json",
        )
    return model
