"""The sources of a run's pairs: one dataset, or a mixture of several. No torch."""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Never

from dpokit.errors import SettingsError

NAMES = ("dataset_name", "datasets", "dataset_mixer")  # each names the pairs of a run; one of them is set
SHARES = ("fraction", "weight", "count")  # a source has at most one of them
# Names of other toolkits for keys of a source.
OTHER_NAMES = {"id": "path", "dataset": "path", "config": "name", "dataset_config": "name"}
# The flag that holds for each source that does not set the key itself.
FLAGS = {
    "name": "dataset_config",
    "split": "dataset_train_split",
    "test_split": "dataset_test_split",
    **{name: name for name in ("columns", "ignore_columns", "format", "ranked", "min_score_gap")},
}
# A source of TRL's list whose `path` is the name of a reader, and whose files are in `data_files`.
READERS = ("json", "csv", "parquet")
HUB_FILE = "hf://datasets/"  # the start of the address of a dataset, or of one of its files


@dataclass(frozen=True)
class DataSource:
    """One dataset of a mixture, with the keys that TRL's `datasets` and the alignment handbook use.

    Attributes:
        path: a Hub id, a file, a folder, a pattern or an address.
        name: the configuration.
        data_dir: a folder below `path`.
        data_files: files below `path`; all files if `path` is json, csv or parquet.
        split: the training split, or a slice of it.
        test_split: the split that is evaluated on.
        columns: names of columns, as `--columns`; or a list of the only columns to read, as TRL has it.
        ignore_columns, format, ranked, min_score_gap: as the flags.
        fraction: the source's share of the mixture: all sources have one, and none gives more pairs than it has.
        weight: the share of the source's own pairs that is taken, above 0 and at most 1.
        count: the number of its pairs that is taken.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | Sequence[str] | None = None
    split: str | None = None
    test_split: str | None = None
    columns: Mapping[str, str] | Sequence[str] | None = None
    ignore_columns: str | Sequence[str] | None = None
    format: str | None = None
    ranked: str | None = None
    min_score_gap: float | None = None
    fraction: float | None = None
    weight: float | None = None
    count: int | None = None

    @property
    def location(self) -> str | list[str]:
        """The dataset's name, or its files, as `load_splits` takes them."""
        files = [self.data_files] if isinstance(self.data_files, str) else list(self.data_files or ())
        folder = None if self.path in READERS else self.path
        if self.data_dir is not None:
            folder = self.data_dir if folder is None else _join(folder, self.data_dir)
        if not files:
            return folder or self.path
        places = [file if folder is None else _join(folder, file) for file in files]
        return places[0] if len(places) == 1 else places

    @property
    def locations(self) -> list[str]:
        """The location as a list."""
        place = self.location
        return [place] if isinstance(place, str) else place

    @property
    def place(self) -> str:
        """The location as one text."""
        return " ".join(self.locations)

    @property
    def title(self) -> str:
        """The source's name in tables, messages and data.json: its place, with its configuration in brackets."""
        return self.place + (f" ({self.name})" if self.name else "")

    def identify_rows(self, split: str | None) -> tuple[Any, ...]:
        """Returns a value that is equal for sources with the same place, configuration and split."""
        return tuple(map(_resolve, self.locations)), self.name, split


def split_names(text: str) -> list[str]:
    """Returns the names in a value of `--dataset_name`, which commas separate; a file with a comma is one name."""
    if "," not in text or _exists(text):
        return [text]
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise SettingsError(
            f"--dataset_name {text} has an empty name",
            expected="names with one comma between them",
            do="correct --dataset_name",
        )
    return names


def parse_sources(values: Mapping[str, Any]) -> list[DataSource]:
    """Returns the sources of `--datasets`, `--dataset_mixer` or `--dataset_name`; none if no dataset is named.

    Args:
        values: the settings of a run, by name.

    Raises: SettingsError: an unknown key, a wrong value, a source that is listed twice, or shares that do not fit.
    """
    datasets, mixer = values.get("datasets"), values.get("dataset_mixer")
    if datasets is not None:
        entries = flatten_sources(datasets)
        sources = [_parse_source(entry, f"source {number}") for number, entry in enumerate(entries, 1)]
    elif mixer is not None:
        if not isinstance(mixer, Mapping):
            _refuse(f"--dataset_mixer is {show_json(mixer)}", "names with their shares", "--dataset_mixer '{\"a\": 1}'")
        sources = [_parse_source({"path": path, "weight": weight}, str(path)) for path, weight in mixer.items()]
    else:
        name = values.get("dataset_name")
        sources = [DataSource(path) for path in split_names(str(name))] if name else []
    if not sources and (datasets is not None or mixer is not None):
        _refuse("the mixture has no source", "at least one source", "name one, or give --dataset_name")
    _check_together(sources)
    return sources


def flatten_sources(entries: Any) -> Any:
    """Returns the entries of `--datasets` as one list: a JSON text on the command line may also be a list."""
    if not isinstance(entries, list | tuple):
        return entries
    return [entry for each in entries for entry in (each if isinstance(each, list) else [each])]


def is_other(name: str, then: Any, now: Any) -> bool:
    """Whether a setting has another value than before; the order of a mixture's sources decides which pairs it has."""
    if name == "datasets":
        then = flatten_sources(then)
    if name == "dataset_mixer" and isinstance(then, Mapping) and isinstance(now, Mapping):
        return list(then.items()) != list(now.items())
    return bool(then != now)


def name_keys(text: str, source: DataSource) -> str:
    """Returns a message that names the keys that the source sets in place of the flags for all sources."""
    for key, flag in FLAGS.items():
        if getattr(source, key) is not None:
            text = re.sub(rf"--{flag}\b", f"the key {key}", text)
    return text


def is_local(source: DataSource) -> bool:
    """Whether a source is a file or a folder of this machine, or a pattern of files."""
    return all(
        "://" not in place and (_exists(place) or any(letter in place for letter in "*?["))
        for place in source.locations
    )


def _parse_source(entry: Any, label: str) -> DataSource:
    if not isinstance(entry, Mapping):
        _refuse(f"{label} of --datasets is {show_json(entry)}", "a source with a path", 'write {"path": "ID|PATH"}')
    keys = [field.name for field in fields(DataSource)]
    values: dict[str, Any] = {}
    for key, value in entry.items():
        name = OTHER_NAMES.get(key, key)
        if name not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.5)
            _refuse(
                f"{label} has the key {key!r}",
                "keys of a source: " + ", ".join(keys),
                f"did you mean {near[0]}?" if near else f"remove {key!r}",
            )
        if name in values:
            _refuse(f"{label} has {name} twice, once under another name", "each key once", f"remove {key!r}")
        values[name] = value
    values = {name: value for name, value in values.items() if value is not None}
    if "path" not in values:
        _refuse(f"{label} has no path", "a Hub id, a file or a folder as path", "name it: path: ID|PATH")
    label = f"source {values['path']}"
    for name, value in values.items():
        _check_value(name, value, label)
    if "count" in values:
        values["count"] = int(values["count"])  # YAML's 3.0 is a number of pairs, too
    shares = [name for name in SHARES if name in values]
    if len(shares) > 1:
        _refuse(f"{label} has {' and '.join(shares)}", "one of them", f"remove {' or '.join(shares)}")
    return DataSource(**values)


def _check_value(name: str, value: Any, label: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    finite = is_number and math.isfinite(value)
    if name in ("data_files", "ignore_columns", "columns"):
        items = [value] if isinstance(value, str) else value
        if isinstance(value, Mapping):
            items = [*value, *value.values()] if name == "columns" else None
        fits = isinstance(items, list | tuple) and bool(items) and all(isinstance(item, str) for item in items)
        expected = "a text or a list of texts" + (", or names with their columns" if name == "columns" else "")
    elif name in ("fraction", "weight"):
        least, most = (1e-9, 1e9) if name == "fraction" else (0, 1)  # the sum of larger ones would be infinite
        fits = finite and value > 0 and least <= value <= most
        expected = f"a number above {least:g} and at most {most:,g}: leave out an unused source"
    elif name == "count":
        fits, expected = finite and value >= 1 and value == int(value), "a number of pairs, 1 or more"
    elif name == "min_score_gap":
        fits, expected = finite and value >= 0, "a number of 0 or more"
    elif name == "ranked":
        fits, expected = value in ("best_worst", "adjacent", "all", "random"), "best_worst, adjacent, all or random"
    else:
        fits, expected = isinstance(value, str) and bool(value.strip()), "a text"
    if not fits:
        do = f"correct {name} of {label}"
        if name == "data_files" and isinstance(value, Mapping):
            do = "list the training files alone; or name as path a folder with train.jsonl and test.jsonl"
        _refuse(f"{label} has {name} {show_json(value)}", expected, do)


def show_json(value: Any) -> str:
    """Returns a value of YAML as JSON; its dates, and keys of any type, as texts."""
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):
        return str(value)


def _check_together(sources: Sequence[DataSource]) -> None:
    """Raises SettingsError for a source that is there twice, and for fractions of only some sources."""
    places: dict[tuple[Any, ...], str] = {}
    for source in sources:
        key = source.identify_rows(source.split)
        if key in places:
            _refuse(
                f"the source {source.title} is listed twice",
                "each source once: pairs that are there twice would count twice",
                "remove one of them, or give each another split",
            )
        places[key] = source.title
    without = [source.title for source in sources if source.fraction is None]
    if 0 < len(without) < len(sources):
        _refuse(
            f"{without[0]} has no fraction, and other sources have one",
            "a fraction for each source or for none: it is a share of the whole mixture",
            "add it; or give weight (a share of the source's own pairs) or count instead",
        )


def _join(folder: str, name: str) -> str:
    """Returns the path or the address of a name below a folder or an address."""
    if "://" in name:
        return name
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


def _resolve(place: str) -> str:
    return str(Path(place).expanduser().resolve()) if _exists(place) else place.removeprefix(HUB_FILE)


def _exists(place: str) -> bool:
    try:
        return Path(place).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _refuse(problem: str, expected: str, do: str) -> Never:
    raise SettingsError(problem, expected=expected, do=do)
