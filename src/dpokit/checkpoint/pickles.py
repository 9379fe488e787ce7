"""The pickles of a folder of weights, searched before anything loads them. No torch.

To load a pickle is to call the functions that it names, so a pickle from a stranger can run any program. Here an
unpickler that calls nothing reads it first: it looks up each name in `ALLOWED` and puts an inert object where the real
one would build something. A pickle that passes names only what torch, DeepSpeed and torch's distributed checkpoints
need for tensors, numbers and their tables.

torch's files are zip archives, which torch reads with a reader of its own; an archive that two readers could
understand differently is refused.
"""

import io
import os
import pickle
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from dpokit.errors import RunFolderError

MAX_PICKLE_BYTES = 2**28  # tensors lie beside the pickle, not in it
TORCH_SUFFIXES = {".pt", ".pth", ".bin"}
DCP_TABLE, DCP_SUFFIX = ".metadata", ".distcp"
ZERO_LATEST = "latest"  # DeepSpeed's file that names the folder of its shards
NEVER_LOADED = {"training_args.bin"}  # transformers' copy of its flags, in checkpoints of earlier versions
# Every name that a pickle may look up. None of these, whatever it is called with, does more than build a value.
ALLOWED: dict[str, set[str]] = {
    "_codecs": {"encode"},
    "__builtin__": {"set"},
    "builtins": {"set"},
    "collections": {"OrderedDict", "defaultdict"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct"},
    "numpy.core.multiarray": {"_reconstruct"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {
        *("Size", "Tensor", "device", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128"),
        *("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "IntStorage"),
        *("ShortStorage", "CharStorage", "ByteStorage", "BoolStorage"),
    },
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_wrapper_subclass"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "deepspeed.runtime.fp16.loss_scaler": {"DynamicLossScaler", "LossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
    "torchao.optim.subclass_4bit": {"OptimState4bit"},
    "torchao.optim.subclass_8bit": {"OptimState8bit"},
    "torchao.optim.subclass_fp8": {"OptimStateFp8"},
}
_END, _END_64, _LOCATOR_64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


class HostilePickleError(Exception):
    """A pickle that names something it does not need, or that cannot be searched. Its text says which."""


class _Inert:
    """Stands for whatever a pickle builds, and keeps what it was given."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """As a list."""

    def extend(self, items: Any) -> None:
        """As a list."""

    def add(self, item: Any) -> None:
        """As a set."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """As a mapping."""


class _Searcher(pickle.Unpickler):
    """Reads a pickle and calls nothing that it names."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise HostilePickleError(f"names {module}.{name}, which no weights need")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def find_pickle_trouble(folder: Path) -> str | None:
    """Why a folder of weights must not be loaded: an odd file in it, a link, or a pickle; None where all is well.

    Every pickle is read, tensors are not.
    """
    try:
        _search(folder)
    except HostilePickleError as trouble:
        return str(trouble)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    return None


def check_pickles(folder: Path) -> None:
    """Raises RunFolderError where `find_pickle_trouble` finds something."""
    trouble = find_pickle_trouble(folder)
    if trouble is not None:
        raise RunFolderError(
            f"{folder} is not loaded: {trouble}",
            expected="weights, and the tables that torch and DeepSpeed write beside them",
            do="take weights from a source that you trust, as safetensors",
        )


def needs_trust(folder: Path) -> bool:
    """Whether loading the folder runs an unpickler without limits: DeepSpeed's, or torch's for distributed shards."""
    return any(any(folder.glob(pattern)) for pattern in (f"*/{DCP_TABLE}", "*/*_states.pt", ZERO_LATEST))


def _search(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(folder.resolve()):
            raise HostilePickleError(f"{name} is a link to a place outside of the folder")
        if not path.is_dir() and not path.is_file():
            raise HostilePickleError(f"{name} is neither a file nor a folder")
        if path.is_dir() or path.name in NEVER_LOADED:
            continue
        try:
            if path.name == ZERO_LATEST:
                _check_latest(path)
            elif path.name == DCP_TABLE:
                _search_shards(path)
            elif path.suffix in TORCH_SUFFIXES:
                with path.open("rb") as file:
                    _search_archive(file, 0, path.stat().st_size)
        except HostilePickleError as trouble:
            raise HostilePickleError(f"{name} {trouble}") from None


def _check_latest(path: Path) -> None:
    """DeepSpeed loads the shards from the folder that this file names."""
    with path.open("rb") as file:
        named = file.read(4096).decode(errors="replace").strip()
    if named in ("", ".", "..") or "/" in named:
        raise HostilePickleError(f"names {named!r}, which is no folder beside it")


def _search_pickle(content: bytes) -> Any:
    """What the pickle holds, with inert objects in it."""
    try:
        return _Searcher(io.BytesIO(content)).load()
    except HostilePickleError:
        raise
    except Exception as error:  # any opcode may be used against its purpose
        raise HostilePickleError(f"is no pickle that can be read ({type(error).__name__})") from None


def _search_shards(table: Path) -> None:
    """torch's distributed checkpoint: a bare pickle that says where in which file each tensor or value lies."""
    if table.stat().st_size > MAX_PICKLE_BYTES:
        raise HostilePickleError(f"has {table.stat().st_size:,} bytes")
    found = _search_pickle(table.read_bytes())
    entries = found.state.get("storage_data") if isinstance(getattr(found, "state", None), dict) else None
    if not isinstance(entries, dict):
        raise HostilePickleError("is no table of a distributed checkpoint")
    for entry in entries.values():
        fields = entry.state if isinstance(entry, _Inert) and isinstance(entry.state, dict) else {}
        name, begin, size = (fields.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or not isinstance(begin, int) or not isinstance(size, int):
            raise HostilePickleError("has an entry without file, offset and length")
        if name != Path(name).name or not name.endswith(DCP_SUFFIX) or fields.get("transform_descriptors"):
            raise HostilePickleError(f"places an entry in {name!r}")
        with (table.parent / name).open("rb") as file:
            _search_archive(file, begin, size)


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._begin + self._at)
        content = self._file.read(min(len(buffer), max(0, self._size - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _search_archive(file: BinaryIO, begin: int, size: int) -> None:
    """What `torch.save` writes: a zip archive of one pickle, and the bytes of each tensor."""
    window: BinaryIO = io.BufferedReader(_Window(file, begin, size))
    if window.read(4) != b"PK\x03\x04":
        raise HostilePickleError("is not in the form that torch.save writes")
    try:
        _check_layout(window, size)
        archive = zipfile.ZipFile(window)
        names = [entry.filename for entry in archive.infolist()]
        root = names[0].partition("/")[0]
        tables = [entry for entry in archive.infolist() if entry.filename == f"{root}/data.pkl"]
        strange = [name for name in names if not name.startswith(f"{root}/") or name.endswith("constants.pkl")]
        if len(tables) != 1 or len({name.lower() for name in names}) != len(names) or strange:
            raise HostilePickleError("is an archive that torch.save does not write")
        (table,) = tables
        if table.compress_type != zipfile.ZIP_STORED or table.file_size > MAX_PICKLE_BYTES:
            raise HostilePickleError(f"holds a pickle of {table.file_size:,} bytes, or a compressed one")
        content = archive.read(table)
    except (zipfile.BadZipFile, struct.error, ValueError, IndexError, EOFError, NotImplementedError) as error:
        raise HostilePickleError(f"is an archive that cannot be read ({type(error).__name__})") from None
    _search_pickle(content)


def _check_layout(window: BinaryIO, size: int) -> None:
    """Raises HostilePickleError unless the directory, the end records and the end of the file follow on each other.

    With bytes between or behind them one reader may find another directory than the next.
    """
    window.seek(max(0, size - 98))
    tail = window.read()
    end = tail[-22:]
    directory_size, directory_at, comment = struct.unpack("<IIH", end[12:22])
    followed_by = size - 22
    if end[:4] != _END or comment:
        raise HostilePickleError("is an archive with something behind its end")
    if tail[-42:-38] == _LOCATOR_64:
        followed_by = size - 98
        if struct.unpack("<Q", tail[-34:-26])[0] != followed_by or tail[:4] != _END_64:
            raise HostilePickleError("is an archive with two ends")
        directory_size, directory_at = struct.unpack("<QQ", tail[40:56])
    if directory_at + directory_size != followed_by:
        raise HostilePickleError("is an archive with something before its end")
