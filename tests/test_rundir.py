"""The run folder: its records and metrics survive interruptions, and damaged ones are reported."""

import json
import os
import socket
import subprocess
import sys

import pytest

from dpokit.errors import RunFolderError
from dpokit.run_starts import clear_folder, count_starts, has_only_failed_starts
from dpokit.rundir import MetricsFile, RunDir, read_metrics


def test_a_step_has_one_record_and_evaluation_joins_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(RunDir(tmp_path), after_step=0)
    file.log(1, 0.5, {"loss": 0.7})
    file.log(2, 1.0, {"loss": 0.6})
    file.log(2, 1.5, {"eval_loss": 0.65})
    file.log(3, 2.0, {"loss": 0.5})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[1] == {"step": 2, "seconds": 1.5, "loss": 0.6, "eval_loss": 0.65}


def test_a_resumed_run_drops_later_steps_and_the_clock_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(RunDir(tmp_path), after_step=0)
    for step in (1, 2, 3):
        file.log(step, 10.0 * step, {"loss": 1.0})
    path.write_text(path.read_text() + '{"step": 4, "lo')  # torn by a crash
    resumed = MetricsFile(RunDir(tmp_path), after_step=2)
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


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


# state, other fields of run.json, files beside it; whether the folder holds only failed starts
HOST = socket.gethostname()
STEP_0, STEP_5 = '{"step": 0, "eval_loss": 0.7}\n', '{"step": 5, "loss": 0.7}\n'
START = ("host", "pid", "resumed_step")
FAILED_STARTS = {
    "failed": ("failed", {}, {}, True),
    "ended by Ctrl-C": ("preempted", {}, {"data.json": "{}", "metrics.jsonl": ""}, True),
    "failed after an evaluation at step 0": ("failed", {}, {"metrics.jsonl": STEP_0}, True),
    "ended while it took over the folder": (None, {}, {}, True),
    "killed, its process is gone": ("running", {"host": HOST, "pid": "dead"}, {}, True),
    "alive": ("running", {"host": HOST, "pid": os.getpid()}, {}, False),
    "alive or killed on another machine": ("running", {"host": f"{HOST}2", "pid": "dead"}, {}, False),
    "running, of a version without pids": ("running", {"host": HOST}, {}, False),
    "running, with a pid that is none": ("running", {"host": HOST, "pid": 10**30}, {}, False),
    "failed, and its process lives": ("failed", {"host": HOST, "pid": os.getppid()}, {}, False),
    "failed in this process": ("failed", {"host": HOST, "pid": os.getpid()}, {}, True),
    "failed after a resume, its checkpoints moved away": ("failed", {"resumed_step": 500}, {}, False),
    "failed, the first line of its metrics damaged": ("failed", {}, {"metrics.jsonl": "{\n" + STEP_5}, False),
    "failed after a step that was not logged": ("failed", {"shared_prefix": "on"}, {}, False),
    "failed after a logged step": ("failed", {}, {"metrics.jsonl": STEP_0 + STEP_5}, False),
    "failed after a checkpoint": ("preempted", {}, {"checkpoint-5/manifest.json": "{"}, False),
    "failed while it was trained further": ("failed", {}, {"model/config.json": "{}"}, False),
    "finished": ("finished", {}, {}, False),
}


@pytest.mark.parametrize("name", FAILED_STARTS)
def test_a_folder_without_a_step_holds_only_failed_starts(name, tmp_path, dead_pid):
    state, fields, files, expected = FAILED_STARTS[name]
    start = {key: dead_pid if value == "dead" else value for key, value in fields.items() if key in START}
    rest = {key: value for key, value in fields.items() if key not in start}
    RunDir(tmp_path).write_run(state=state, generations=[{"token": "t0", **start}], **rest)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    assert has_only_failed_starts(RunDir(tmp_path)) == expected


def test_the_starts_of_a_cleared_run_still_count(tmp_path):
    """A job compares the number of starts before and after its own."""
    for _ in range(3):
        run = RunDir(tmp_path)
        run.take_possession(0, former_starts=clear_folder(run))
    assert len(run.read_run()["generations"]) == 1
    assert count_starts(run.read_run()) == 3


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in RunDir(tmp_path).checkpoints()] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_writing_the_record_keeps_the_fields_that_are_not_named(tmp_path):
    run = RunDir(tmp_path)
    assert run.read_run() is None
    run.write_run(state="running", world_size=2)
    run.write_run(state="finished")
    assert run.read_run() == {"state": "finished", "world_size": 2}


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "\x00\x00", '{"state": "finished"} x'])
def test_a_record_that_is_no_mapping_is_damaged(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunFolderError, match="damaged") as error:
        RunDir(tmp_path).read_run()
    assert str(tmp_path / "run.json") in error.value.seen


def test_a_record_of_another_encoding_is_damaged(tmp_path):
    (tmp_path / "run.json").write_bytes(b'{"state": "\xff"}')
    with pytest.raises(RunFolderError, match="damaged"):
        RunDir(tmp_path).read_run()


@pytest.mark.parametrize("torn", ["", "{", '{"step": 3, "seconds": 3.0', "\x00\x00\x00", '{"step": 3}{"st'])
def test_a_torn_last_line_is_left_out_and_written_over(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(RunDir(tmp_path), after_step=0)
    for step in (1, 2):
        file.log(step, float(step), {"loss": 1.0})
    path.write_text(path.read_text() + torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    MetricsFile(RunDir(tmp_path), after_step=2).log(3, 1.0, {"loss": 0.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_new_run_forgets_what_the_file_held(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(RunDir(tmp_path), after_step=0).log(1, 9.0, {"loss": 1.0})
    MetricsFile(RunDir(tmp_path), after_step=0).log(1, 2.0, {"loss": 0.9})
    assert read_metrics(path) == [{"step": 1, "seconds": 2.0, "loss": 0.9}]


def test_a_second_resume_continues_the_clock_of_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(RunDir(tmp_path), after_step=0).log(1, 10.0, {})
    MetricsFile(RunDir(tmp_path), after_step=1).log(2, 5.0, {})
    third = MetricsFile(RunDir(tmp_path), after_step=2)
    assert third.seconds_before == 15.0
    third.log(3, 1.0, {})
    assert [record["seconds"] for record in read_metrics(path)] == [10.0, 15.0, 16.0]


def test_an_evaluation_before_the_first_step_survives_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(RunDir(tmp_path), after_step=0)
    first.log(0, 1.0, {"eval_loss": 0.7})
    first.log(1, 2.0, {"loss": 0.6})
    MetricsFile(RunDir(tmp_path), after_step=0).log(1, 1.0, {"loss": 0.6})
    assert [record["step"] for record in read_metrics(path)] == [0, 1]


def test_a_folder_that_cannot_be_written_says_so_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RunDir(tmp_path / "file" / "run").make()
    RunDir(tmp_path / "a" / "run").make()
    assert list((tmp_path / "a" / "run").iterdir()) == []


def test_clearing_takes_a_link_away_and_not_what_it_points_to(tmp_path):
    scratch, run = tmp_path / "scratch", RunDir(tmp_path / "run")
    scratch.mkdir()
    (scratch / "weights").write_text("")
    run.make()
    run.write_run(state="finished")
    (run.path / "checkpoint-5").symlink_to(scratch)
    run.clear()
    assert list(run.path.iterdir()) == []
    assert (scratch / "weights").exists()


def test_an_interrupted_clearing_still_has_its_record(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.write_run(state="finished")
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def stop(path):
        raise KeyboardInterrupt(path)

    monkeypatch.setattr("dpokit.rundir.shutil.rmtree", stop)
    with pytest.raises(KeyboardInterrupt):
        run.clear()
    assert run.read_run() == {"state": "finished"}
