"""A checkpoint is usable if it matches its manifest, and in no other state that a crash or a disk may leave."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dpokit.checkpoint.store import (
    check_checkpoint,
    describe_files,
    discard,
    find_checkpoints,
    find_part,
    list_files,
    restore_replaced,
    retire,
    seal,
    sweep_parts,
    write_manifest,
)
from dpokit.errors import RunFolderError
from dpokit.merge.find_weights import find_weights
from dpokit.rundir import MetricsFile, RunDir, read_metrics
from dpokit.verbs.app import app

FACTS = {"world_size": 1, "placement": "one device", "settings": {}}


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CONTENT = {
    "model.safetensors": b"weights" * 100,
    "optimizer.pt": pickled({"moments": [0.5] * 20}),
    "global_step4/rank_0.pt": pickled({"shard": 1.0}),
    "scheduler.pt": pickled({"last_epoch": 4}),
    "rng_state.pth": pickled({"python": (3, (1, 2), None)}),
    "progress_0.json": json.dumps(
        {
            "loss": 0.0,
            "tokens": 9.0,
            "logged_loss": 0.5,
            "logged_step": 4,
            "first_step": 0,
            "sums": {},
            "last_update": {},
        }
        | {"log_due": False, "evaluation_due": False, "working_seconds": None}
    ).encode(),
}


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.make()
    run.take_possession(0)
    return run


def write(run: RunDir, step: int, **facts: object) -> Path:
    part = find_part(run, step)
    for name, content in CONTENT.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_bytes(content)
    (part / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9, "log_history": []}))
    return seal(run, step, describe_files(part, list_files(part)), FACTS | facts)


def test_a_sealed_checkpoint_is_whole(run):
    path = write(run, 4)
    found = check_checkpoint(path, deep=True)
    assert (found.step, found.problem) == (4, None)
    assert sorted(found.manifest["files"]) == sorted([*CONTENT, "trainer_state.json"])
    assert not find_part(run, 4).exists()


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "truncated": (lambda file: os.truncate(file, 3), "has 3 bytes"),
    "empty": (lambda file: os.truncate(file, 0), "has 0 bytes"),
    "zeroed": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "sha256 differs"),
    "deleted": (lambda file: file.unlink(), "is missing"),
    "one bit flipped": (flip_one_bit, "sha256 differs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CONTENT)
def test_a_damaged_file_is_named_and_others_stay_usable(run, name, damage):
    write(run, 2)
    path = write(run, 4)
    spoil, message = DAMAGES[damage]
    spoil(path / name)
    newest, older = find_checkpoints(run, deep=True)
    assert name in newest.problem
    assert message in newest.problem
    assert older.problem is None


def test_any_flipped_bit_of_a_manifest_is_detected(run):
    manifest = write(run, 4) / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(len(whole)):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "manifest" in check_checkpoint(manifest.parent, deep=False).problem, whole[at - 20 : at + 20]


def test_a_checkpoint_renamed_to_another_step_is_detected(run):
    path = write(run, 4)
    assert (
        check_checkpoint(path.rename(run.path / "checkpoint-6"), deep=False).problem == "its manifest is that of step 4"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1, "files": 3}', '{"files": {}}', "[" * 10**5])
def test_an_unreadable_manifest_is_a_problem_and_no_crash(run, content):
    path = write(run, 4)
    (path / "manifest.json").write_text(content)
    assert "manifest cannot be read" in check_checkpoint(path, deep=True).problem


def test_a_folder_without_a_manifest_is_not_whole(run):
    path = write(run, 4)
    (path / "manifest.json").unlink()
    assert "no manifest" in check_checkpoint(path, deep=True).problem


def test_retention_counts_only_whole_ones_and_keeps_the_best(run):
    paths = {step: write(run, step) for step in (1, 2, 3, 4, 5)}
    (paths[4] / "optimizer.pt").unlink()
    retire(run, limit=2, best=paths[1])
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-3", "checkpoint-5"]


def test_the_best_is_kept_by_any_path_to_it(run):
    for step in (1, 2, 3):
        write(run, step)
    retire(run, limit=1, best=run.path / ".." / run.path.name / "checkpoint-1")
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-3"]


def test_retention_counts_checkpoints_of_weights_alone(run):
    for step in (1, 2, 3):
        write(run, step, weights_alone="it holds weights alone (--save_only_model)")
    retire(run, limit=2, best=None)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("limit", [None, 0, -1, -100])
def test_without_a_limit_all_whole_checkpoints_are_kept(limit, run):
    for step in (1, 2, 3):
        write(run, step)
        retire(run, limit=limit, best=None)
    assert len(run.checkpoints()) == 3


@pytest.mark.parametrize("limit", [None, *range(-2, 4)])
@pytest.mark.parametrize("best", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("damaged", [None, 2, 3])
def test_the_newest_whole_one_and_the_best_are_never_deleted(damaged, best, limit, run):
    paths = {step: write(run, step) for step in (1, 2, 3)}
    if damaged is not None:
        (paths[damaged] / "optimizer.pt").unlink()
    retire(run, limit=limit, best=None if best is None else run.path / f"checkpoint-{best}")
    left = {int(path.name.removeprefix("checkpoint-")) for path in run.checkpoints()}
    assert max({1, 2, 3} - {damaged}) in left
    assert best not in paths or best in left


def test_a_checkpoint_with_a_disk_error_is_never_deleted(run):
    write(run, 1)
    write(run, 2)
    (run.path / "checkpoint-2" / "manifest.json").unlink()
    (run.path / "checkpoint-2" / "manifest.json").mkdir()  # reading it is an error of the system
    retire(run, limit=1, best=None)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("killed", ["before", "after"])
def test_a_kill_during_a_replacement_loses_no_checkpoint(killed, run):
    path = write(run, 4)
    path.rename(run.path / ".checkpoint-4.replaced")
    if killed == "after":
        write(run, 4)
    restore_replaced(run)
    assert [checkpoint.problem for checkpoint in find_checkpoints(run, deep=True)] == [None]
    assert not list(run.path.glob(".checkpoint-*"))


def test_a_manifest_that_names_an_outside_file_is_a_problem(run):
    path = write(run, 4)
    for name in ("../run.json", "/etc/passwd", "a/../../run.json"):
        files = {name: {"size": 1, "sha256": "0"}}
        write_manifest(path, 4, files, FACTS)
        assert f"its manifest names {name}" in check_checkpoint(path, deep=True).problem


def test_a_checkpoint_of_a_newer_version_is_never_deleted(run):
    path = write(run, 1, format=99)
    write(run, 2)
    retire(run, limit=1, best=None)
    assert "newer version" in check_checkpoint(path, deep=False).problem


def test_an_interrupted_deletion_leaves_nothing_usable(run):
    path = write(run, 4)
    (path / "manifest.json").unlink()  # it is deleted first
    assert check_checkpoint(path, deep=False).problem is not None
    discard(path)
    assert not path.exists()


def test_unfinished_parts_are_no_checkpoints_and_are_deleted(run):
    part = find_part(run, 6)
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    assert find_checkpoints(run, deep=True) == []
    sweep_parts(run)
    assert not part.exists()


def test_a_bad_checkpoint_of_the_same_step_is_replaced(run):
    (write(run, 4) / "optimizer.pt").unlink()
    assert check_checkpoint(write(run, 4), deep=True).problem is None


def test_an_earlier_start_of_the_run_can_write_nothing(run):
    file = MetricsFile(run, after_step=0)
    file.log(1, 1.0, {"loss": 0.7})
    later = RunDir(run.path)
    later.take_possession(1)
    for write_something in (lambda: write(run, 4), lambda: file.log(2, 2.0, {}), lambda: run.write_run(state="failed")):
        with pytest.raises(RunFolderError, match="taken over by a later start"):
            write_something()
    assert later.checkpoints() == []
    assert [record["step"] for record in read_metrics(later.metrics_jsonl)] == [1]
    assert later.read_run()["state"] == "running"
    assert write(later, 4).is_dir()


def test_metrics_are_read_up_to_a_damaged_line(run):
    file = MetricsFile(run, after_step=0)
    for step in (1, 2, 3):
        file.log(step, float(step), {"loss": 0.7})
    lines = run.metrics_jsonl.read_bytes().splitlines(keepends=True)
    run.metrics_jsonl.write_bytes(lines[0] + bytes([lines[1][0] | 0x80]) + lines[1][1:] + lines[2])
    assert [record["step"] for record in read_metrics(run.metrics_jsonl)] == [1]


def test_every_start_is_recorded_with_its_first_and_last_step(run):
    MetricsFile(run, after_step=0).log(7, 1.0, {"loss": 0.7})
    RunDir(run.path).take_possession(4)
    first, second = run.read_run()["generations"]
    assert (first["resumed_step"], first["ended_step"], second["resumed_step"]) == (0, 7, 4)
    assert first["token"] != second["token"]


def test_a_truncated_checkpoint_is_detected_without_reading_it(run, monkeypatch):
    path = write(run, 4)
    os.truncate(path / "optimizer.pt", 3)
    monkeypatch.setattr("dpokit.checkpoint.store._digest", pytest.fail)
    assert "has 3 bytes" in check_checkpoint(path, deep=True).problem


def test_verify_prints_which_checkpoints_are_whole(run):
    write(run, 2)
    flip_one_bit(write(run, 4) / "model.safetensors")
    shown = CliRunner().invoke(app, ["verify", str(run.path)])
    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == [
        "checkpoint-4: model.safetensors has changed since it was written (its sha256 differs)",
        "checkpoint-2: whole",
        "a resume begins at step 2",
    ]
    entries = json.loads(CliRunner().invoke(app, ["verify", str(run.path), "--json"]).stdout)
    assert [entry["usable"] for entry in entries] == [False, True]


def test_verify_calls_weights_alone_whole_but_not_usable(run):
    write(run, 2, weights_alone="it holds weights alone (--save_only_model)")
    shown = CliRunner().invoke(app, ["verify", str(run.path)])
    assert shown.exit_code == 1
    assert shown.stdout.splitlines()[0] == "checkpoint-2: whole, but it holds weights alone (--save_only_model)"
    (entry,) = json.loads(CliRunner().invoke(app, ["verify", str(run.path), "--json"]).stdout)
    assert (entry["usable"], entry["why"]) == (False, "it holds weights alone (--save_only_model)")
    assert find_weights(run, step=2) == run.path / "checkpoint-2"


def test_verify_exits_1_without_a_usable_one_and_2_without_a_run(run):
    assert CliRunner().invoke(app, ["verify", str(run.path)]).exit_code == 1
    assert CliRunner().invoke(app, ["verify", str(run.path / "none")]).exit_code == 2


@pytest.mark.cold
def test_verify_needs_no_torch():
    code = "import sys, dpokit.checkpoint.store; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# -- edited by hand, and sealed again ----------------------------------------------------------------------------------


def reseal(path: Path, **facts: object) -> None:
    (path / "manifest.json").unlink()
    write_manifest(path, 4, describe_files(path, list_files(path)), FACTS | facts)


LOST = {
    "trainer_state.json": "it has no trainer state",
    "scheduler.pt": "it has no learning rate schedule",
    "optimizer.pt": "it has no optimizer",
    "rng_state.pth": "it has no random state of rank 0",
    "progress_0.json": "it has no progress of rank 0",
}


@pytest.mark.parametrize("name", LOST)
def test_state_missing_from_the_manifest_too_is_a_problem(name, run):
    path = write(run, 4)
    (path / name).unlink()
    reseal(path)
    assert LOST[name] in check_checkpoint(path, deep=True).problem
    reseal(path, weights_alone="it holds weights alone")
    assert check_checkpoint(path, deep=True).problem is None


@pytest.mark.parametrize("processes", [0, -1, 10**9, "2", None, 1.0, True])
def test_an_impossible_number_of_processes_is_a_problem(processes, run):
    path = write(run, 4)
    reseal(path, world_size=processes)
    assert check_checkpoint(path, deep=True).problem == f"its manifest says that {processes} processes wrote it"


def test_missing_state_of_any_rank_is_a_problem(run):
    path = write(run, 4)
    reseal(path, world_size=2)
    assert "it has no random state of rank 0 (rng_state_0.pth)" in check_checkpoint(path, deep=True).problem


PROGRESS = json.loads(CONTENT["progress_0.json"])
STATE = {"global_step": 4, "max_steps": 9, "log_history": []}
TYPES = [("progress_0.json", key, value) for key in PROGRESS for value in ("x", [1], {"x": 1})]
TYPES += [("trainer_state.json", key, value) for key in STATE for value in ("x", {"x": 1}, None)]
TYPES = [case for case in TYPES if not isinstance(case[2], dict) or case[1] not in ("sums", "last_update")]


@pytest.mark.parametrize(("name", "key", "value"), TYPES)
def test_a_value_of_a_wrong_type_is_a_problem(name, key, value, run):
    path = write(run, 4)
    values = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(values | {key: value}))
    reseal(path)
    assert f"{name} has no valid {key}" in check_checkpoint(path, deep=True).problem


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["progress_0.json", "trainer_state.json"])
def test_a_file_of_state_without_a_record_is_a_problem(name, content, run):
    path = write(run, 4)
    (path / name).write_text(content)
    reseal(path)
    assert check_checkpoint(path, deep=True).problem.startswith(f"{name} ")


def test_a_state_of_another_step_is_a_problem(run):
    path = write(run, 4)
    (path / "trainer_state.json").write_text(json.dumps(STATE | {"global_step": 3}))
    reseal(path)
    assert check_checkpoint(path, deep=True).problem == "trainer_state.json is of step 3"
