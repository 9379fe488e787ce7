"""The console script: --help without torch, errors of the user, stdout and stderr."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import typer
from conftest import ROOT
from documentation import list_commands
from run_folders import make_run, make_steps

from dpokit.settings.flags import FlagParser
from dpokit.verbs.app import app

HEAVY = {"torch", "transformers", "trl", "datasets", "peft"}


def dpokit(*argv: str, cwd=ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "dpokit.cli", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=environment)


def find_verbs() -> dict[tuple[str, ...], typer.core.TyperCommand]:
    """All verbs, and groups of verbs such as `data`, by their names."""
    verbs = {(name,): verb for name, verb in typer.main.get_command(app).commands.items()}
    groups = {names: verb.commands for names, verb in verbs.items() if hasattr(verb, "commands")}
    return verbs | {(*names, name): verb for names, inner in groups.items() for name, verb in inner.items()}


@pytest.mark.parametrize("argv", [["--help"], *([*names, "--help"] for names in find_verbs())])
@pytest.mark.cold
def test_help_needs_no_torch(argv):
    code = (
        "import sys, dpokit.verbs.app as cli\n"
        "try:\n    cli.app(sys.argv[1:])\nexcept SystemExit as ended:\n    assert ended.code == 0, ended.code\n"
        f"print('heavy:', sorted({HEAVY | {'matplotlib'}!r} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, env=environment)
    assert done.stdout.endswith("heavy: []\n"), done.stderr
    arguments = ("RECIPE", "RUN", "SPACE", "FOLDER", "SOURCE", "prepare", "versions")
    assert any(word in done.stdout for word in arguments), f"its help has none of {arguments}: {done.stdout}"


@pytest.mark.cold
@pytest.mark.parametrize("verb", ["status", "verify", "report"])
def test_a_verb_that_reads_a_run_needs_no_torch(verb, tmp_path):
    make_run(tmp_path / "run", make_steps(5, every=1))
    code = (
        "import sys, dpokit.verbs.app as cli\n"
        "try:\n    cli.app(sys.argv[1:])\nexcept SystemExit as ended:\n    print(ended.code)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    argv = [sys.executable, "-c", code, verb, str(tmp_path / "run")]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout.endswith("[]\n"), done.stderr


def documented() -> list[list[str]]:
    """The documented commands with a verb; `dpokit --install-completion` has none."""
    commands = [shlex.split(command, comments=True) for command in list_commands("dpokit ")]
    return [argv for argv in commands if not argv[1].startswith("-")]


@pytest.mark.parametrize("argv", documented(), ids=" ".join)
def test_a_documented_verb_takes_these_options(argv):
    names = max((names for names in find_verbs() if tuple(argv[1 : 1 + len(names)]) == names), key=len)
    context = find_verbs()[names].make_context(names[-1], argv[1 + len(names) :])
    arguments = [*context.args, *context.params.get("arguments", [])]
    flags = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    assert flags <= set(FlagParser(prog="any").names())


@pytest.mark.parametrize("option", ["--max-shard-size", "--max_shard_size"])
def test_an_option_is_known_with_dashes_and_with_underscores(option, tmp_path):
    done = dpokit("merge", str(tmp_path), option, "1GB")
    assert "holds no run" in done.stderr


def test_the_result_goes_to_stdout_and_progress_to_stderr(tiny_gpt2, pairs_file):
    flags = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--max_length", "64"]
    done = dpokit("plan", "recipes/dpo_gpt2.py", *flags, "--eval_fraction", "0.1", "--gpus", "2x24", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["devices"] == {"kind": "GPU", "count": 2, "memory_gib": 24.0, "from": "--gpus 2x24"}
    assert record["check"] is None
    assert "tracing a step" in done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["no_such_recipe"], "SettingsError: there is no recipe 'no_such_recipe'"),
        (["recipes/dpo_gpt2.py", "--gpus", "lots"], "SettingsError: --gpus 'lots' is not a number of GPUs"),
        (["recipes/dpo_gpt2.py", "--bta", "0.5"], "SettingsError: the command line: there is no setting 'bta'"),
        (["recipes/dpo_gpt2.py", "--model_name_or_path", "no/such"], "ModelError: --model_name_or_path no/such"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(argv, says):
    done = dpokit("plan", *argv)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("do this:") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_training_flag_reaches_the_plan(tiny_gpt2, pairs_file):
    flags = ["--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--eval_fraction", "0.1"]
    shapes = ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--max_length", "48"]
    done = dpokit("plan", "dpo_gpt2", *flags, *shapes, "--gpus", "8x24", "--json")
    record = json.loads(done.stdout)
    assert record["steps"]["global_batch_pairs"] == 3 * 2 * 8
    assert record["worst_micro_batch"]["row_tokens"] == 48
    assert "--per_device_train_batch_size 3" in record["command"]
