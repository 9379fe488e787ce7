"""`dpokit report` as a command: output, exit codes, and the size of a long run's report."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from run_folders import make_run, make_starts, make_steps


def dpokit_report(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "dpokit.cli", "report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def test_the_command_prints_the_path_or_with_json_the_record(tmp_path):
    make_run(tmp_path / "run", make_steps(5, every=1))
    done = dpokit_report("run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "run/report/report.html\n"), done.stderr
    done = dpokit_report("run", "--json", "--output", "out/page.html", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert set(record) == {"report", "pngs", "verdict"}
    assert (tmp_path / record["report"]).is_file()
    assert record["pngs"][0] == "out/page-loss.png"
    assert all((tmp_path / png).is_file() for png in record["pngs"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["empty"], "RunFolderError: empty holds no run.json"),
        (["nowhere"], "RunFolderError: there is no such run: nowhere"),
        (["run", "empty"], "RunFolderError: empty holds no run.json"),
        (["run", "--metric", "no_such"], "SettingsError: --metric no_such: no value of it in run"),
        (
            ["run", "--output", "run/run.json/x.html"],
            "RunFolderError: a file is where a folder is needed (run/run",
        ),
        (["run", "--output", "empty"], "RunFolderError: empty exists, and dpokit report did not write it"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, says, tmp_path):
    make_run(tmp_path / "run", make_steps(5, every=1))
    (tmp_path / "empty").mkdir()
    done = dpokit_report(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("do this:") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.cold
def test_a_report_imports_no_heavy_packages(tmp_path):
    make_run(tmp_path / "run", make_steps(5, every=1))
    code = (
        "import sys\nfrom pathlib import Path\nfrom dpokit.report.page import write_report\n"
        "write_report([Path('run')])\n"
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_a_run_of_10_000_logged_steps_takes_under_5_mb(tmp_path):
    make_run(tmp_path / "run", make_steps(10_000, every=50, gpu=True), generations=make_starts(1000, 5000))
    began = time.monotonic()
    done = dpokit_report("run", cwd=tmp_path)
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    size = (tmp_path / done.stdout.strip()).stat().st_size
    print(f"\n10,000 logged steps: {seconds:.1f} s, {size / 1e6:.2f} MB")
    assert size < 5e6
