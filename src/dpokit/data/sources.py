"""Loads rows from the Hub, a file or a folder, whole or streamed."""

import errno
import glob
import hashlib
import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    DownloadConfig,
    DownloadManager,
    Features,
    IterableDataset,
    LargeList,
    List,
    ReadInstruction,
    Value,
    concatenate_datasets,
    config,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetNotFoundError
from datasets.features import Json

from dpokit.atomic_files import read_record
from dpokit.console import say
from dpokit.data.check_file import check_file, is_list, unpack, write_lines
from dpokit.data.check_lines import Findings, check_lines, write_good_rows
from dpokit.data.file_kinds import check_kind
from dpokit.data.files import BUILDERS, Splits, find_builder, find_files
from dpokit.errors import DataError, find_disk_trouble
from dpokit.file_hashes import hash_file
from dpokit.reachable_hub import use_cache_without_hub

# Only an empty cell of a CSV is missing: "NA", "None" and "null" can be answers.
OPTIONS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False, "na_values": [""]}}
# Builders of `datasets` that a Hub dataset may use; `cache` reads what another wrote earlier, without a network.
HUB_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "cache")
# Errors of reading the data; the others (ENOSPC, EROFS, ...) come from writing the cache.
READ_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)

SHOWN_LINES = 20
HELD_OUT = re.compile(r"test|val|dev|eval|held")  # names of splits that nobody should train on

Rows: TypeAlias = Dataset | IterableDataset


def load_splits(
    name: str | None,
    config_name: str | None,
    *,
    streaming: bool,
    ignore: Collection[str] = (),
    skip_bad: bool = False,
) -> dict[str, Rows]:
    """Loads every split of a dataset, by name.

    Args:
        name: a Hub id, a file (JSONL, JSON, CSV, Parquet, also .gz), or a folder of such files or of `save_to_disk`.
        config_name: the dataset's configuration, if it has several.
        streaming: read rows as they are needed.
        ignore: columns that are left out unread.
        skip_bad: read a row of JSONL or CSV that cannot be read as an empty row, in place of an error.

    Raises:
        DataError: missing, unreadable, broken, empty or too large data; the error names file and line. Or a column
            without text (images, audio, ...) that is not in `ignore`, or a name in `ignore` that no split has.
    """
    if not name:
        raise DataError("no dataset was named", expected="a Hub id, a file or a folder", do="--dataset_name ID|PATH")
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path, streaming=streaming, ignore=ignore, skip_bad=skip_bad)
    if path.is_dir():
        return _load_folder(path, config_name, streaming=streaming, ignore=ignore, skip_bad=skip_bad)
    if path.exists():
        raise DataError(
            f"--dataset_name {name} is a pipe or a device",
            expected="a file, a folder or a Hub id",
            do="write its rows to a file",
        )
    if name.startswith((".", "/", "~")) or path.suffix in (*BUILDERS, ".gz"):
        raise DataError(
            f"--dataset_name {name}: there is no such file",
            expected="a file, a folder or a Hub id",
            do="correct the path (relative to the current folder)",
        )
    return _load_from_hub(name, config_name, streaming=streaming, ignore=ignore)


def find_disk_trouble_or(error: BaseException, problem: str, expected: str, do: str) -> Exception:
    """Returns the error of the disk if it is full or failing while the cache is written, else a DataError."""
    trouble = None if getattr(error, "errno", None) in READ_ERRORS else find_disk_trouble(error)
    return trouble or DataError(problem, expected=expected, do=do)


def get_split(splits: dict[str, Rows], split: str, flag: str) -> Rows:
    """Returns one split, or slices as `train[:90%]`, with plus signs between several.

    Raises: DataError with the names of the splits, or for a slice of a stream, which has no known end.
    """
    parts = [part.partition("[")[0].strip() for part in split.split("+")]
    if split not in splits and split != parts[0] and all(part in splits for part in parts):
        return _slice_splits(splits, split, flag)
    if split not in splits:
        if flag == "dataset_test_split":
            remedy = "name one with --dataset_test_split, hold out a part of the training rows with "
            remedy += (
                "--eval_fraction 0.05, or train without evaluation: --eval_strategy no --load_best_model_at_end false"
            )
        else:
            training = next((name for name in splits if not HELD_OUT.search(name)), "NAME")
            remedy = f"name the split to train on: --{flag} {training}"
        raise DataError(
            f"there is no split {split!r}; there is {', '.join(splits)}", expected="a split of the dataset", do=remedy
        )
    return splits[split]


def _slice_splits(splits: dict[str, Rows], split: str, flag: str) -> Rows:
    whole = {name: rows for name, rows in splits.items() if isinstance(rows, Dataset)}
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in whole.items()})
        parts = [whole[cut.splitname].select(range(cut.from_, cut.to)) for cut in slices if cut.from_ < cut.to]
        if not parts:
            sizes = ", ".join(f"{name} has {len(rows):,} rows" for name, rows in whole.items())
            raise ValueError(f"this slice has no row: {sizes}")
        return concatenate_datasets(parts)
    except ValueError as error:
        is_stream = len(whole) < len(splits)
        raise DataError(
            f"--{flag} {split}: " + ("a stream has no slices" if is_stream else " ".join(str(error).split())[:200]),
            expected="a slice such as train[:90%] or train[100:200]",
            do="--dataset_streaming false, or --max_train_samples" if is_stream else f"correct --{flag}",
        ) from error


def _load_file(path: Path, *, streaming: bool, ignore: Collection[str], skip_bad: bool) -> dict[str, Rows]:
    builder = find_builder(path)
    if builder is None:
        raise DataError(
            f"{path} is a file of an unknown kind",
            expected="one of " + ", ".join(BUILDERS) + " (each also with .gz)",
            do="convert the file, or give it the right ending",
        )
    try:
        return _load_files(path, builder, {"train": [path]}, streaming=streaming, ignore=ignore, skip_bad=skip_bad)
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise find_disk_trouble_or(
            error,
            f"{path} cannot be read: {' '.join(str(cause).split())[:300]}",
            f"a complete {builder} file with the same columns in every row",
            "correct the file, or export it again",
        ) from error


def _load_folder(
    path: Path, config_name: str | None, *, streaming: bool, ignore: Collection[str], skip_bad: bool
) -> dict[str, Rows]:
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _load_saved(path, streaming=streaming, ignore=ignore)
        builder, splits = find_files(path, config_name)
        return _load_files(path, builder, splits, streaming=streaming, ignore=ignore, skip_bad=skip_bad)
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise find_disk_trouble_or(
            error,
            f"the folder {path} cannot be read as a dataset: {' '.join(str(cause).split())[:300]}",
            "files named after their splits (train.jsonl, test.jsonl), all of one kind",
            "correct the folder, or name one file",
        ) from error


def _load_files(
    path: Path, builder: str, splits: Splits, *, streaming: bool, ignore: Collection[str], skip_bad: bool
) -> dict[str, Rows]:
    content = hashlib.sha256()
    readable: dict[str, list[Path]] = {}
    mixed: list[dict[str, Any]] = []
    for split, files in splits.items():
        readable[split] = []
        for file in files:
            copy, findings = _make_readable(file, builder, skip_bad=skip_bad)
            readable[split].append(copy)
            content.update(hash_file(copy).encode())
            mixed += findings.mixed
    options = dict(OPTIONS.get(builder, {}))
    if mixed:
        # `datasets` finds a column's type in the first megabytes, and turns later values of other types into text.
        names = dict.fromkeys(name for row in mixed for name in row)
        rows = [{name: row.get(name) for name in names} for row in mixed]
        options["features"] = Dataset.from_list(rows, on_mixed_types="use_json").features
    if builder == "parquet":
        first = next(file for files in readable.values() for file in files)
        features = Features.from_arrow_schema(pq.read_schema(first))
        options["columns"] = [name for name in features if name not in ignore]
        _check_names(str(path), [features], ignore)
    # `datasets` recognises a cached file by path and time, which may stay the same when the content changes. The
    # configuration's name is part of the cache's name, so it is a hash of the content.
    paths = {split: [glob.escape(str(file.absolute())) for file in files] for split, files in readable.items()}
    loaded = load_dataset(builder, content.hexdigest()[:32], data_files=paths, streaming=streaming, **options)
    return dict(loaded) if builder == "parquet" else _leave_out(str(path), loaded, ignore)


def _make_readable(file: Path, builder: str, *, skip_bad: bool) -> tuple[Path, Findings]:
    """Returns the checked file, or a copy in the cache of `datasets`: unpacked, row by row, or without bad rows.

    `datasets` unpacks text files, but not Parquet files, and it reads a whole JSON list into memory.
    """
    if file.name.endswith(".parquet.gz"):
        check_kind(file, builder)  # `check_file` sees the copy
        copy = _copy(file, ".parquet", unpack)
    elif builder == "json" and is_list(file):
        copy = _copy(file, ".jsonl", write_lines)
        return copy, check_lines(copy, builder, name=file)
    else:
        copy = file
    findings = check_file(copy, builder, skip_bad=skip_bad)
    if findings.bad:
        numbers = ", ".join(f"{number:,}" for number in list(findings.bad)[:SHOWN_LINES])
        more = ", ..." if len(findings.bad) > SHOWN_LINES else ""
        lines = f"lines {numbers}{more}"
        say(f"{file}: {len(findings.bad):,} of {findings.rows:,} rows cannot be read and are skipped: {lines}")
        ending = ".csv" if builder == "csv" else ".jsonl"
        copy = _copy(file, f".good{ending}", lambda source, target: write_good_rows(source, builder, target))
    return copy, findings


def _copy(file: Path, ending: str, write: Callable[[Path, Path], None]) -> Path:
    """Returns the copy of a file in the cache, by its content, and writes it if it is not there."""
    folder = Path(config.EXTRACTED_DATASETS_PATH)
    whole = folder / f"{hash_file(file)}{ending}"
    if not whole.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{whole.name}.{os.getpid()}"
        try:
            write(file, part)
            part.replace(whole)
        finally:
            part.unlink(missing_ok=True)
    return whole


def _load_saved(folder: Path, *, streaming: bool, ignore: Collection[str]) -> dict[str, Rows]:
    """Loads a folder of `save_to_disk`. Raises: DataError if it names or links to files outside of itself."""

    def refuse(file: Path, problem: str) -> DataError:
        return DataError(
            f"{file} {problem}",
            expected="a folder that `save_to_disk` wrote",
            do="save the dataset again, or name one file",
        )

    for file in folder.rglob("*"):
        if not file.resolve().is_relative_to(folder.resolve()):
            raise refuse(file, f"is a link that leads out of {folder}")
        if not (file.is_file() or file.is_dir()):
            raise refuse(file, "is not a regular file")
        if file.name in ("dataset_dict.json", "state.json"):
            record = read_record(file)
            names = record.get("splits") or [entry["filename"] for entry in record["_data_files"]]
            if outside := [name for name in names if Path(name).name != name]:
                raise refuse(file, f"names {outside[0]}, which is outside of its folder")
    saved = load_from_disk(str(folder))
    splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    splits = {k: v.to_iterable_dataset() for k, v in splits.items()} if streaming else splits
    return _leave_out(str(folder), splits, ignore)


def _load_from_hub(name: str, config_name: str | None, *, streaming: bool, ignore: Collection[str]) -> dict[str, Rows]:
    use_cache_without_hub(name)
    try:
        builder = load_dataset_builder(name, config_name)
        _check_hub_builder(name, builder)
        if streaming:
            return _leave_out(name, dict(builder.as_streaming_dataset()), ignore)
        _check_downloads(builder)
        builder.download_and_prepare()
        return _leave_out(name, dict(builder.as_dataset()), ignore)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, OSError) as error:
        raise find_disk_trouble_or(
            error,
            f"--dataset_name {name} could not be loaded from the Hub: {' '.join(str(error).split())[:300]}",
            "a dataset that this machine can reach, with this configuration",
            "check the name and --dataset_config; for a gated dataset log in with `hf auth login`; without a network "
            "name a file or a folder",
        ) from error


def _find_kind(builder: DatasetBuilder) -> str:
    """Returns the module of `datasets` that reads the files: json, csv, parquet, imagefolder, ..."""
    return type(builder).__module__.rpartition(".")[2]


def _check_hub_builder(name: str, builder: DatasetBuilder) -> None:
    """Raises: DataError for a dataset that is not text, or whose README names files outside of its repository."""
    kind = _find_kind(builder)
    if kind not in HUB_BUILDERS:
        raise DataError(
            f"--dataset_name {name} holds {kind}",
            expected="rows of text: JSON, CSV, Parquet or Arrow files",
            do="name a dataset of preference pairs",
        )
    files = [str(file) for several in (builder.config.data_files or {}).values() for file in several]
    outside = [file for file in files if not file.startswith("hf://") or "::" in file]
    separator = getattr(builder.config, "sep", None) or ""
    if outside or len(separator) > 1:
        problem = f"names {outside[0][:200]} as its file" if outside else f"has the separator {separator[:200]!r}"
        raise DataError(
            f"--dataset_name {name}: its README {problem}",
            expected="files of the dataset itself, and a separator of one letter",
            do="download the files, and name one of them",
        )


def _check_downloads(builder: DatasetBuilder) -> None:
    """Downloads a dataset's files into the cache, where its builder finds them. Raises: DataError as `check_file`."""
    kind = _find_kind(builder)
    downloads = DownloadManager(download_config=DownloadConfig(token=builder.token))
    for several in (builder.config.data_files or {}).values() if kind in set(BUILDERS.values()) else ():
        for file in map(Path, downloads.download(list(several))):
            if find_builder(file) == kind:  # else it is packed in another way, which `datasets` unpacks
                # A README may name another separator than a comma.
                check_file(file, "text" if kind == "csv" else kind, skip_bad=None)


def _leave_out(name: str, splits: Mapping[str, Rows], ignore: Collection[str]) -> dict[str, Rows]:
    """Returns the splits without the columns of `ignore`: decoding media may open a file or an address."""
    _check_names(name, [rows.features for rows in splits.values() if rows.features is not None], ignore)
    kept: dict[str, Rows] = {}
    for split, rows in splits.items():
        columns = [column for column in ignore if column in (rows.column_names or ignore)]
        if columns and isinstance(rows, IterableDataset):
            rows = rows.decode(False)
        kept[split] = rows.remove_columns(columns) if columns else rows
    return kept


def _check_names(name: str, splits: Sequence[Features], ignore: Collection[str]) -> None:
    """Raises DataError for columns without text that are not ignored, and for ignored columns that no split has."""
    columns = {column: feature for features in splits for column, feature in features.items()}
    missing = [column for column in ignore if splits and column.partition(".")[0] not in columns]
    if missing:
        raise DataError(
            f"--ignore_columns {','.join(missing)}: {name} has no such column",
            expected="columns of the dataset: " + ", ".join(columns),
            do="correct --ignore_columns",
        )
    texts = {column for features in splits for column in _find_text_columns(features)}
    media = {column: feature for column, feature in columns.items() if column not in texts and column not in ignore}
    if media:
        kinds = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in media.items())
        raise DataError(
            f"{name} has columns that hold no text: {kinds}",
            expected="a dataset of texts: only text models are trained",
            do=f"--ignore_columns {shlex.quote(','.join(media))} leaves them out, or name another dataset",
        )


def _find_text_columns(features: Features) -> list[str]:
    """Returns the columns of texts, numbers, and lists or objects of these."""

    def is_text(feature: Any) -> bool:
        if isinstance(feature, Mapping):
            return all(is_text(part) for part in feature.values())
        if isinstance(feature, (List, LargeList)):
            return is_text(feature.feature)
        return isinstance(feature, (ClassLabel, Json)) or (isinstance(feature, Value) and "binary" not in feature.dtype)

    return [name for name, feature in features.items() if is_text(feature)]
