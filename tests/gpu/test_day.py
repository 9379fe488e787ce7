"""The GPU day on a machine without a GPU: a dry run of every stage, cut and failing stages, and machines that lack."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(1, str(ROOT / "tests" / "gpu"))
from day import STAGES, Records, summarise
from day_machine import Machine, find_lack, read_machine
from day_tables import render

DAY = [sys.executable, str(ROOT / "tests" / "gpu" / "day.py")]
NAMES = [stage.name for stage in STAGES]


def start(out: Path, *options: str, **environment: str) -> "subprocess.Popen[str]":
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*DAY, *options], env={**os.environ, "OUT": str(out), **environment}, **pipes)


def run(out: Path, *options: str, **environment: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code and output of a day, and its day.json."""
    process = start(out, *options, **environment)
    text, _ = process.communicate(timeout=800)
    return process.returncode, text, json.loads((out / "day.json").read_text())


@pytest.mark.slow
@pytest.mark.long
def test_a_dry_run_goes_through_every_stage(shared, tmp_path):
    code, text, day = run(tmp_path, "--dry-run")
    logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log")) if code else ""
    assert code == 0, text + logs
    assert list(day["stages"]) == NAMES
    assert {stage["state"] for stage in day["stages"].values()} == {"passed"}
    tables = (tmp_path / "tables.md").read_text()
    for name in NAMES:
        assert f"\n## {name}\n" in tables, name
    steps = {case for name, stage in day["stages"].items() if name.startswith("steps-") for case in stage["cases"]}
    assert len(steps) == 4, "both sides, with a live and with a kept reference"
    for values in (*day["stages"]["steps-gpt2-512"]["cases"].values(),):
        assert values["logps/chosen"] == pytest.approx(-549.2, abs=100)
