"""Loads rows from the Hub, a file or a folder, whole or streamed."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    Features,
    ReadInstruction,
    concatenate_datasets,
    config,
    load_dataset,
    load_from_disk,
)

from dpokit.atomic_files import read_record
from dpokit.console import say
from dpokit.data.check_file import check_file, is_list, unpack, write_lines
from dpokit.data.check_lines import Findings, check_lines, write_good_rows
from dpokit.data.file_kinds import check_kind
from dpokit.data.files import Splits, find_builder, find_files
from dpokit.data.hub_source import load_from_hub
from dpokit.data.paths import KINDS, find_paths
from dpokit.data.text_columns import ColumnChoice, Rows, check_names, leave_out
from dpokit.errors import DataError, find_disk_trouble_or
from dpokit.file_hashes import hash_file

# Only an empty cell of a CSV is missing: "NA", "None" and "null" can be answers.
OPTIONS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False, "na_values": [""]}}

SHOWN_LINES = 20
HELD_OUT = re.compile(r"test|val|dev|eval|held")  # names of splits that nobody should train on


def load_splits(
    name: str | Sequence[str] | None,
    config_name: str | None,
    *,
    streaming: bool,
    ignore: Collection[str] = (),
    keep: Collection[str] | None = None,
    skip_bad: bool = False,
) -> dict[str, Rows]:
    """Loads every split of a dataset, by name.

    Args:
        name: a Hub id, a file (JSONL, JSON, CSV, Parquet, also .gz or .zst), a folder of such files or of
            `save_to_disk`, a pattern or the address of files (`paths.find_paths`); or several files of one kind.
        config_name: the dataset's configuration, if it has several.
        streaming: read rows as they are needed.
        ignore: columns that are left out unread.
        keep: the only columns that are read; None for all but those of `ignore`.
        skip_bad: read a row of JSONL or CSV that cannot be read as an empty row, in place of an error.

    Raises:
        DataError: missing, unreadable, broken, empty or too large data; the error names file and line. Or a column
            without text (images, audio, ...) that is not in `ignore`, or a name in `ignore` or `keep` that no split
            has.
    """
    names = [name] if isinstance(name, str) else list(name or ())
    if not all(names) or not names:
        raise DataError("no dataset was named", expected="a Hub id, a file or a folder", do="--dataset_name ID|PATH")
    paths = list({path.resolve(): path for each in names for path in find_paths(each)}.values())  # each file once
    choice = ColumnChoice(tuple(ignore), None if keep is None else tuple(keep))
    if len(names) > 1 or len(paths) > 1:
        return _load_several(names, paths, streaming=streaming, choice=choice, skip_bad=skip_bad)
    if not paths:
        return load_from_hub(names[0], config_name, streaming=streaming, choice=choice)
    path = paths[0]
    if path.is_file():
        return _load_file([path], str(path), streaming=streaming, choice=choice, skip_bad=skip_bad)
    if path.is_dir():
        return _load_folder(path, config_name, streaming=streaming, choice=choice, skip_bad=skip_bad)
    raise DataError(
        f"{path} is a pipe or a device", expected="a file, a folder or a Hub id", do="write its rows to a file"
    )


def get_split(splits: dict[str, Rows], split: str, flag: str) -> Rows:
    """Returns one split, or slices as `train[:90%]`, with plus signs between several.

    Args:
        flag: the flag that names the split; or, with a colon, the key of a source in a mixture.

    Raises: DataError with the names of the splits, or for a slice of a stream, which has no known end.
    """
    written = flag if flag.endswith(":") else f"--{flag}"
    parts = [part.partition("[")[0].strip() for part in split.split("+")]
    if split not in splits and split != parts[0] and all(part in splits for part in parts):
        return _slice_splits(splits, split, written)
    if split not in splits:
        if flag in ("dataset_test_split", "test_split:"):
            remedy = f"name one with {written}, hold out a part of the training rows with "
            remedy += (
                "--eval_fraction 0.05, or train without evaluation: --eval_strategy no --load_best_model_at_end false"
            )
        else:
            training = next((name for name in splits if not HELD_OUT.search(name)), "NAME")
            remedy = f"name the split to train on: {written} {training}"
        raise DataError(
            f"there is no split {split!r}; there is {', '.join(splits)}", expected="a split of the dataset", do=remedy
        )
    return splits[split]


def _slice_splits(splits: dict[str, Rows], split: str, written: str) -> Rows:
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
            f"{written} {split}: " + ("a stream has no slices" if is_stream else " ".join(str(error).split())[:200]),
            expected="a slice such as train[:90%] or train[100:200]",
            do="--dataset_streaming false, or --max_train_samples" if is_stream else f"correct {written}",
        ) from error


def _load_several(
    names: Sequence[str], paths: Sequence[Path], *, streaming: bool, choice: ColumnChoice, skip_bad: bool
) -> dict[str, Rows]:
    """Loads the files of a pattern or a list as one split."""
    label = " ".join(names)
    kinds = {find_builder(path) for path in paths}
    wrong = [str(path) for path in paths if not path.is_file()]
    if wrong or len(kinds) > 1 or not paths:
        problem = f"{wrong[0]} is no file" if wrong else f"files of {len(kinds)} kinds"
        raise DataError(
            f"{label}: {problem if paths else 'no file'}",
            expected="files of one kind and one layout",
            do="name files of different kinds as several sources, with a comma between them",
        )
    return _load_file(paths, label, streaming=streaming, choice=choice, skip_bad=skip_bad)


def _load_file(
    paths: Sequence[Path], label: str, *, streaming: bool, choice: ColumnChoice, skip_bad: bool
) -> dict[str, Rows]:
    builder = find_builder(paths[0])
    if builder is None:
        raise DataError(
            f"{paths[0]} is a file of an unknown kind",
            expected=KINDS,
            do="convert the file, or give it the right ending",
        )
    try:
        splits = {"train": list(paths)}
        return _load_files(label, builder, splits, streaming=streaming, choice=choice, skip_bad=skip_bad)
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise find_disk_trouble_or(
            error,
            f"{label} cannot be read: {' '.join(str(cause).split())[:300]}",
            f"complete {builder} files with the same columns in every row",
            "correct the file, or export it again",
        ) from error


def _load_folder(
    path: Path, config_name: str | None, *, streaming: bool, choice: ColumnChoice, skip_bad: bool
) -> dict[str, Rows]:
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _load_saved(path, streaming=streaming, choice=choice)
        builder, splits = find_files(path, config_name)
        return _load_files(str(path), builder, splits, streaming=streaming, choice=choice, skip_bad=skip_bad)
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
    label: str, builder: str, splits: Splits, *, streaming: bool, choice: ColumnChoice, skip_bad: bool
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
        check_names(label, [features], choice)
        options["columns"] = choice.find_kept(features)
    # `datasets` recognises a cached file by path and time, which may stay the same when the content changes. The
    # configuration's name is part of the cache's name, so it is a hash of the content.
    paths = {split: [glob.escape(str(file.absolute())) for file in files] for split, files in readable.items()}
    loaded = load_dataset(builder, content.hexdigest()[:32], data_files=paths, streaming=streaming, **options)
    return dict(loaded) if builder == "parquet" else leave_out(label, loaded, choice)


def _make_readable(file: Path, builder: str, *, skip_bad: bool) -> tuple[Path, Findings]:
    """Returns the checked file, or a copy in the cache of `datasets`: unpacked, row by row, or without bad rows.

    `datasets` unpacks text files in gzip, but neither Parquet nor zstd, and it reads a whole JSON list into memory.
    """
    if file.suffix == ".zst" or file.name.endswith(".parquet.gz"):
        check_kind(file, builder)  # the check below sees the copy
        plain = _copy(file, file.with_suffix("").suffix.lower(), unpack)
        try:
            return _make_readable(plain, builder, skip_bad=skip_bad)
        except DataError as error:
            problem = error.seen.replace(str(plain), str(file))
            raise DataError(problem, expected=error.expected, do=error.do) from error
    if builder == "json" and is_list(file):
        copy = _copy(file, ".jsonl", write_lines)
        return copy, check_lines(copy, builder, name=file)
    findings = check_file(file, builder, skip_bad=skip_bad)
    if findings.bad:
        numbers = ", ".join(f"{number:,}" for number in list(findings.bad)[:SHOWN_LINES])
        more = ", ..." if len(findings.bad) > SHOWN_LINES else ""
        lines = f"lines {numbers}{more}"
        say(f"{file}: {len(findings.bad):,} of {findings.rows:,} rows cannot be read and are skipped: {lines}")
        ending = ".csv" if builder == "csv" else ".jsonl"
        file = _copy(file, f".good{ending}", lambda source, target: write_good_rows(source, builder, target))
    return file, findings


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


def _load_saved(folder: Path, *, streaming: bool, choice: ColumnChoice) -> dict[str, Rows]:
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
    return leave_out(str(folder), splits, choice)
