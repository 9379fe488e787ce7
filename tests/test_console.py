"""Progress: bars in a terminal, a plain line now and then in a log, nothing if it is hidden."""

import os
import pty
import sys
import termios
from contextlib import suppress

import pytest
from conftest import write_pairs

import dpokit.console
from dpokit.console import PlainProgress, track_progress
from dpokit.run import train


@pytest.fixture(autouse=True)
def nothing_is_hidden(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets by hand."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(dpokit.console.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_log_gets_a_progress_line_every_30_seconds(clock, capfd):
    progress = track_progress(total=1000, initial=100, desc="training", unit="step")
    for step in range(60):
        clock.now += 1.5
        progress.set_postfix({"loss": f"{0.6931 - step / 1000:.4f}"})
        progress.update()
    progress.close()
    log = capfd.readouterr().err
    assert log.splitlines() == [
        "training: step 120 of 1,000, loss 0.6741, 1.5 s/step, 22:00 left",
        "training: step 140 of 1,000, loss 0.6541, 1.5 s/step, 21:30 left",
        "training: step 160 of 1,000, loss 0.6341, 1.5 s/step, 21:00 left",
        "training: step 160 of 1,000, loss 0.6341, 1.5 s/step, 21:00 left",
    ]


def test_a_short_loop_leaves_one_line(clock, capfd):
    for _ in track_progress(range(40), desc="scoring", unit="batch"):
        clock.now += 0.1
    assert capfd.readouterr().err == "scoring: batch 40 of 40, 10.00 batch/s\n"


def test_progress_without_leave_leaves_no_line(clock, capfd):
    with track_progress(total=4, desc="evaluating", unit="batch", leave=False) as progress:
        clock.now += 0.1
        progress.update(4)
    assert capfd.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    near, far = pty.openpty()
    termios.tcsetwinsize(far, (24, 80))
    with os.fdopen(far, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        for _ in track_progress(range(3), desc="scoring", unit="batch"):
            pass
    shown = ""
    with suppress(OSError):  # a closed terminal that was read to its end
        while read := os.read(near, 10_000):
            shown += read.decode()
    os.close(near)
    assert "\rscoring: 100%|" in shown


@pytest.mark.parametrize("hidden_by", ["flag", "rank"])
def test_hidden_progress_counts_and_shows_nothing(hidden_by, monkeypatch, capfd):
    monkeypatch.setenv(*{"flag": ("TQDM_DISABLE", "1"), "rank": ("RANK", "1")}[hidden_by])
    assert list(track_progress(range(3), desc="scoring", unit="batch")) == [0, 1, 2]
    assert capfd.readouterr().err == ""


def test_closing_twice_writes_one_line(capfd):
    progress = PlainProgress(None, desc="judging", unit="reply", total=None, initial=0, leave=True)
    progress.close()
    progress.close()
    assert capfd.readouterr().err.count("\n") == 1


@pytest.fixture
def forty_steps(tiny_gpt2, tmp_path):
    """Settings of a run of 40 steps that logs every step and evaluates twice."""
    return {
        "model_name_or_path": str(tiny_gpt2),
        "dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 24)),
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "max_length": 64,
        "max_steps": 40,
        "logging_steps": 1,
        "eval_steps": 20,
        "eval_strategy": "steps",
        "eval_fraction": 0.2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }


def test_40_logged_steps_fill_less_than_3_kb_of_a_log(forty_steps, capfd):
    train("dpo_test", forty_steps, [])
    log = capfd.readouterr().err
    assert "training: step 40 of 40, loss 0." in log
    assert "\r" not in log
    assert "\x1b" not in log
    assert len(log.encode()) < 3000


def test_disable_tqdm_makes_each_log_a_line(forty_steps, capfd):
    train("dpo_test", forty_steps, ["--disable_tqdm", "--logging_steps", "10"])
    log = capfd.readouterr().err.splitlines()
    lines = [line.partition(",")[0] for line in log if line.startswith("training: ")]
    assert lines == [f"training: step {step} of 40" for step in (1, 10, 20, 30, 40)]
    assert sum(line.split()[:1] in (["20"], ["40"]) for line in log) == 2, "each evaluation has a line"
