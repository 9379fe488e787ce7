"""A file is hashed once in a process while it is unchanged: by itself, and when a run starts and resumes."""

import hashlib
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from compare_runs import interrupt
from conftest import write_pairs

from dpokit import file_hashes
from dpokit.data import columns
from dpokit.file_hashes import hash_file
from dpokit.run import train


@pytest.fixture
def counts(monkeypatch) -> Counter[str]:
    """How often each file is hashed, by its path; files count as settled at once."""
    counts: Counter[str] = Counter()
    hash_content = hashlib.file_digest

    def count(file, algorithm):
        counts[str(file.name)] += 1
        return hash_content(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", count)
    monkeypatch.setattr(file_hashes, "SETTLED_NANOSECONDS", 0)
    return counts


@pytest.fixture
def file(tmp_path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    return file


def test_an_unchanged_file_is_hashed_once(file, counts):
    assert hash_file(file) == hash_file(file) == hashlib.sha256(b"weights").hexdigest()
    assert counts[str(file)] == 1


def test_a_file_that_has_just_changed_is_hashed_again(file, counts, monkeypatch):
    monkeypatch.setattr(file_hashes, "SETTLED_NANOSECONDS", 10**18)
    hash_file(file)
    hash_file(file)
    assert counts[str(file)] == 2


@pytest.mark.parametrize("change", ["content", "content, with the former times", "replaced by another file"])
def test_a_changed_file_of_the_same_size_has_its_own_hash(change, file, tmp_path):
    os.utime(file, (1e9, 1e9))
    before = hash_file(file)
    if change == "replaced by another file":
        other = tmp_path / "other"
        other.write_bytes(b"WEIGHTS")
        other.replace(file)
    else:
        file.write_bytes(b"WEIGHTS")
    if change != "content":
        os.utime(file, (1e9, 1e9))
    assert hash_file(file) == hashlib.sha256(b"WEIGHTS").hexdigest() != before


@pytest.fixture
def settings(tiny_gpt2, tmp_path) -> dict:
    paths = {
        "model_name_or_path": shutil.copytree(tiny_gpt2, tmp_path / "model"),
        "dataset_name": write_pairs(tmp_path / "pairs.jsonl", 20),
        "output_dir": tmp_path / "run",
    }
    return {
        **{name: str(path) for name, path in paths.items()},
        "precompute_ref_log_probs": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_fraction": 0.2,
        "load_best_model_at_end": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 64,
    }


def test_a_start_hashes_each_file_once(settings, counts, tmp_path, monkeypatch):
    """Weights, data and checkpoints, and the token ids of each split; the resumed run hashes what is new to it."""
    monkeypatch.setenv("DPOKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "reference").mkdir(parents=True)
    read, rows = columns._batches, Counter()

    def count_rows(split, *names):
        rows[len(split)] += int(names[: len(columns.IDS)] == columns.IDS)
        return read(split, *names)

    monkeypatch.setattr(columns, "_batches", count_rows)
    whole = train("dpo_test", settings, [])
    assert counts[f"{settings['model_name_or_path']}/model.safetensors"] == 1
    assert counts[settings["dataset_name"]] == 1
    assert {path: count for path, count in counts.items() if count > 1} == {}
    assert rows == Counter({16: 2, 4: 1})  # training pairs once more, for their lengths

    run = interrupt(whole, tmp_path / "resumed", after=2)
    counts.clear()
    train("dpo_test", {**settings, "output_dir": str(run.path)}, [])
    assert counts[f"{run.path}/checkpoint-2/model.safetensors"] == 1
    assert {path: count for path, count in counts.items() if count > 1} == {}
