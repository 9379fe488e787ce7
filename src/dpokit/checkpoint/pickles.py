"""Searches the pickles in a folder of weights before anything loads them. Imports no torch.

Loading a pickle calls the functions that it names, so a pickle from a stranger can run any program. The unpickler of
this module calls nothing: it looks up each name in `ALLOWED` and builds inert objects instead of the real ones. A
pickle that passes names only functions and classes that torch, DeepSpeed and torch's distributed checkpoints need for
tensors, numbers and their tables.

torch's files are zip archives, and torch reads them with its own reader. An archive that two readers could understand
differently is refused.
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

MAX_PICKLE_BYTES = 2**28  # tensors are stored beside the pickle, not in it
TORCH_SUFFIXES = {".pt", ".pth", ".bin"}
DCP_TABLE, DCP_SUFFIX = ".metadata", ".distcp"
ZERO_LATEST = "latest"  # DeepSpeed's file that names the folder of its shards
NEVER_LOADED = {"training_args.bin"}  # transformers' copy of its flags, in checkpoints of earlier versions
# Every name that a pickle may look up. Each of them only builds a value, whatever its arguments.
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
    """A pickle names something that weights do not need, or cannot be searched; the text says which."""


class _Inert:
    """Replaces any object that a pickle builds, and keeps its arguments and its state."""

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
    """Unpickler that calls no function named by the pickle."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED.get(module, ()):
            raise HostilePickleError(f"names {module}.{name}, which no weights need")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return _Inert()


def find_pickle_problem(folder: Path) -> str | None:
    """Why a folder of weights must not be loaded: a pickle, a link or a special file in it; None if it may be loaded.

    Reads every pickle, but no tensor.
    """
    try:
        _search(folder)
    except HostilePickleError as problem:
        return str(problem)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror})"
    return None


def check_pickles(folder: Path) -> None:
    """Raises RunFolderError if `find_pickle_problem` finds one."""
    problem = find_pickle_problem(folder)
    if problem is not None:
        raise RunFolderError(
            f"{folder} is not loaded: {problem}",
            expected="weights, and the tables that torch and DeepSpeed write beside them",
            do="use weights from a source that you trust, as safetensors",
        )


def needs_trust(folder: Path) -> bool:
    """Whether loading the folder needs an unrestricted unpickler: DeepSpeed's, or torch's for distributed shards."""
    return any(any(folder.glob(pattern)) for pattern in (f"*/{DCP_TABLE}", "*/*_states.pt", ZERO_LATEST))


def _search(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode) and not path.resolve().is_relative_to(folder.resolve()):
            raise HostilePickleError(f"{name} is a link to a place outside the folder")
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
        except HostilePickleError as problem:
            raise HostilePickleError(f"{name} {problem}") from None


def _check_latest(path: Path) -> None:
    """Raises HostilePickleError unless the file names a folder beside it: DeepSpeed loads the shards from there."""
    with path.open("rb") as file:
        name = file.read(4096).decode(errors="replace").strip()
    if name in ("", ".", "..") or "/" in name:
        raise HostilePickleError(f"names {name!r}, which is no folder beside it")


def _search_pickle(content: bytes) -> Any:
    """The value of a pickle, with inert objects in it. Raises: HostilePickleError."""
    try:
        return _Searcher(io.BytesIO(content)).load()
    except HostilePickleError:
        raise
    except Exception as error:  # a forged pickle can misuse any opcode
        raise HostilePickleError(f"is not a readable pickle ({type(error).__name__})") from None


def _search_shards(table: Path) -> None:
    """Searches torch's distributed checkpoint: a bare pickle that lists file and offset of each tensor or value."""
    if table.stat().st_size > MAX_PICKLE_BYTES:
        raise HostilePickleError(f"has {table.stat().st_size:,} bytes")
    metadata = _search_pickle(table.read_bytes())
    entries = metadata.state.get("storage_data") if isinstance(getattr(metadata, "state", None), dict) else None
    if not isinstance(entries, dict):
        raise HostilePickleError("is not a table of a distributed checkpoint")
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
    """A part of a file, readable like a file."""

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
    """Searches a file of `torch.save`: a zip archive of one pickle and the bytes of each tensor."""
    window: BinaryIO = io.BufferedReader(_Window(file, begin, size))
    if window.read(4) != b"PK\x03\x04":
        raise HostilePickleError("is not in the format of torch.save")
    try:
        _check_layout(window, size)
        archive = zipfile.ZipFile(window)
        names = [entry.filename for entry in archive.infolist()]
        root = names[0].partition("/")[0]
        tables = [entry for entry in archive.infolist() if entry.filename == f"{root}/data.pkl"]
        others = [name for name in names if not name.startswith(f"{root}/") or name.endswith("constants.pkl")]
        if len(tables) != 1 or len({name.lower() for name in names}) != len(names) or others:
            raise HostilePickleError("is an archive unlike those of torch.save")
        (table,) = tables
        if table.compress_type != zipfile.ZIP_STORED or table.file_size > MAX_PICKLE_BYTES:
            raise HostilePickleError(f"holds a pickle of {table.file_size:,} bytes, or a compressed one")
        content = archive.read(table)
    # Everything that zipfile raises for a damaged or foreign archive, and IndexError for an empty one.
    except (zipfile.BadZipFile, struct.error, ValueError, IndexError, EOFError, NotImplementedError) as error:
        raise HostilePickleError(f"is an archive that cannot be read ({type(error).__name__})") from None
    _search_pickle(content)


def _check_layout(window: BinaryIO, size: int) -> None:
    """Raises HostilePickleError unless directory, end records and end of the file follow each other without a gap.

    With other bytes between or after them, two readers may find different directories.
    """
    window.seek(max(0, size - 98))
    tail = window.read()
    end = tail[-22:]
    directory_size, directory_at, comment = struct.unpack("<IIH", end[12:22])
    followed_by = size - 22
    if end[:4] != _END or comment:
        raise HostilePickleError("is an archive with extra bytes after its end record")
    if tail[-42:-38] == _LOCATOR_64:
        followed_by = size - 98
        if struct.unpack("<Q", tail[-34:-26])[0] != followed_by or tail[:4] != _END_64:
            raise HostilePickleError("is an archive with two end records")
        directory_size, directory_at = struct.unpack("<QQ", tail[40:56])
    if directory_at + directory_size != followed_by:
        raise HostilePickleError("is an archive with extra bytes before its end record")
