"""`dpokit status --watch`: run folders that change while they are watched."""

import os
import signal
import socket
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from test_status import make_run, start
from typer.testing import CliRunner

from dpokit.cluster.status import Status, read_status
from dpokit.cluster.watch import build_run_table, describe_age, watch_runs
from dpokit.rundir import RunDir
from dpokit.verbs.app import app

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


def watch(states: list[str], folder: Path, job: str | None) -> tuple[bool, int]:
    """Watches a run that has each of the states in turn; returns the result and how often it was looked at."""
    looks = []
    begun = start(0, job=job) | {"host": socket.gethostname()}

    def read() -> list[Status]:
        state, _, error = states[min(len(looks), len(states) - 1)].partition(":")
        looks.append(state)
        begun["pid"] = 2**22 + 1 if state == "killed" else os.getpid()  # Linux has no process above 2**22
        state = "running" if state == "killed" else state
        if state == "none":
            return [read_status(RunDir(folder / "run"))]
        return [read_status(make_run(folder / "run", begun, state=state, error=error or None))]

    return watch_runs(read, pause=lambda _: None), len(looks)


@pytest.mark.parametrize(
    ("job", "states", "is_finished", "looks"),
    [
        (None, ["finished"], True, 1),
        ("7", ["none", "running", "running", "preempted", "running", "finished"], True, 6),
        ("7", ["failed:MachineError", "running", "failed:DataError"], False, 3),
        ("7", ["killed", "running", "finished"], True, 3),
        (None, ["running", "killed"], False, 2),
        (None, ["running", "preempted"], False, 2),
        (None, ["failed:MachineError"], False, 1),
    ],
)
def test_runs_are_watched_until_they_finish_or_stop(job, states, is_finished, looks, tmp_path, capsys):
    assert watch(states, tmp_path, job) == (is_finished, looks)
    lines = capsys.readouterr().out.splitlines()
    changes = [state for place, state in enumerate(states) if place == 0 or state != states[place - 1]]
    assert len(lines) == len(changes)


def test_ctrl_c_ends_watching_without_a_word(tmp_path, monkeypatch):
    make_run(tmp_path / "run", start(0), state="running")
    monkeypatch.setattr("dpokit.cluster.watch.watch_runs", lambda _: os.kill(os.getpid(), signal.SIGINT))
    ended = CliRunner().invoke(app, ["status", str(tmp_path / "run"), "--watch"])
    assert (ended.exit_code, ended.output) == (130, "")


def test_the_table_fits_80_columns_and_escapes_names(tmp_path):
    run = make_run(tmp_path / "run", start(0), state="running", steps=20_000)
    run.metrics_jsonl.write_text('{"step": 12344, "seconds": 1}\n{"step": 12345, "seconds": 3}\n')
    status = read_status(run)
    long_name = replace(status, run="runs/a_long_name_with_lr_5e-6\x1b[2J_and_beta_0.1_and_more")
    console = Console(width=80, file=StringIO())
    console.print(build_run_table([long_name, read_status(RunDir("none"))], now=datetime.now().astimezone()))
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "12,345  61.7 %  4:15:10" in text
    assert "\x1b" not in text
    assert "\\x1b" in text
    assert "not begun" in text


@pytest.mark.parametrize(
    ("moment", "age"),
    [
        ("2026-11-29T11:59:48+00:00", "12 s ago"),
        ("2026-11-29T12:00:30+00:00", "0 s ago"),
        ("2026-11-29T13:57:00+02:00", "3 min ago"),
        ("2026-11-28T12:00:00+00:00", "24 h ago"),
        ("2026-11-20T12:00:00+00:00", "9 d ago"),
    ],
)
def test_an_age_is_in_its_largest_unit(moment, age):
    assert describe_age(moment, NOW) == age
