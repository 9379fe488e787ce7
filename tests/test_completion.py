"""Completion of `dpokit` in a real bash, which calls the console script as a user's shell does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import make_run, make_steps

# The function that bash itself calls on TAB, with the words of the line; the last one is incomplete.
TRY = """
eval "$(dpokit --show-completion bash)"
[[ "$(complete -p dpokit)" =~ -F\\ ([^ ]+) ]]
while IFS= read -r line; do
    read -r -a COMP_WORDS <<< "$line"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    "${BASH_REMATCH[1]}" dpokit
    echo "${COMPREPLY[*]}"
done
"""
CASES = {
    "dpokit subm": "submit",
    "dpokit submit dpo_g": "dpo_gpt2",
    "dpokit submit recipes/sft": "recipes/sft_gpt2.py",
    "dpokit plan dpo_gpt2 --learning": "--learning_rate",
    "dpokit submit dpo_gpt2 --signal": "--signal-seconds",
    "dpokit submit dpo_gpt2 --output": "--output --output_dir",
    "dpokit push runs/a --weig": "--weights",
    "dpokit status runs/a": "runs/a1 runs/a2",
    "dpokit report no_such_folder/": "",
}


@pytest.fixture(scope="module")
def completions(tmp_path_factory) -> dict[str, str]:
    script = Path(sys.executable).with_name("dpokit")
    if not script.is_file():
        pytest.skip("dpokit is not installed as a command")
    folder = tmp_path_factory.mktemp("project")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name in ("a1", "a2", "b"):
        make_run(folder / "runs" / name, make_steps(1, every=0))
    environment = os.environ | {
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",  # a name after --show-completion, not the parent process
    }
    lines = "".join(f"{line}\n" for line in CASES)
    done = subprocess.run(
        ["bash", "-c", TRY], input=lines, capture_output=True, text=True, env=environment, cwd=folder, timeout=120
    )
    assert done.stderr == ""
    return dict(zip(CASES, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("line", CASES)
def test_bash_completes_verbs_flags_recipes_and_runs(line, completions):
    assert completions[line] == CASES[line]
