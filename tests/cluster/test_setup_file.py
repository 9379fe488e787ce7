"""The set-up file of a job: the real beginning of launch/train.sbatch, run by bash."""

import os
import subprocess

import pytest

from dpokit.cluster.slurm import find_body

REPORT = """
echo "arguments=$*|folder=$PWD|options=$-|pipefail=$(shopt -o pipefail | cut -f2)"
echo "python=${DPOKIT_PYTHON:-unset}|A=${A:-}|IFS=$(printf %q "${IFS-unset}")|globs=$(shopt nullglob | cut -f2)"
"""


def run_setup(tmp_path, content: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs train.sbatch up to `set -u` with this set-up file, and a line that reports the shell's state."""
    setup = tmp_path / "my set-up.sh"
    if content is not None:
        setup.write_text(content)
    body = find_body().read_text()
    script = body[: body.index("\nset -u\n")] + REPORT
    environment = {"PATH": os.environ["PATH"], "DPOKIT_SETUP": str(setup), **environment}
    command = ["bash", "-c", script, "train.sbatch", "x", "two words"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)


ENV = 'export VIRTUAL_ENV="$PWD/env" PATH="$PWD/env/bin:$PATH"\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("export A=1\n", "A=1"),
        ("cd /\nset -- none\nset -ex; set -o pipefail\n", "A=|"),
        (
            "folder=/tmp environment=x code=1 options=y; arguments=(z)\nIFS=,; set -f; shopt -s nullglob\n",
            "IFS=unset|globs=off",
        ),
        ("end_setup() { exit 9; }\nfalse || true\n", "python=unset"),
        ("f() { false; true; }\nf\n[ 1 = 2 ] && echo\nfalse || true\nexport A=1\n", "A=1"),
        ("source nested.sh\nexport A=1\n", "A=1"),
        (ENV, "python={folder}/env/bin/python"),
        ("export PATH=/usr/bin:$PATH\n", "python=unset"),
        ("export DPOKIT_PYTHON=/mine\n", "python=/mine"),
    ],
)
def test_a_setup_file_prepares_the_job_and_nothing_else(content, expected, tmp_path):
    (tmp_path / "nested.sh").write_text("false\ntrue\n")
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to("/bin/true")
    done = run_setup(tmp_path, content)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"arguments=x two words|folder={tmp_path}|options=hBc|pipefail=off\n")
    assert expected.format(folder=tmp_path) in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("true\nmodule load cuda\nexport A=1\n", "failed in line 2 (exit code 127)"),
        ("module load x\r\nexport A=1\r\n", "failed in line 1 (exit code 127)"),
        ("(exit 4)\n", "failed in line 1 (exit code 4)"),
        ("exit 0\n", "called exit 0"),
        ("set -u\necho $NOPE\n", "called exit 1"),
        ("false || return 3\n", "its last command returned 3"),
        ("[ -f none.sh ] && . none.sh\n", "its last command returned 1"),
        ("source nested.sh\nexport A=1\n", "failed in line 1 (exit code 1)"),
        ("if true\n", "returned"),
        (None, "does not exist on"),
    ],
)
def test_a_setup_file_that_fails_ends_the_job_with_one_message(content, message, tmp_path):
    (tmp_path / "nested.sh").write_text("false\n")
    done = run_setup(tmp_path, content)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("dpokit: stop: the set-up file ") == 1
    assert message in done.stderr
    assert "submit again" in done.stderr


def test_without_a_setup_file_nothing_changes(tmp_path):
    done = run_setup(tmp_path, None, DPOKIT_SETUP="")
    assert done.stdout.startswith("arguments=x two words|")
    assert done.stderr == ""
