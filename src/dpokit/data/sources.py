"""Where rows come from: the Hub, a file, a folder; whole or streamed."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DownloadManager, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from dpokit.errors import DataError, find_disk_trouble

# Only an empty cell of a CSV is none: "NA", "None" and "null" are answers.
OPTIONS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False, "na_values": [""]}}
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

Rows: TypeAlias = Dataset | IterableDataset


def load_splits(name: str | None, config: str | None, *, streaming: bool) -> dict[str, Rows]:
    """Every split of a dataset by name, rows untouched.

    Args:
        name: a Hub id, a file (JSONL, JSON, CSV, Parquet, also .gz), or a folder of such files or of `save_to_disk`.
        config: the dataset's configuration, where it has several.
        streaming: read rows as they are needed.

    Raises:
        DataError: not there, not readable, broken, empty; it names file and line where there is one.
    """
    if not name:
        raise DataError("no dataset was named", expected="a Hub id, a file or a folder", do="--dataset_name ID|PATH")
    path = Path(name).expanduser()
    if path.is_file():
        return _load_file(path, streaming=streaming)
    if path.is_dir():
        return _load_folder(path, config, streaming=streaming)
    if name.startswith((".", "/", "~")) or path.suffix in (*BUILDERS, ".gz"):
        raise DataError(
            f"--dataset_name {name}: there is no such file",
            expected="a file, a folder or a Hub id",
            do="correct the path (it is taken from where the command is run)",
        )
    try:
        return dict(load_dataset(name, config, streaming=streaming))
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, OSError) as error:
        raise find_disk_trouble_or(
            error,
            f"--dataset_name {name} could not be loaded from the Hub: {' '.join(str(error).split())[:300]}",
            "a dataset that this machine can reach, with the configuration asked for",
            "check the name and --dataset_config; for a gated set log in with `hf auth login`; without a network "
            "give a file or a folder",
        ) from error


def find_disk_trouble_or(error: BaseException, seen: str, expected: str, do: str) -> Exception:
    """A full disk while the cache is written is not the dataset's fault: it is said as what it is."""
    trouble = find_disk_trouble(error) if getattr(error, "errno", None) != 2 else None
    return trouble or DataError(seen, expected=expected, do=do)


def get_split(splits: dict[str, Rows], split: str, flag: str) -> Rows:
    """One split. Raises: DataError naming the splits there are."""
    if split not in splits:
        remedy = f"--{flag} {next(iter(splits))}"
        if flag == "dataset_test_split":
            remedy = "name one of them with --dataset_test_split, hold out a part of the training rows with "
            remedy += (
                "--eval_fraction 0.05, or do without evaluation: --eval_strategy no --load_best_model_at_end false"
            )
        raise DataError(f"there is no split {split!r}; there is {', '.join(splits)}", expected=f"--{flag}", do=remedy)
    return splits[split]


def _builder(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    return BUILDERS.get(Path(name).suffix.lower())


def _load_file(path: Path, *, streaming: bool) -> dict[str, Rows]:
    builder = _builder(path)
    if builder is None:
        raise DataError(
            f"{path} is a file of an unknown kind",
            expected="one of " + ", ".join(BUILDERS) + " (each also .gz)",
            do="convert it, or rename it to what it is",
        )
    if builder != "parquet":
        # Checked ahead of loading: pyarrow lets some broken encodings through and names no line for the rest.
        check_text_file(path, as_json_lines=builder == "json")
    try:
        # datasets unpacks text files by itself, Parquet files not.
        whole = DownloadManager().extract(str(path)) if path.name.endswith(".parquet.gz") else str(path)
        return dict(load_dataset(builder, data_files={"train": whole}, streaming=streaming, **OPTIONS.get(builder, {})))
    except Exception as error:
        cause = error.__cause__ or error
        raise find_disk_trouble_or(
            error,
            f"{path} cannot be read: {' '.join(str(cause).split())[:300]}",
            f"a whole {builder} file with the same columns in every row",
            "mend the file or export it again",
        ) from error


def _load_folder(path: Path, config: str | None, *, streaming: bool) -> dict[str, Rows]:
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = load_from_disk(str(path))
            splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
            return {k: v.to_iterable_dataset() for k, v in splits.items()} if streaming else splits
        files = {file: _builder(file) for file in sorted(path.rglob("*")) if file.is_file() and _builder(file)}
        for file, builder in files.items():
            if builder != "parquet":
                check_text_file(file, as_json_lines=builder == "json")
        options = OPTIONS["csv"] if set(files.values()) == {"csv"} else {}
        return dict(load_dataset(str(path), config, streaming=streaming, **options))
    except DataError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise find_disk_trouble_or(
            error,
            f"the folder {path} cannot be read as a dataset: {' '.join(str(cause).split())[:300]}",
            "files named after their splits (train.jsonl, test.jsonl), all of one kind",
            "mend the folder, or name one file",
        ) from error


def check_text_file(path: Path, *, as_json_lines: bool) -> None:
    """Reads a text file once. Raises: DataError for an empty, cut-off or wrongly encoded one, naming the line."""

    def refuse(seen: str, do: str) -> DataError:
        return DataError(f"{path}: {seen}", expected="a whole UTF-8 file with one row a line", do=do)

    number, last = 0, ""
    try:
        for number, last in _numbered_lines(path):  # both are what an error speaks of
            if as_json_lines and number == 1 and last.lstrip().startswith("["):
                lines = []  # of one list, not a row a line
                for numbered in _numbered_lines(path):
                    number, last = numbered
                    lines.append(last)
                json.loads("".join(lines))
                return
            if as_json_lines and last.strip():
                row: Any = json.loads(last)
                if not isinstance(row, dict):
                    raise refuse(f"line {number} is not an object of columns", "write one JSON object a line")
    except UnicodeDecodeError as error:
        raise refuse(f"line {number + 1} is not UTF-8 ({error.reason})", "save the file as UTF-8") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise refuse(f"the gzip data is cut off or broken after line {number}", "download or pack it again") from error
    except json.JSONDecodeError as error:
        if number == 1 and last.strip() in ("{", ""):
            return  # one object over several lines: left to the loader
        at = error.lineno if error.doc != last else number  # of a whole list, or of the one line that was read
        raise refuse(f"line {at} is broken JSON: {error}", f"mend line {at}, or delete it") from error
    if number == 0:
        raise refuse("the file is empty", "name another file")


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        # Decoded line by line: a text file is decoded in blocks, and an error in one names no line.
        for number, line in enumerate(file, start=1):
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows marks a file's beginning
