"""Finds the files that a dataset's name stands for: a path, a pattern, or the address of a file."""

import glob
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import httpx
from datasets import DownloadConfig, DownloadManager, config

from dpokit.data.files import BUILDERS, PACKED, find_builder
from dpokit.errors import DataError, find_disk_trouble_or
from dpokit.file_hashes import hash_file
from dpokit.settings.mixture import HUB_FILE

ADDRESSES = ("https://", "hf://")
TIMEOUT_SECONDS = 60.0  # without a byte
KINDS = "one of " + ", ".join(BUILDERS) + f" (each also with {' or '.join(PACKED)})"


def find_paths(name: str) -> list[Path]:
    """Returns the file or the folder of a dataset's name, or the files that fit a pattern; none for a Hub id.

    Args:
        name: a path; a pattern with `*`, `?` or `[...]`, if no file has this very name; the address of a file, which is
            downloaded into the cache of `datasets`, and again unless the server's ETag is the same; or a Hub id.

    Raises: DataError: a missing file, a pattern that fits nothing, or an address that cannot be read.
    """
    if name.startswith(HUB_FILE) and name.count("/") <= HUB_FILE.count("/") + 1:
        return []  # a whole dataset
    if "://" in name:
        return [_download(name)]
    try:
        path = Path(name).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, ~nobody, or a zero byte
        raise DataError(
            f"{name[:200]!r} is no path: {error.strerror if isinstance(error, OSError) else error}",
            expected="a file, a folder or a Hub id",
            do="correct the path",
        ) from error
    if is_there:
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
    """Returns a dataset's Hub id and revision: an address may have both, `hf://datasets/owner/name@revision`."""
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
    try:
        name = PurePosixPath(unquote(urlsplit(address).path)).name
    except ValueError:  # brackets that are no IPv6 address
        name = ""
    if not address.startswith(ADDRESSES) or find_builder(PurePosixPath(name)) is None:
        raise DataError(
            f"{address} is no address of a data file",
            expected=f"https://... or {HUB_FILE}OWNER/NAME/FILE, with the ending {KINDS}",
            do="name the file itself, or download it and name the copy",
        )
    folder = Path(config.EXTRACTED_DATASETS_PATH) / sha256(address.encode()).hexdigest()[:32]
    try:
        if address.startswith(("hf://", f"{config.HF_ENDPOINT}/")):  # these need the Hub's client and its token
            file = Path(DownloadManager(download_config=DownloadConfig()).download(address))
            copy = folder / hash_file(file)[:32] / name
            if not copy.exists():
                _write(copy, lambda part: shutil.copyfile(file, part))
            return copy
        return _fetch(address, folder, name)
    except Exception as error:  # of the network and of the Hub's client, of several libraries
        raise find_disk_trouble_or(
            error,
            f"{address} could not be downloaded: {' '.join(str(error).split())[:300]}",
            "a file that this machine can reach",
            "check the address and the network; for a gated dataset log in with `hf auth login`",
        ) from error


def _fetch(address: str, folder: Path, name: str) -> Path:
    """Returns a file's copy below the folder; a copy whose ETag the server still has is not downloaded again."""
    tags = {path.read_text(): path.with_name(name) for path in folder.glob("*/etag") if path.with_name(name).exists()}
    headers = {"Accept-Encoding": "identity", **({"If-None-Match": ", ".join(tags)} if tags else {})}
    with httpx.stream("GET", address, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS) as reply:
        if any(step.url.scheme != "https" for step in (*reply.history, reply)):
            raise ValueError("it leads to an address without encryption")
        tag = reply.headers.get("etag", "")
        if reply.status_code == httpx.codes.NOT_MODIFIED and tag in tags:
            return tags[tag]
        reply.raise_for_status()
        copy = folder / sha256(tag.encode()).hexdigest()[:32] / name

        def write(part: Path) -> None:
            with part.open("wb") as file:
                file.writelines(reply.iter_bytes())

        _write(copy, write)
        if tag:
            copy.with_name("etag").write_text(tag)
    return copy


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
