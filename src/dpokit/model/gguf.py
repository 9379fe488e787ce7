"""Reads a model from a GGUF file: converted once into a folder of the cache, with tokenizer and generation config."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpokit.atomic_files import new_folder, read_record
from dpokit.caches import find_caches
from dpokit.console import say
from dpokit.errors import DpokitError, MachineError, find_disk_trouble
from dpokit.file_hashes import hash_file
from dpokit.model.check import is_gguf
from dpokit.model.gguf_conversion import FORMAT, RECORD_FILE, convert
from dpokit.model.gguf_metadata import file_errors, refuse

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
            refuse(name, "there is no such file", do="correct the path; from the Hub: hf download ID FILE.gguf")
        sha256 = hash_file(file)
    folder = find_caches() / "gguf" / f"{sha256[:32]}-{FORMAT}"
    if not _is_whole(folder):
        with _disk_errors(), _lock(folder):
            if not _is_whole(folder):
                with new_folder(folder) as part:
                    convert(file, part, sha256)
                made = read_record(folder / RECORD_FILE)
                chat = "" if made["has_chat_template"] else "; it has no chat template"
                say(
                    f"{name}: {made['weights']:,} weights ({', '.join(made['tensor_types'])}) are converted once, to "
                    f"{made['dtype']} in {folder}{chat}"
                )
    _COPIES[name] = str(folder)
    return _COPIES[name]


def describe_gguf(name: str) -> dict[str, Any] | None:
    """Returns what run.json records of a GGUF file: its name, sha256 and types, and the copy's dtype; else None."""
    if not is_gguf(name):
        return None
    made: dict[str, Any] = read_record(Path(find_model_folder(name)) / RECORD_FILE)
    return {"file": name} | {key: value for key, value in made.items() if key not in ("format", "files")}


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
