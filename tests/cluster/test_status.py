"""The status of a run: folders written by hand, each with the status that must be read from it."""

import json
from pathlib import Path

import pytest

from dpokit.checkpoint.store import write_manifest
from dpokit.cluster.status import Attempt, describe_status, find_good_step, read_status
from dpokit.errors import RunFolderError
from dpokit.rundir import RunDir


def start(step: int, *, ended: str | None = None, ended_step: int | None = None, job: str | None = None) -> dict:
    """One entry of `generations`: the step it began at, and how it ended if another start followed."""
    entry = {"token": "t", "host": "n1", "began": "2026-01-01T00:00:00+00:00", "resumed_step": step, "job": job}
    return entry if ended is None else entry | {"ended": ended, "ended_step": ended_step}


def make_run(folder: Path, *starts: dict, state: str, checkpoints: tuple[int, ...] = (), **more: object) -> RunDir:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"state": state, "generations": list(starts), **more}))
    for step in checkpoints:
        make_checkpoint(folder / f"checkpoint-{step}")
    return RunDir(folder)


def make_checkpoint(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text("1234")
    step = int(folder.name.rpartition("-")[2])
    write_manifest(folder, step, {"weights": {"size": 4, "sha256": "-"}}, {})


@pytest.mark.parametrize(
    ("state", "error", "expected"),
    [
        ("finished", None, "done"),
        ("preempted", None, "requeue"),
        ("running", None, "requeue"),
        ("failed", "MachineError", "requeue"),
        ("failed", "OutOfMemoryError", "requeue"),
        ("failed", "RuntimeError", "requeue"),
        ("failed", "SettingsError", "stop"),
        ("failed", "DataError", "stop"),
        ("failed", "ModelError", "stop"),
        ("failed", "RunFolderError", "stop"),
        ("failed", "GateError", "stop"),
    ],
)
def test_the_decision_follows_from_how_the_run_ended(state, error, expected, tmp_path):
    run = make_run(tmp_path, start(0), state=state, error=error, why="the reason", checkpoints=(2,))
    status = read_status(run)
    assert status.next == expected
    assert error is None or "the reason" in status.reason


@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
def test_two_starts_without_a_newer_checkpoint_stop_the_run(state, tmp_path):
    starts = (start(5, ended="preempted", ended_step=6), start(5))
    run = make_run(tmp_path, start(0, ended="failed", ended_step=5), *starts, state=state, checkpoints=(5,))
    status = read_status(run)
    assert status.next == "stop"
    assert "both began at step 5" in status.reason


def test_two_starts_without_any_checkpoint_stop_the_run(tmp_path):
    run = make_run(tmp_path, start(0, ended="failed", ended_step=3), start(0), state="failed", error="MachineError")
    assert read_status(run).next == "stop"


def test_a_newer_checkpoint_allows_another_start(tmp_path):
    starts = (start(5, ended="failed", ended_step=6), start(5))
    assert read_status(make_run(tmp_path, *starts, state="failed", checkpoints=(5, 6))).next == "requeue"


def test_crashes_count_and_preemptions_do_not(tmp_path):
    ends = ["failed", "preempted", "running", "preempted"]
    starts = [start(step, ended=end, ended_step=step + 1) for step, end in enumerate(ends)]
    run = make_run(tmp_path, *starts, start(4), state="failed", error="MachineError", checkpoints=(9,))
    assert read_status(run).after_crash == 2
    assert read_status(run, max_restarts=3).next == "requeue"
    stopped = read_status(run, max_restarts=2)
    assert stopped.next == "stop"
    assert "3 crashes, and 2 restarts are allowed" in stopped.reason


def test_a_start_with_lost_steps_and_no_end_is_a_crash(tmp_path):
    starts = [{"resumed_step": 0, "ended_step": 5}, {"resumed_step": 4, "ended_step": 7}, {"resumed_step": 7}]
    assert read_status(make_run(tmp_path, *starts, state="preempted", checkpoints=(9,))).after_crash == 1


def test_a_preempted_run_is_requeued_after_many_crashes(tmp_path):
    starts = [start(step, ended="failed", ended_step=step + 1) for step in range(5)]
    assert read_status(make_run(tmp_path, *starts, start(5), state="preempted", checkpoints=(9,))).next == "requeue"


def test_a_new_job_has_a_new_count_of_crashes(tmp_path):
    old = [start(7, ended="failed", ended_step=8, job="1") for _ in range(4)]
    run = make_run(tmp_path, *old, start(7, job="2"), state="failed", error="MachineError", checkpoints=(7,))
    status = read_status(run)
    assert (status.after_crash, status.restarts, status.next) == (0, 4, "requeue")


def test_a_start_that_never_began_stops_the_job(tmp_path):
    for state in ("preempted", "running", "finished"):
        run = make_run(tmp_path, start(0), state=state)
        assert read_status(run, attempt=Attempt(since=1, host="n1")).next == "stop"
        assert read_status(run, attempt=Attempt(since=0, host="n1")).next != "stop"


def test_an_unbegun_start_is_requeued_if_the_job_once_began(tmp_path):
    """At most max_restarts times: a node may be bad, but the command is right."""
    run = make_run(tmp_path, start(0, ended="failed", job="7"), start(0, job="7"), state="failed", checkpoints=(2,))
    after = [read_status(run, max_restarts=2, attempt=Attempt(2, "n1", "7", number)).next for number in (3, 4, 5)]
    assert after == ["requeue", "requeue", "stop"]
    assert read_status(run, attempt=Attempt(2, "n1", job="8", number=2)).next == "stop"


def test_a_start_stops_after_another_host_took_the_run_over(tmp_path):
    run = make_run(tmp_path, start(0), start(0), start(1), state="preempted", checkpoints=(2,))
    # A launcher's own restarts are on one host.
    assert read_status(run, attempt=Attempt(since=0, host="n1")).next == "requeue"
    status = read_status(run, attempt=Attempt(since=0, host="n2"))
    assert (status.next, status.reason) == ("stop", "a later start, on n1, has taken the run over")


def test_steps_trained_twice_are_counted_and_timed(tmp_path):
    starts = (start(0, ended="running", ended_step=9), start(4, ended="preempted", ended_step=8))
    run = make_run(tmp_path, *starts, start(8), state="running", checkpoints=(4, 8))
    run.metrics_jsonl.write_text("".join(f'{{"step": {n}, "seconds": {10 + 2 * n}}}\n' for n in range(1, 13)))
    status = read_status(run)
    assert (status.last_step, status.good_step, status.restarts) == (12, 8, 2)
    assert (status.lost_steps, status.lost_seconds) == (5, 10.0)
    text = describe_status(status)
    for line in ("last sign of life", "checkpoint-8", "2 (1 after a crash)", "5 steps trained twice, about 10 s"):
        assert line in text


@pytest.mark.parametrize(
    ("steps", "records", "more", "expected"),
    [
        (100, [(10, 30.0), (20, 50.0)], {}, (20.0, 160.0)),
        (100, [(10, 30.0)], {}, (10.0, None)),
        (100, [], {}, (0.0, None)),
        (None, [(1, 1.0), (2, 2.0)], {}, (None, None)),
        (None, [(1, 1.0), (2, 2.0)], {"settings": {"max_steps": {"value": 4}}}, (50.0, 2.0)),
        (None, [(1, 1.0), (2, 2.0)], {"settings": {"max_steps": {"value": -1}}}, (None, None)),
        (2, [(1, 1.0), (2, 2.0)], {"state": "finished"}, (100.0, None)),
        (4, [(1, 1e300), (2, -1e300)], {}, (50.0, None)),
        (4, [(1, float("nan")), (2, 2.0)], {}, (50.0, None)),
        # Only the latest 50 records count: the first step waited for a compilation.
        (200, [(1, 900.0), *((n, 900.0 + n) for n in range(2, 101))], {}, (50.0, 100.0)),
    ],
)
def test_percent_and_time_left_follow_from_the_latest_steps(steps, records, more, expected, tmp_path):
    run = make_run(tmp_path, start(0), **{"state": "running", "steps": steps or 0} | more)
    run.metrics_jsonl.write_text("".join(json.dumps({"step": n, "seconds": s}) + "\n" for n, s in records))
    status = read_status(run)
    assert (status.percent, status.seconds_left) == expected
    assert describe_status(status)


def test_a_checkpoint_counts_only_if_it_matches_its_manifest(tmp_path):
    run = make_run(tmp_path, start(0), state="running", checkpoints=(1, 2, 3, 4))
    assert find_good_step(run) == 4
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    (tmp_path / "checkpoint-3" / "weights").write_text("12")
    assert find_good_step(run) == 2
    (tmp_path / "checkpoint-2" / "manifest.json").write_text('{"files": [')
    assert find_good_step(run) == 1
    (tmp_path / "checkpoint-1" / "weights").unlink()
    assert find_good_step(run) is None


def test_a_missing_run_has_a_status_and_a_damaged_one_raises(tmp_path):
    status = read_status(RunDir(tmp_path / "none"))
    assert (status.state, status.next, status.last_step) == ("none", "stop", None)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match="is damaged"):
        read_status(RunDir(tmp_path))


def test_the_verb_prints_lines_or_json_without_torch(tmp_path):
    from test_cli import dpokit

    make_run(tmp_path / "run", start(0), state="preempted", checkpoints=(3,))
    shown = dpokit("status", str(tmp_path / "run"))
    assert "checkpoint-3" in shown.stdout
    assert "requeue: the run was preempted" in shown.stdout
    record = json.loads(dpokit("status", str(tmp_path / "run"), "--json").stdout)
    assert (record["next"], record["good_step"], record["generations"]) == ("requeue", 3, 1)
    (tmp_path / "queued").mkdir()
    folders = [str(tmp_path / name) for name in ("run", "queued")]
    assert [record["state"] for record in json.loads(dpokit("status", *folders, "--json").stdout)] == [
        "preempted",
        "none",
    ]
    assert "not begun" in dpokit("status", *folders).stdout
    alone = dpokit("status", folders[1])
    assert (alone.returncode, "not begun" in alone.stdout) == (0, True)
    nowhere = dpokit("status", str(tmp_path / "nowhere"))
    assert nowhere.returncode == 2
    assert "there is no such run" in nowhere.stderr
    assert json.loads(dpokit("status", str(tmp_path / "nowhere"), "--json").stdout)["next"] == "stop"
