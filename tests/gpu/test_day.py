"""The GPU day on a machine without a GPU: a dry run of every stage, cut and failing stages, and machines that lack."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT

sys.path.insert(1, str(ROOT / "tests" / "gpu"))
from day import STAGES, Records, summarise
from day_machine import Machine, find_lack
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
@pytest.mark.usefixtures("shared")
def test_a_dry_run_goes_through_every_stage(tmp_path):
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
    for name in ("steps-gpt2-512", "steps-gpt2-2048"):
        left, right = day["stages"][name]["cases"].values()
        assert left["logps/chosen"] == pytest.approx(right["logps/chosen"], rel=1e-5)


def wait_for(holds: Any) -> None:
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def read_results(out: Path, stage: str) -> list[str]:
    """The cases of a stage that have a result, once for each time."""
    of_stage = [record for record in Records(out / "records.jsonl").read() if record.get("stage") == stage]
    return [record["case"] for record in of_stage if "case" in record and "began" not in record]


def test_a_killed_day_continues_where_it_was_cut(tmp_path):
    options = ("--dry-run", "--only", "machine", "equality")
    killed = start(tmp_path, *options)
    wait_for(lambda: len(read_results(tmp_path, "equality")) >= 2)
    (child,) = [p for p in psutil.Process(killed.pid).children() if "equality" in p.cmdline()]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_for(lambda: has_ended(child))
    before = read_results(tmp_path, "equality")
    assert summarise(Records(tmp_path / "records.jsonl"))["stages"]["equality"]["state"] == "cut"
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"stage": "equality", "ca')  # a line that was being written

    code, text, day = run(tmp_path, *options)
    assert code == 0, text
    assert "== equality: passed" in text
    assert "== machine" not in text
    assert len(read_results(tmp_path, "machine")) == 2
    after = read_results(tmp_path, "equality")
    assert sorted(after) == sorted(set(after)), "no case is computed twice"
    assert set(before) < set(after) == day["stages"]["equality"]["cases"].keys()
    assert len(after) == 7


def test_a_day_that_is_told_to_end_writes_its_tables(tmp_path):
    ended = start(tmp_path, "--dry-run", "--only", "equality")
    wait_for(lambda: read_results(tmp_path, "equality"))
    children = psutil.Process(ended.pid).children(recursive=True)
    ended.terminate()
    text, _ = ended.communicate(timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM, text
    assert "| equality | cut |" in (tmp_path / "tables.md").read_text()
    wait_for(lambda: all(map(has_ended, children)))


def test_a_stage_is_cut_at_the_end_and_the_next_not_run(tmp_path):
    began = time.monotonic()
    stages = ["equality", "tests", "steps-gpt2-512", "run", "placements"]  # together longer than nine seconds
    code, text, day = run(tmp_path, "--dry-run", "--minutes", "0.15", "--only", *stages)
    assert code == 1, text
    assert time.monotonic() - began < 60
    states = [day["stages"][stage]["state"] for stage in stages]
    end = states.index("cut")
    assert states == [*["passed"] * end, "cut", *["not run"] * (len(stages) - end - 1)]
    assert states[-1] == "not run" and "0 s were left" in day["stages"][stages[-1]]["reason"]
    assert f"| {stages[end]} | cut |" in (tmp_path / "tables.md").read_text()


@pytest.mark.usefixtures("shared")
def test_a_failing_stage_does_not_end_the_day_and_runs_again(tmp_path):
    broken = tmp_path / "broken" / "data"
    (broken / "gpt2-tokenizer").mkdir(parents=True)
    (broken / "gpt2-tokenizer" / "tokenizer.json").write_text("{")
    options = ("--dry-run", "--only", "steps-7b-2048", "steps-1.5b-2048")
    code, text, day = run(tmp_path, *options, DPOKIT_SHARED=str(broken.parent))
    assert code == 1
    assert [stage["state"] for stage in day["stages"].values()] == ["failed", "failed"], text
    assert "dpokit, kept reference: " in (tmp_path / "tables.md").read_text(), "the table has the error"
    (tmp_path / "nothing").mkdir()
    _, _, day = run(tmp_path, *options, DPOKIT_SHARED=str(tmp_path / "nothing"))
    for stage in day["stages"].values():
        assert stage["state"] == "lacked"
        assert stage["reason"].startswith("HH rows and GPT-2's tokenizer: ")
    code, text, _ = run(tmp_path, *options[:-1])
    assert code == 0, text


NO_GPU = {"hidden": {"CUDA_VISIBLE_DEVICES": ""}, "none": {}}


@pytest.mark.parametrize("case", NO_GPU)
def test_without_a_gpu_each_stage_says_what_it_lacked(case, tmp_path):
    if case == "none" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    environment = {**os.environ, **NO_GPU[case], "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "tests" / "gpu" / "day.sh"), "--minutes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    reason = "CUDA_VISIBLE_DEVICES='' hides every GPU: unset it"
    if case == "none":
        reason = "no NVIDIA GPU or no driver (NVML Shared Library Not Found): nvidia-smi must list a GPU"
    day = json.loads((tmp_path / "day.json").read_text())
    assert list(day["stages"]) == NAMES
    for name, stage in day["stages"].items():
        assert (stage["state"], stage["reason"]) == ("lacked", reason)
        assert f"== {name}: lacked after 0 s: {reason}" in done.stdout


def test_with_little_memory_each_stage_says_what_it_lacked(tmp_path):
    code, _, day = run(tmp_path, "--dry-run", "--memory-gib", "0.5")
    assert code == 1
    for stage in day["stages"].values():
        assert stage["state"] == "lacked"
        assert stage["reason"].startswith("1.00 GiB of free memory, and there are 0.50 of ")


H100 = Machine(
    gpu="NVIDIA H100 80GB HBM3",
    trouble="",
    driver="580.95.05",
    driver_cuda=13.0,
    torch_cuda="13.0",
    capability=9.0,
    total_gib=79.6,
    free_gib=79.0,
    versions=dict.fromkeys(("torch", "transformers", "trl", "accelerate", "peft", "datasets"), "1"),
    commit="",
)
LACKS = {
    "nothing": ({}, None),
    "newer driver": ({"driver_cuda": 13.2}, None),
    "older CUDA of torch": ({"torch_cuda": "12.8"}, None),
    "older CUDA of the same generation": ({"torch_cuda": "13.2"}, None),
    "old driver": ({"driver": "470.57", "driver_cuda": 11.4}, "driver 470.57 is too old: it runs CUDA up to 11.4"),
    "torch without CUDA": ({"torch_cuda": ""}, "torch 1 is built without CUDA"),
    "old GPU": ({"gpu": "Tesla T4", "capability": 7.5}, "bf16 needs compute capability 8.0, and Tesla T4 has 7.5"),
    "1 GiB left": ({"free_gib": 1.0}, "20.00 GiB of free memory, and there are 1.00 of 79.6"),
    "no driver": ({"trouble": "no NVIDIA GPU"}, "no NVIDIA GPU"),
    "no TRL": ({"versions": {"torch": "1"}}, "not installed: transformers, trl"),
}


@pytest.mark.parametrize("case", LACKS)
def test_a_stage_names_what_a_machine_lacks(case):
    changes, expected = LACKS[case]
    packages = ("torch", "transformers", "trl")
    lack = find_lack(dataclasses.replace(H100, **changes), packages=packages, gib=20)
    assert lack is None if expected is None else str(lack).startswith(expected), lack


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_torch_says_why_it_cannot_use_a_gpu():
    from day_stages import find_gpu_trouble

    assert str(find_gpu_trouble()).startswith(f"torch {torch.__version__} cannot use the GPU: ")


MESSAGES = {
    "of a launcher's child": ("x\nDataError: no rows\nsubprocess.CalledProcessError: Command\n", "DataError: no rows"),
    "with a module": ("importlib.metadata.PackageNotFoundError: x\nmore", "importlib.metadata.PackageNotFoundError: x"),
    "no error": ("Killed\n\n", "Killed"),
    "nothing": ("", "no output"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_the_error_of_a_program_is_found_in_its_output(case):
    from day_runs import find_message

    text, expected = MESSAGES[case]
    assert find_message(text) == expected


@pytest.mark.cold
def test_the_machine_is_read_without_torch():
    code = "import sys; sys.path.insert(0, 'tests/gpu'); from day_machine import *; m = read_machine(dry_run=True);"
    code += "print(m.versions['torch'], m.torch_cuda, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [torch.__version__, *([torch.version.cuda] if torch.version.cuda else []), "False"]


def test_results_of_another_machine_are_kept_apart(tmp_path):
    records = Records(tmp_path / "records.jsonl")
    identity = H100.find_identity(dry_run=False)
    records.append(machine=H100.record(), identity=identity, at="2026-01-01")
    records.append(stage="machine", state="passed")
    code, text, day = run(tmp_path, "--dry-run", "--only", "machine")
    assert code == 0, text
    assert "NVIDIA H100 80GB HBM3" in text
    assert day["identity"] != identity
    assert summarise(Records(tmp_path / "records-1.jsonl"))["identity"] == identity


def test_the_tables_have_rates_shares_and_ratios():
    common = {"pairs": 10, "row_tokens": 4000.0, "flops": 400e12, "ready_seconds": 3.0, "logps/chosen": -50.0}
    cases = {
        "TRL, live reference": {**common, "seconds": [2.0, 4.0, 2.0], "peak_gib": 40.0, "reserved_gib": 50.0},
        "dpokit, live reference": {**common, "seconds": [1.0, 1.0, 9.0], "logps/chosen": -50.5},
        "dpokit, kept reference": {**common, "seconds": [0.5], "flops": 300e12},
        "TRL, precomputed reference": {"lacked": "memory: CUDA out of memory"},
    }
    gpu = {name: {"mean": 500.0, "most": 600.0} for name in ("watts", "gib", "percent")}
    machine = {"state": "passed", "cases": {"matrix peak": {"best": 800.0, "median": 790.0, "dtype": "bfloat16"}}}
    steps = {"state": "lacked", "reason": "", "seconds": 41.0, "gpu": gpu, "cases": cases}
    record = {"machine": H100.record(), "at": "2026-11-29T10:00:00", "minutes": 12.0}
    text = render({**record, "stages": {"machine": machine, "steps-gpt2-512": steps}})
    for row in (
        "| steps-gpt2-512 | lacked | 41 | 3/4 | 500 W, 500 % | 600.0 | TRL, precomputed reference: memory: CUDA out of",
        "| TRL, live reference | 2.000 | 5.0 | 2,000 | 1.00 | 1.00 | 25.0 | 20.2 | 40.0 | 50.0 | 3.0 |",
        "| dpokit, live reference | 1.000 | 10.0 | 4,000 | 2.00 | 2.00 | 50.0 | 40.4 | - | - | 3.0 |",
        "| dpokit, kept reference | 0.500 | 20.0 | 8,000 | - | 4.00 | 75.0 | 60.7 | - | - | 3.0 |",
        "The chosen answers' mean log-probs are equal to 1 %.",
    ):
        assert row in text.splitlines() or row in text, text


def test_each_outcome_of_a_marked_test_is_recorded(tmp_path):
    (tmp_path / "test_outcomes.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip('needs two')\ndef test_left_out(): pass\ndef test_done(): assert False\n"
        "@pytest.fixture\ndef broken(): raise ValueError('no data')\ndef test_broken(broken): pass\n"
    )
    (tmp_path / "test_other.py").write_text("def test_without_a_mark(): assert False\n")
    code = (
        f"import json, sys; sys.path.insert(0, {str(ROOT / 'tests' / 'gpu')!r})\n"
        "from pathlib import Path\nfrom day_pytest import find_files, run_pytest\nresults = {}\n"
        "run_pytest(find_files(Path()), 'gpu', lambda name, **values: results.update({name: values}),\n"
        "           {'test_outcomes.py::test_done'}, Path('base'))\n"
        "print('RESULT', json.dumps(results))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    results = json.loads(done.stdout.partition("RESULT ")[2])
    names = {name.partition("::")[2]: values for name, values in results.items()}
    assert names.keys() == {"test_good", "test_bad", "test_left_out", "test_broken"}, done.stdout
    assert names["test_good"]["outcome"] == "passed"
    assert names["test_left_out"] == {"outcome": "skipped", "why": "needs two"}
    assert "assert 1 == 2" in names["test_bad"]["error"]
    assert "no data" in names["test_broken"]["error"]
