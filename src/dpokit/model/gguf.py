"""Reads a model from a GGUF file: converted once into a folder of the cache, with tokenizer and generation config."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpokit.atomic_files import new_folder, read_record, sync_folder, write_json
from dpokit.caches import find_caches
from dpokit.console import say
from dpokit.errors import DpokitError, MachineError, find_disk_trouble
from dpokit.file_hashes import hash_file
from dpokit.model.check import is_gguf
from dpokit.model.gguf_conversion import convert_gguf
from dpokit.model.gguf_metadata import file_errors, refuse_file

RECORD_FILE = "gguf.json"
FORMAT = 1  # part of a copy's name: another way of converting makes another copy
PACKAGES = ("dpokit", "gguf", "transformers")
_COPIES: dict[str, str] = {}  # the copies that this process has used, by the file's name


def find_model_folder(name: str) -> str:
    """Returns the folder of a model's files: of a GGUF file its converted copy, made if missing; else the name itself.

    Any process may call it: one at a time converts, and the others use its copy.

    Raises:
        ModelError: a file that is damaged, or of a kind that is not supported.
        MachineError: the cache's file system has no locks.
        RunFolderError: the copy cannot be written.
    """
    if not is_gguf(name):
        return name
    file = Path(name)
    with file_errors(name):
        if not file.is_file() and name in _COPIES:  # it was moved while this process runs
            return _COPIES[name]
        if not file.is_file():
            refuse_file(name, "there is no such file", do="correct the path; from the Hub: hf download ID FILE.gguf")
        sha256 = hash_file(file)
    folder = find_caches() / "gguf" / f"{sha256[:32]}-{FORMAT}"
    if not _is_whole(folder):
        with _disk_errors(), _lock(folder):
            if not _is_whole(folder):
                with new_folder(folder) as part:
                    model = convert_gguf(file, part)
                    _write_record(part, sha256, model)
                chat = "" if model["has_chat_template"] else "; it has no chat template"
                say(
                    f"{name}: {model['weights']:,} weights ({', '.join(model['tensor_types'])}) are converted once, to "
                    f"{model['dtype']} in {folder}{chat}"
                )
    _COPIES[name] = str(folder)
    return _COPIES[name]


def describe_gguf(name: str) -> dict[str, Any] | None:
    """Returns what run.json records of a GGUF file: its name, sha256 and types, and the copy's dtype; else None."""
    if not is_gguf(name):
        return None
    made: dict[str, Any] = read_record(Path(find_model_folder(name)) / RECORD_FILE)
    return {"file": name} | {key: value for key, value in made.items() if key not in ("format", "files")}


def _write_record(folder: Path, sha256: str, model: Mapping[str, Any]) -> None:
    """Flushes a copy to disk, and writes its record last: the file's sha256, the model, and the copy's files."""
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name in files:
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())
    versions = {name: version(name) for name in PACKAGES}
    record = {"format": FORMAT, "sha256": sha256, **model, "versions": versions, "files": files}
    write_json(folder / RECORD_FILE, record)
    sync_folder(folder)


def _is_whole(folder: Path) -> bool:
    """Whether the folder holds a copy with all its files, by their sizes."""
    try:
        files = read_record(folder / RECORD_FILE)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return False


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time make this folder, on all machines that share the cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise MachineError(
                f"the file system of {folder.parent} has no locks: {error.strerror}",
                expected="a cache in which two processes cannot write the same files",
                do="set DPOKIT_CACHE to a folder on another disk",
            ) from error
        yield


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except DpokitError:
        raise
    except Exception as error:  # of any library: safetensors and tokenizers raise their own
        trouble = find_disk_trouble(error)
        if trouble is None:
            raise
        raise type(trouble)(
            f"{trouble.seen}; the converted model was not kept",
            expected="space for the model's weights in float32",
            do="free some space, or set DPOKIT_CACHE to a folder on another disk",
        ) from error
