"""The run folder: written whole or not at all, read back with care."""

import json

import pytest

from dpokit.errors import RunFolderError
from dpokit.rundir import MetricsFile, RunDir, new_folder, read_metrics, write_json


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "model") as part:
        (part / "half").write_text("")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_step_has_one_record_and_evaluation_joins_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.log(1, 0.5, {"loss": 0.7})
    file.log(2, 1.0, {"loss": 0.6})
    file.log(2, 1.5, {"eval_loss": 0.65})
    file.log(3, 2.0, {"loss": 0.5})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[1] == {"step": 2, "seconds": 1.5, "loss": 0.6, "eval_loss": 0.65}


def test_a_resumed_run_drops_later_steps_and_the_clock_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    for step in (1, 2, 3):
        file.log(step, 10.0 * step, {"loss": 1.0})
    path.write_text(path.read_text() + '{"step": 4, "lo')  # torn by a crash
    resumed = MetricsFile(path, after_step=2)
    resumed.log(2, 1.0, {"eval_loss": 0.5})
    resumed.log(3, 5.0, {"loss": 2.0})
    records = read_metrics(path)
    assert [(record["step"], record["seconds"]) for record in records] == [(1, 10.0), (2, 21.0), (3, 25.0)]


def test_a_damaged_record_is_an_error_that_names_the_way_out(tmp_path):
    (tmp_path / "run.json").write_text('{"state": ')
    with pytest.raises(RunFolderError, match="damaged") as error:
        RunDir(tmp_path).read_run()
    assert "--overwrite_run" in error.value.do


def test_clearing_deletes_a_runs_files_and_nothing_else(tmp_path):
    run = RunDir(tmp_path)
    run.write_run(state="failed")
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    run.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-best", "notes.txt"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in RunDir(tmp_path).checkpoints()] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
