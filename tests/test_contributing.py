"""A flag and a metric are added through the places that docs/CONTRIBUTING.md names, in a copy of the project.

Each is added half first: the tests name what is missing. Then whole: the tests pass, and a run has it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.cold]

FIELD = "    throw_away: int = dataclasses.field(default=7, metadata={'help': 'Does nothing.'})"
FACT = '    "throw_away": EXACT,'
DOCUMENTED = "| `--throw_away 7` | does nothing |"
COMPUTED = '                means["throw_away"] = 2.0'
METRIC = '    Metric("throw_away", "Two.", better="up", figure="throughput", line="throw-away"),'


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project."""
    copy = tmp_path / "project"
    for name in ("src", "tests", "docs", "recipes", "accelerate_configs", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml", "LICENSE", "constraints.txt", "constraints-oldest.txt"):
        shutil.copy(ROOT / name, copy)
    return copy


def add_line(path: Path, line: str, *, after: str) -> None:
    """Adds a line below the only line that begins with `after`."""
    lines = path.read_text().splitlines()
    (position,) = [number for number, text in enumerate(lines) if text.startswith(after)]
    path.write_text("\n".join([*lines[: position + 1], line, *lines[position + 1 :], ""]))


def run(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(project / "src")}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


def run_tests(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    folder = f"--basetemp={project.parent / 'pytest'}"
    return run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder, *words)


def train(project: Path, model: Path, *flags: str) -> Path:
    """Two steps in the copy; returns the run folder."""
    rows = [{"prompt": f"Question {n}?", "chosen": f" Yes, {n}.", "rejected": " No."} for n in range(8)]
    (project / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["recipes/dpo_gpt2.py", "--model_name_or_path", str(model), "--dataset_name", "pairs.jsonl"]
    words += ["--output_dir", "runs/mine", "--max_steps", "2", "--logging_steps", "1", "--eval_strategy", "no"]
    words += ["--max_length", "64", "--report_to", "none", *flags]
    done = run(project, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return project / "runs" / "mine"


def test_a_flag_is_added_in_three_places(project, tiny_gpt2):
    tests = ("tests/settings/test_flag_facts.py", "tests/test_documentation.py")
    settings = project / "src" / "dpokit" / "settings"
    add_line(settings / "flags.py", FIELD, after="    run_tags: list")
    shown = run_tests(project, *tests, "-k", "flag or row").stdout
    assert "throw_away: add its row to settings/flag_facts.py" in shown
    assert "test_every_flag_of_dpokit_is_in_the_settings" in shown

    add_line(settings / "flag_facts.py", FACT, after='    "tf32":')
    add_line(project / "docs" / "settings.md", DOCUMENTED, after="| `--hub_license mit`")
    done = run_tests(project, *tests, "-k", "flag or row")
    assert done.returncode == 0, done.stdout[-3000:]
    record = json.loads((train(project, tiny_gpt2, "--throw_away", "5") / "run.json").read_text())
    assert record["settings"]["throw_away"] == {"value": 5, "origin": "command line"}


def test_a_metric_is_added_in_one_table(project, tiny_gpt2):
    package = project / "src" / "dpokit"
    add_line(package / "train" / "steps.py", COMPUTED, after='                means["wasted_positions"]')
    test = ("tests/test_metrics.py", "-k", "every_number_of_a_run_has_a_row")
    shown = run_tests(project, *test).stdout
    assert "throw_away: add its row to LOGGED in metrics.py" in shown

    add_line(package / "metrics.py", METRIC, after='    Metric("tokens_per_second"')
    done = run_tests(project, *test)
    assert done.returncode == 0, done.stdout[-3000:]
    folder = train(project, tiny_gpt2)
    done = run(project, "-m", "dpokit.cli", "report", str(folder))
    assert done.returncode == 0, done.stderr
    assert "throw-away" in (folder / "report" / "report.html").read_text()
