"""Finds the files that a dataset's name stands for: a path, a pattern, or the address of a file."""

import glob
import os
import shutil
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from datasets import DownloadConfig, DownloadManager, config

from dpokit.data.files import BUILDERS, PACKED, find_builder
from dpokit.errors import DataError, find_disk_trouble_or
from dpokit.file_hashes import hash_file

ADDRESSES = ("https://", "hf://")
HUB_FILE = "hf://datasets/"
KINDS = "one of " + ", ".join(BUILDERS) + f" (each also with {' or '.join(PACKED)})"


def find_paths(name: str) -> list[Path]:
    """Returns the file or the folder of a dataset's name, or the files that fit a pattern; none for a Hub id.

    Args:
        name: a path; a pattern with `*`, `?` or `[...]`, if no file has this very name; the address of a file, which is
            downloaded into the cache of `datasets`, and again only if the server's ETag has changed; or a Hub id.

    Raises: DataError: a missing file, a pattern that fits nothing, or an address that cannot be read.
    """
    if name.startswith(HUB_FILE) and name.count("/") <= HUB_FILE.count("/") + 1:
        return []  # a whole dataset
    if "://" in name:
        return [_download(name)]
    path = Path(name).expanduser()
    if path.exists():
        return [path]
    if glob.has_magic(name):
        return _match(name)
    if name.startswith((".", "/", "~")) or path.suffix.lower() in (*BUILDERS, *PACKED):
        raise DataError(
            f"{name}: there is no such file",
            expected="a file, a folder or a Hub id",
            do="correct the path (relative to the current folder)",
        )
    return []


def find_hub_name(name: str) -> tuple[str, str | None]:
    """Returns a dataset's Hub id and revision: both may stand in an address, `hf://datasets/owner/name@revision`."""
    if not name.startswith(HUB_FILE):
        return name, None
    identifier, _, revision = name.removeprefix(HUB_FILE).partition("@")
    return identifier.rstrip("/"), revision or None


def _match(pattern: str) -> list[Path]:
    absolute = str(Path(pattern).expanduser())
    paths = [Path(path) for path in sorted(glob.glob(absolute, recursive=True))]  # noqa: PTH207  # Path.glob takes no absolute pattern
    files = [path for path in paths if path.is_file() and find_builder(path)]
    if not files:
        problem = f"fits {len(paths)} paths, and none is a data file" if paths else "fits no file"
        raise DataError(f"{pattern} {problem}", expected=KINDS, do="correct the pattern, and quote it in a shell")
    return files


def _download(address: str) -> Path:
    """Returns a copy of the file in the cache, under the file's own name, which tells its kind."""
    name = PurePosixPath(unquote(urlsplit(address).path)).name
    if not address.startswith(ADDRESSES) or find_builder(PurePosixPath(name)) is None:
        raise DataError(
            f"{address} is no address of a data file",
            expected=f"https://... or {HUB_FILE}OWNER/NAME/FILE, with the ending {KINDS}",
            do="name the file itself, or download it and name the copy",
        )
    try:
        file = Path(DownloadManager(download_config=DownloadConfig()).download(address))
        folder = Path(config.EXTRACTED_DATASETS_PATH) / sha256(f"{address} {hash_file(file)}".encode()).hexdigest()[:32]
        copy = folder / name
        if not copy.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{os.getpid()}.part"
            shutil.copyfile(file, part)
            part.replace(copy)
        return copy
    except Exception as error:  # of the network and of the Hub's client, of several libraries
        raise find_disk_trouble_or(
            error,
            f"{address} could not be downloaded: {' '.join(str(error).split())[:300]}",
            "a file that this machine can reach",
            "check the address and the network; for a gated dataset log in with `hf auth login`",
        ) from error
