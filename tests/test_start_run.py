"""`dpokit train`: which command it starts, and how that ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from dpokit import start_run
from dpokit.errors import SettingsError
from dpokit.interpreter import PYTHON
from dpokit.start_run import build_run_command, has_default_configuration
from dpokit.verbs.app import app

CONFIGS = ROOT / "accelerate_configs"
RECIPE = Path("recipes/dpo_gpt2.py")
DIRECT = [sys.executable, str(RECIPE)]
LAUNCHED = [*PYTHON, "-m", "dpokit.launcher"]


@pytest.fixture
def machine(monkeypatch):
    """Sets whether this machine has GPUs and a default configuration of accelerate."""

    def set_up(*, gpu: bool = False, configuration: bool = False) -> None:
        monkeypatch.setattr(start_run, "has_gpu", lambda: gpu)
        monkeypatch.setattr(start_run, "has_default_configuration", lambda _: configuration)

    set_up()
    return set_up


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_placement_of_one_process_needs_no_launcher(config, machine):
    machine(gpu=True, configuration=True)
    command = build_run_command(RECIPE, ["--beta", "0.2"], config)
    if config.stem == "single_gpu":
        assert command == [*DIRECT, "--beta", "0.2"]
    else:
        assert command == [*LAUNCHED, "--config_file", str(config), str(RECIPE), "--beta", "0.2"]


@pytest.mark.parametrize(
    ("text", "is_direct"),
    [
        ("distributed_type: NO\n", True),
        ("distributed_type: 'NO'\nnum_processes: 1\n", True),
        ("distributed_type: NO\nnum_processes: 2\n", False),
        ("distributed_type: NO\nmixed_precision: bf16\n", False),
        ("distributed_type: NO\nnum_processes: gpu\n", False),
        ("num_machines: 2\n", False),
    ],
)
def test_a_placement_with_more_in_it_needs_the_launcher(text, is_direct, tmp_path):
    config = tmp_path / "placement.yaml"
    config.write_text(text)
    assert (build_run_command(RECIPE, [], config) == DIRECT) is is_direct


@pytest.mark.parametrize(("gpu", "configuration"), [(False, False), (True, False), (False, True)])
def test_without_a_placement_gpus_and_configuration_decide(gpu, configuration, machine):
    machine(gpu=gpu, configuration=configuration)
    is_launched = gpu or configuration
    assert build_run_command(RECIPE, [], None) == ([*LAUNCHED, str(RECIPE)] if is_launched else DIRECT)


def test_the_default_configuration_is_where_accelerate_has_it(tmp_path):
    from accelerate.commands.config import config_args

    assert Path(config_args.cache_dir).name == "accelerate"
    for environment in ({"HF_HOME": str(tmp_path)}, {"XDG_CACHE_HOME": str(tmp_path)}):
        folder = tmp_path / ("" if "HF_HOME" in environment else "huggingface") / "accelerate"
        assert not has_default_configuration(environment)
        folder.mkdir(parents=True)
        (folder / Path(config_args.default_yaml_config_file).name).touch()
        assert has_default_configuration(environment)


@pytest.mark.parametrize("content", [None, "a: [", "text"])
def test_an_unreadable_placement_is_refused(content, tmp_path):
    config = tmp_path / "placement.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(SettingsError, match=r"placement\.yaml") as error:
        build_run_command(RECIPE, [], config)
    assert error.value.do


def test_the_help_of_the_verb_names_its_recipe():
    shown = CliRunner().invoke(app, ["train", "--help"])
    assert shown.exit_code == 0
    assert "RECIPE" in shown.stdout


def run_command(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)


@pytest.mark.parametrize(("end", "code"), [("sys.exit(0)", 0), ("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_the_launcher_ends_with_the_code_of_a_process(end, code, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"import os, sys\nprint('the run', sys.argv[1:], file=sys.stderr)\n{end}\n")
    done = run_command(*LAUNCHED, str(recipe), "--beta", "0.2", cwd=tmp_path)
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines[0] == "the run ['--beta', '0.2']"
    assert lines[1:] == (
        ["dpokit: signal 9 ended a process of the run (often for lack of memory)"] if code > 128 else []
    )


def test_a_launcher_of_two_processes_ends_with_the_first_code(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(2)\ntime.sleep(60)\n")
    done = run_command(*LAUNCHED, "--config_file", str(CONFIGS / "ddp_cpu.yaml"), str(recipe), cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "not passed to" not in done.stderr


@pytest.mark.cold
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_both_processes(number, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import os, pathlib, signal, sys, time\n"
        "def end(*_):\n    pathlib.Path('ended' + os.environ['RANK']).touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGINT, end)\nsignal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = [*LAUNCHED, "--config_file", str(CONFIGS / "ddp_cpu.yaml"), str(recipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(number)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 75
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.glob("ended*")) == ["ended0", "ended1"]


@pytest.mark.cold
def test_a_wrong_flag_is_one_message_with_exit_code_2(tmp_path):
    """Also from the verb: it replaces itself by the run."""
    environment = {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--config-file", str(CONFIGS / "single_gpu.yaml"), "--bta", "0.5"]
    done = run_command(
        sys.executable, "-m", "dpokit.cli", "train", str(ROOT / RECIPE), *flags, cwd=tmp_path, **environment
    )
    assert done.returncode == 2
    assert done.stderr.count("do this:") == 1
    assert "Traceback" not in done.stderr
