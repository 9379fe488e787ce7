"""What the folder of a tuned or merged model has of its base: dtype, processors and settings of generation."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file
from trl import ModelConfig

from dpokit.atomic_files import read_record, write_json
from dpokit.console import say
from dpokit.errors import ModelError
from dpokit.model.check import QUIET, WEIGHTS, is_gguf, read_config
from dpokit.model.gguf import find_model_folder
from dpokit.model.load import find_base, find_revision
from dpokit.settings.load import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_ROUNDED_AWAY = 0.2  # of the length of the change
HEADER_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors names them
# Files of a model that also reads images, sound or video. Its tokenizer writes the chat template of text.
PROCESSOR_FILES: tuple[str, ...] = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
PROCESSOR_FILES += ("image_processor_config.json", "audio_processor_config.json", "chat_template.json")


def find_final_dtype(settings: Settings) -> str | None:
    """Returns the dtype of a tuned model's files: `--dtype` if a layer of settings has it, else the dtype of the base.

    Training may load a 16-bit base in fp32, TRL's default; its checkpoints keep fp32. None if the base's is not known.
    """
    if "dtype" in settings.origins and settings.model.dtype in DTYPES:
        return str(settings.model.dtype)
    name, revision = _name_base(settings.model)
    if is_gguf(name):  # the file and its copy are gone
        return None
    config = read_config(name, revision)
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    stored = [part.get(key) for part in parts if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    dtype = next((str(value) for value in stored if value is not None), None) or read_stored_dtype(name, revision)
    return dtype if dtype in DTYPES else None


def _name_base(model: ModelConfig) -> tuple[str, str | None]:
    """Returns name and revision of the whole model that the run started from; of an adapter, its base's."""
    base = find_base(model)
    return _find_folder(base or str(model.model_name_or_path)), find_revision(model, base)


def _find_folder(name: str) -> str:
    """Returns the folder of a model's files; of a GGUF file that is gone, its name."""
    try:
        return find_model_folder(name)
    except ModelError:
        return name


def _name_files(name: str, revision: str | None) -> list[str]:
    """Returns the names of a model's files of weights, sorted. Raises: OSError, ValueError, KeyError."""
    weights, index = (cached_file(name, file, revision=revision, **QUIET) for file in WEIGHTS)
    if weights is not None:
        return [WEIGHTS[0]]
    return [] if index is None else sorted(set(read_record(Path(index))["weight_map"].values()))


def read_stored_dtype(name: str, revision: str | None) -> str | None:
    """Returns the dtype of the first tensor in 16 or 32 bits of a model's first file; None without one."""
    try:
        names = _name_files(name, revision)
        if not names:
            return None
        with safe_open(str(cached_file(name, names[0], revision=revision, **QUIET)), framework="pt") as tensors:
            stored = (tensors.get_slice(tensor).get_dtype() for tensor in list(tensors.keys()))
            return next((HEADER_DTYPES[dtype] for dtype in stored if dtype in HEADER_DTYPES), None)
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def plan_dtypes(model: PreTrainedModel, names: Sequence[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the dtype of each named tensor of a model in `dtype`: the model's class keeps some layers in fp32."""
    kept = model._get_dtype_plan(dtype)
    return {
        name: next((kept[part] for part in kept if re.search(rf"(^|\.){part}(\.|$)", name)), dtype) for name in names
    }


def round_weights(
    model: PreTrainedModel | PeftModel, state: Mapping[str, torch.Tensor], dtype: str | None
) -> tuple[dict[str, torch.Tensor], str | None]:
    """Returns a copy of the weights in `dtype` on the CPU, tied weights still tied; and the dtype of the result.

    An adapter stays as it was trained, and so do a model whose dtype is the requested one and weights that would no
    longer be finite. A line says whether they were rounded.
    """
    whole = dict(state)
    if isinstance(model, PeftModel):
        return whole, None
    floats = [name for name, value in whole.items() if value.is_floating_point()]
    trained = str(whole[floats[0]].dtype).removeprefix("torch.")  # of shards that were gathered, not of the model
    if dtype is None or dtype == trained:
        return whole, trained
    copies: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, target in plan_dtypes(model, floats, DTYPES[dtype]).items():
        value = whole[name]
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in copies:
            copies[key] = value.detach().to("cpu", target)
            if not torch.isfinite(copies[key]).all() and torch.isfinite(value).all():
                say(
                    f"the tuned model is written in {trained}, as {name} exceeds the range of {dtype}, its base's dtype"
                )
                return dict(state), trained
        whole[name] = copies[key]
    say(f"the final weights are written in {dtype}, the dtype of the base; --dtype {trained} would keep {trained}")
    return whole, dtype


def warn_of_rounding(
    model: PreTrainedModel | PeftModel,
    settings: Settings,
    trained: Mapping[str, torch.Tensor],
    rounded: Mapping[str, torch.Tensor],
) -> None:
    """Says how much of the change by training is lost in rounding, if it is more than MOST_ROUNDED_AWAY.

    A base in bf16 has no finer values than bf16, so a change of less than half a step is rounded to no change.
    """
    if all(value.dtype == rounded[name].dtype for name, value in trained.items()):
        return  # nothing was rounded: the base need not be read
    prefix, changed, lost = getattr(model, "base_model_prefix", ""), 0.0, 0.0
    try:
        for name, base in _read_base(settings.model):
            key = name if name in trained else f"{prefix}.{name}"
            if key in trained and trained[key].dtype != rounded[key].dtype and trained[key].shape == base.shape:
                exact = trained[key].detach().to("cpu", torch.float64)
                changed += float((exact - base.double()).square().sum())
                lost += float((exact - rounded[key].double()).square().sum())
    except (OSError, ValueError, KeyError, SafetensorError):  # the base has been moved meanwhile
        return
    share = (lost / changed) ** 0.5 if changed else 0.0
    if share > MOST_ROUNDED_AWAY:
        say(
            f"warning: rounding takes away {share:.0%} of what training changed, as its steps were smaller than those "
            "of the dtype. `dpokit merge RUN --checkpoint N --dtype float32` writes the exact weights of a checkpoint"
        )


def _read_base(model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields each tensor of the base's files. Raises: OSError, ValueError, KeyError, SafetensorError."""
    name, revision = _name_base(model)
    for file in _name_files(name, revision):
        with safe_open(str(cached_file(name, file, revision=revision, **QUIET)), framework="pt") as tensors:
            for tensor in list(tensors.keys()):
                yield tensor, tensors.get_tensor(tensor)


def complete_folder(folder: Path, settings: Settings, ends: Sequence[int], *, dtype: str | None = None) -> None:
    """Adds the base's processor files, and corrects config.json and generation_config.json of a saved model.

    Args:
        folder: of a whole model or an adapter, which has no config.json.
        settings: of the run.
        ends: ids of the tokens that end a turn, EOS first: a server stops at those in generation_config.json.
        dtype: of the weights in the folder; None if config.json has it already.
    """
    name, revision = _name_base(settings.model)
    config = folder / "config.json"
    if config.exists():
        write_changed(config, _follow_base(read_record(config), read_config(name, revision), dtype))
        generation = folder / "generation_config.json"
        record = read_record(generation) if generation.exists() else {}
        write_changed(generation, record | {"eos_token_id": _join_ends(ends, record.get("eos_token_id"))})
    model = settings.model
    for source, its_revision in dict.fromkeys(
        [(str(model.model_name_or_path), model.model_revision), (name, revision)]
    ):
        for file in PROCESSOR_FILES:
            try:
                path = cached_file(_find_folder(source), file, revision=its_revision, **QUIET)
            except (OSError, ValueError):  # the base has been moved meanwhile
                continue
            if path is not None and not (folder / file).exists():
                shutil.copyfile(path, folder / file)


def _follow_base(config: Mapping[str, Any], base: Any, dtype: str | None) -> dict[str, Any]:
    """Returns the config with `use_cache` as in the base's, which the Trainer switches off, and with the dtype."""
    followed = {key: value for key, value in config.items() if key != "use_cache" or not isinstance(base, dict)}
    if isinstance(base, dict) and "use_cache" in base:
        followed["use_cache"] = base["use_cache"]
    for key, value in followed.items() if dtype is not None else ():
        if key == "dtype" and value in DTYPES:
            followed[key] = dtype
        elif isinstance(value, dict) and value.get("dtype") in DTYPES:  # the config of a part, such as text
            followed[key] = value | {"dtype": dtype}
    return followed


def _join_ends(ends: Sequence[int], of_model: Any) -> int | list[int]:
    """Returns the ends and the ids that the model already ends at, each once; a single id is no list."""
    listed = of_model if isinstance(of_model, list) else [] if of_model is None else [of_model]
    ids = list(dict.fromkeys([*ends, *listed]))
    return ids if len(ids) > 1 else ids[0]


def write_changed(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON file if its content changes; if it is a hard link, the other file stays as it is."""
    if not path.exists() or read_record(path) != record:
        write_json(path, record)
