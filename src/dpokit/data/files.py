"""Finds the files of a data folder by split: only regular files inside it, whatever its README or a link names."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

import yaml
from datasets.data_files import ALL_DEFAULT_PATTERNS, FILES_TO_IGNORE, sanitize_patterns
from datasets.splits import Split

from dpokit.errors import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
# The file names that `push_to_hub` gives to a split.
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
CARD_BYTES = 1 << 20
MOST_LEVELS = 32  # of nested folders
PATTERN_LETTERS = 256

Splits = dict[str, list[Path]]


def find_builder(path: PurePath) -> str | None:
    """Returns the builder of `datasets` for a file of this name, also packed: json, csv, parquet, or None."""
    plain = path.with_suffix("") if path.suffix in PACKED else path
    return BUILDERS.get(plain.suffix.lower())


def find_files(folder: Path, config: str | None) -> tuple[str, Splits]:
    """Returns the builder and the files of each split, by the README's configurations or else by the files' names.

    The rules are those of `datasets`, but a README can only choose among the folder's own files, and its other settings
    (a separator, types of columns) are ignored.

    Args:
        folder: the data folder.
        config: the configuration's name; None for the README's default, or its first.

    Raises:
        DataError: no data, a link that leads out of the folder, a device, or an unknown configuration.
    """
    files = {file.relative_to(folder).as_posix(): file for file in _list_files(folder)}
    kinds = Counter(find_builder(file) for file in files.values())
    builder, _ = max(kinds.items(), key=lambda kind: (kind[1], kind[0] == "parquet", kind[0]), default=(None, 0))
    if builder is None:
        raise _refuse(folder, "it has no data files", "put JSONL, JSON, CSV or Parquet files into it")
    files = {name: file for name, file in files.items() if find_builder(file) == builder}
    patterns = _read_patterns(folder, config)
    splits = _match(files, patterns) if patterns else _find_splits(files)
    if not any(splits.values()):
        raise _refuse(folder, "its README.md names no file of the folder", "correct its data_files, or name one file")
    return builder, splits


def _list_files(folder: Path) -> Iterator[Path]:
    """Yields the data files in order, visiting each folder once. Hidden files and folders are left out."""
    # The files of a snapshot in the Hub's cache are links to its blobs.
    is_snapshot = folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()
    inside = (folder.parent.parent if is_snapshot else folder).resolve()
    visited: set[Path] = set()

    def walk(parent: Path) -> Iterator[Path]:
        real = parent.resolve()
        if real in visited or len(parent.relative_to(folder).parts) > MOST_LEVELS:
            return
        visited.add(real)
        for entry in sorted(parent.iterdir()):
            name = str(entry.relative_to(folder))
            is_data = find_builder(entry) is not None and entry.name not in FILES_TO_IGNORE
            if entry.name.startswith((".", "__")) or not (is_data or entry.is_dir()):
                continue
            if not Path(os.path.realpath(entry)).is_relative_to(inside):  # Path.resolve fails on a link to itself
                raise _refuse(
                    folder,
                    f"{name} is a link that leads out of it",
                    "copy the file into the folder, or name the file itself",
                )
            if entry.is_dir():
                yield from walk(entry)
            elif not entry.is_file():
                raise _refuse(folder, f"{name} is not a regular file", "delete it")
            elif "::" in name or "://" in name:  # `datasets` reads such a path as an address
                raise _refuse(folder, f"the name {name} cannot be read", "rename the file")
            else:
                yield entry

    return walk(folder)


def _read_patterns(folder: Path, config: str | None) -> dict[str, list[str]]:
    """Returns the file patterns of each split of a configuration in the README's front matter; empty without one."""
    configs = [c for c in _read_card(folder).get("configs") or () if isinstance(c, Mapping)]
    names = [str(c.get("config_name", "default")) for c in configs]
    default = next((name for name, c in zip(names, configs, strict=True) if c.get("default") is True), None)
    chosen = config or default or ("default" if "default" in names else next(iter(names), None))
    if config and config not in names:
        expected = f"one of {', '.join(names)}" if names else "a README.md with configurations"
        raise DataError(
            f"{folder}: there is no configuration {config!r}", expected=expected, do="correct --dataset_config"
        )
    for name, entry in zip(names, configs, strict=True):
        if name == chosen and entry.get("data_files"):
            try:
                return _check_patterns(folder, sanitize_patterns(entry["data_files"]))
            except (ValueError, TypeError, AttributeError) as error:
                raise _refuse(folder, "its README.md has broken data_files", "correct its data_files") from error
    return {}


def _check_patterns(folder: Path, patterns: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    for pattern in (str(pattern) for values in patterns.values() for pattern in values):
        outside = pattern.startswith(("/", "~")) or ":" in pattern or ".." in PurePath(pattern).parts
        if outside or len(pattern) > PATTERN_LETTERS:
            raise _refuse(
                folder, f"its README.md names files outside of it: {pattern[:200]}", "correct it, or name one file"
            )
    return {split: [str(pattern) for pattern in values] for split, values in patterns.items()}


def read_split_rows(folder: Path, config: str | None) -> dict[str, int]:
    """Returns the number of rows of each split in the README's front matter; empty if it has none."""
    infos = _read_card(folder).get("dataset_info")
    all_infos: list[Any] = infos if isinstance(infos, list) else [infos]
    try:
        chosen = next(info for info in all_infos if config in (None, info.get("config_name")))
        return {str(split["name"]): int(split["num_examples"]) for split in chosen["splits"]}
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError):
        return {}


def _read_card(folder: Path) -> Mapping[str, Any]:
    """Returns a README's front matter; empty if it has none or it cannot be read."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    with readme.open("rb") as file:
        lines = file.read(CARD_BYTES).decode(errors="replace").splitlines()
    if lines[:1] != ["---"]:
        return {}
    try:
        card = yaml.safe_load("\n".join(takewhile(lambda line: line != "---", lines[1:])))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, Mapping) else {}


def _find_splits(files: Mapping[str, Path]) -> Splits:
    """Returns the files by split as `datasets` does: by the names of shards, else of folders, else of files."""
    shards: Splits = {}
    for name, file in files.items():
        if shard := SHARD.fullmatch(name):
            shards.setdefault(shard[1], []).append(file)
    if shards:
        return shards
    for patterns in ALL_DEFAULT_PATTERNS:
        if splits := {split: matches for split, matches in _match(files, patterns).items() if matches}:
            return splits
    return {str(Split.TRAIN): list(files.values())}


def _match(files: Mapping[str, Path], patterns: Mapping[Any, Sequence[str]]) -> Splits:
    """Returns the files that match each split's patterns; `**` matches any number of folders."""
    parts = {str(split): [tuple(PurePath(p).parts) for p in values] for split, values in patterns.items()}
    return {
        split: [file for name, file in files.items() if any(_fits(PurePath(name).parts, p) for p in split_parts)]
        for split, split_parts in parts.items()
    }


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    @cache
    def fits(at: int, star: int) -> bool:
        if star == len(pattern):
            return at == len(parts)
        if pattern[star] == "**":
            last = star == len(pattern) - 1 and at < len(parts)
            return last or fits(at, star + 1) or (at < len(parts) and fits(at + 1, star))
        return at < len(parts) and fnmatchcase(parts[at], pattern[star]) and fits(at + 1, star + 1)

    return fits(0, 0)


def _refuse(folder: Path, problem: str, do: str) -> DataError:
    return DataError(
        f"{folder}: {problem}",
        expected="a folder of data files named after their splits (train.jsonl, test.jsonl)",
        do=do,
    )
