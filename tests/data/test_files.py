"""The files of a folder and their splits are those that `datasets` finds."""

from pathlib import Path

import pytest
import yaml
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

from dpokit.data.files import find_files
from dpokit.errors import DataError

LAYOUTS = {
    "one file": ["pairs.jsonl"],
    "splits by name": ["train.jsonl", "test.jsonl"],
    "splits by name and number": ["train_0.jsonl", "train_1.jsonl", "test-0.jsonl"],
    "all three, by other names": ["training.jsonl", "evaluation.jsonl", "dev.jsonl"],
    "a split's name between hyphens or dots": ["my-train-set.jsonl", "my.val.jsonl", "other.jsonl"],
    "a split's name inside a word": ["trainer.jsonl", "contest.jsonl"],
    "folders": ["data/train/a.jsonl", "data/train/deep/b.jsonl", "data/test/a.jsonl"],
    "folders with numbers": ["train-1/a.jsonl", "valid_2/a.jsonl"],
    "shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
    "shards with hashes": ["data/train-00000-of-00001-a2f9b1c0.jsonl", "data/own.jsonl"],
    "shards of other splits": ["data/train_prefs-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
    "shards elsewhere": ["train-00000-of-00001.jsonl", "en/test-00000-of-00001.jsonl"],
    "files beside the data": ["train.jsonl", "dataset_infos.json", "config.json", "notes.txt", "LICENSE"],
    "hidden files": ["train.jsonl", ".train.jsonl", ".git/train.jsonl", "__pycache__/train.jsonl"],
    "packed": ["train.jsonl.gz", "test.jsonl.gz"],
    "two kinds": ["train.parquet", "test.parquet", "numbers.json"],
    "as many of both kinds": ["train.parquet", "test.csv"],
    "capitals": ["train.JSONL", "TEST.jsonl"],
}
CARDS = {
    "a list": 'data_files: "own/*.jsonl"',
    "several": "data_files: [own/a.jsonl, own/b.jsonl]",
    "by split": "data_files:\n  - split: train\n    path: own/a*\n  - split: held\n    path: [own/b.jsonl, '*.jsonl']",
    "any folder": "data_files: '**/a.jsonl'",
    "all in any folder": "data_files: 'own/**'",
}
FILES = ["own/a.jsonl", "own/b.jsonl", "own/deep/a.jsonl", "a.jsonl", "c.jsonl"]


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    return folder


def list_names(folder: Path, splits: dict) -> dict[str, list[str]]:
    return {
        str(split): sorted(Path(file).relative_to(folder).as_posix() for file in files)
        for split, files in splits.items()
        if files
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_found_as_datasets_finds_them(layout, tmp_path):
    folder = make(tmp_path, LAYOUTS[layout])
    builder, splits = find_files(folder, None)
    ends = {"json": (".jsonl", ".json", ".JSONL"), "parquet": (".parquet",), "csv": (".csv",)}[builder]
    expected = DataFilesDict.from_patterns(get_data_patterns(str(folder)), str(folder))
    expected = {split: [f for f in files if f.removesuffix(".gz").endswith(ends)] for split, files in expected.items()}
    assert list_names(folder, splits) == list_names(folder, expected)


@pytest.mark.parametrize("card", CARDS)
def test_a_readme_chooses_the_same_files_as_in_datasets(card, tmp_path):
    folder = make(tmp_path, FILES)
    entry = "\n".join("  " + line for line in CARDS[card].splitlines())
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: own\n{entry}\n---\n")
    patterns = sanitize_patterns(yaml.safe_load(CARDS[card])["data_files"])
    expected = DataFilesDict.from_patterns(patterns, str(folder))
    assert list_names(folder, find_files(folder, None)[1]) == list_names(folder, expected)


TWO = "---\nconfigs:\n- config_name: a\n  data_files: own/a.jsonl\n- config_name: b\n  data_files: c.jsonl\n{}---\n"


@pytest.mark.parametrize(
    ("config", "mark", "file"),
    [(None, "", "own/a.jsonl"), (None, "  default: true\n", "c.jsonl"), ("b", "", "c.jsonl")],
)
def test_a_configuration_is_chosen_by_name_or_default(config, mark, file, tmp_path):
    folder = make(tmp_path, FILES)
    (folder / "README.md").write_text(TWO.format(mark))
    assert list_names(folder, find_files(folder, config)[1]) == {"train": [file]}


def test_an_unknown_configuration_names_the_known_ones(tmp_path):
    (make(tmp_path, FILES) / "README.md").write_text(TWO.format(""))
    with pytest.raises(DataError, match="no configuration 'c'") as error:
        find_files(tmp_path, "c")
    assert error.value.expected == "one of a, b"


def test_a_snapshot_in_the_hub_cache_is_read(tmp_path):
    """The files of a snapshot are links to the blobs of the cache."""
    snapshot = tmp_path / "datasets--own--set" / "snapshots" / "0123"
    blob = make(tmp_path / "datasets--own--set", ["blobs/abc"]) / "blobs" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(blob)
    assert list_names(snapshot, find_files(snapshot, None)[1]) == {"train": ["train.jsonl"]}
