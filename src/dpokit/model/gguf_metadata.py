"""Reads the metadata of a GGUF file, and refuses a file that is damaged or of a kind that is not supported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers.integrations.gguf import read_gguf_metadata

from dpokit.errors import DpokitError, ModelError, find_disk_trouble

# `general.architecture` of the models whose conversion tests/model/test_gguf.py proves.
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def read_metadata(file: Path) -> dict[str, Any]:
    """Returns the file's metadata. Raises: ModelError: it is no GGUF file, or not of a supported model."""
    with file.open("rb") as start:
        magic = start.read(4)
    if magic != b"GGUF":
        refuse_file(file, f"it is no GGUF file: it begins with {magic!r}, not with {b'GGUF'!r}")
    metadata: dict[str, Any]
    metadata, _ = read_gguf_metadata(str(file), ("tokenizer.ggml.tokens",))
    kind, parts = metadata.get("general.type", "model"), metadata.get("split.count", 1)
    if kind != "model":
        refuse_file(file, f"it holds a part of a model (general.type is {kind!r})")
    if parts > 1:
        refuse_file(
            file,
            f"it is one of {parts} files of a model",
            do="join them: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )
    architecture = metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        refuse_file(
            file,
            f"its architecture {architecture!r} is not supported",
            expected=f"one of: {', '.join(ARCHITECTURES)}",
            do="name a folder with the model's safetensors, or its Hub id",
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        refuse_file(file, "it has no tokenizer (tokenizer.ggml.tokens)")
    for key, number in metadata.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and not 0 <= number < len(tokens):
            refuse_file(file, f"{key} is {number}, and it has {len(tokens):,} tokens")
    return metadata


@contextmanager
def file_errors(name: str) -> Iterator[None]:
    """Turns an error of reading the file, of any library, into a ModelError. Errors of writing stay as they are."""
    try:
        yield
    except (DpokitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if find_disk_trouble(error) is not None and not isinstance(error, PermissionError):
            raise
        refuse_file(name, f"it cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})", error)


def refuse_file(
    name: str | Path,
    problem: str,
    error: Exception | None = None,
    *,
    expected: str = "a whole GGUF file of a language model",
    do: str = "take another copy of the file, or name a folder with the model's safetensors",
) -> NoReturn:
    """Raises ModelError that the file `name` has this problem, caused by `error`."""
    raise ModelError(f"--model_name_or_path {name}: {problem}", expected=expected, do=do) from error


def refuse_model(file: Path, problem: str) -> NoReturn:
    """Raises ModelError that a file's model has this problem: dpokit would compute something else than the model."""
    refuse_file(
        file,
        problem,
        expected=f"a plain model of one of the architectures {', '.join(ARCHITECTURES)}",
        do="name a folder with the model's safetensors, or its Hub id",
    )
