"""The job script, and the checks before it is queued."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import ROOT
from documentation import read_pages
from test_cli import dpokit

from dpokit.cluster.command import collect_job_variables
from dpokit.cluster.slurm import SlurmJob, check_job, find_body, parse_seconds, render_job, submit_text
from dpokit.errors import DpokitError, MachineError, RunFolderError, SettingsError
from dpokit.rundir import RunDir
from dpokit.verbs.app import app

RECIPE, CONFIGS = Path("recipes/dpo_gpt2.py"), Path("accelerate_configs")


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def job(**options: object) -> SlurmJob:
    return SlurmJob(**{"recipe": RECIPE, "config_file": CONFIGS / "ddp_cpu.yaml"} | options)


def options_of(text: str) -> list[str]:
    """The options as sbatch reads them: every #SBATCH line before the first command."""
    lines = text.splitlines()
    head = lines[: next(place for place, line in enumerate(lines) if line and not line.startswith("#"))]
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in head if line.startswith("#SBATCH")]


def arguments_of(text: str) -> list[str]:
    """The arguments after the script's name, as its own bash reads them."""
    setting = text[text.index("\nset -- ") : text.index("\nif [ -n ")]
    command = f"{setting}\n{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\""
    return json.loads(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)


def test_the_script_is_train_sbatch_with_the_jobs_lines():
    body, text = find_body().read_text(), render_job(job())
    lines = text.splitlines()
    assert [line for line in body.splitlines() if line not in lines] == []
    new_lines = [line for line in lines if line not in body.splitlines()]
    assert new_lines == [
        "#SBATCH --job-name=dpo_gpt2",
        f"export DPOKIT_MAX_RESTARTS=3 DPOKIT_PYTHON={sys.executable}",
        "set -- --config_file accelerate_configs/ddp_cpu.yaml recipes/dpo_gpt2.py",
    ]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_job_requests_one_node_by_default():
    options = options_of(render_job(job()))
    assert options[-3:] == ["--job-name=dpo_gpt2", "--nodes=1", "--signal=B:USR1@300"]
    assert "--requeue" in options
    assert "--open-mode=append" in options
    assert not any("gpus" in option or "partition" in option for option in options)


def test_every_option_reaches_sbatch():
    many_options = job(
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=16,
        mem="500G",
        partition="gpu",
        account="lab",
        qos="long",
        time="2-00:00:00",
        exclusive=True,
        job_name="mine",
        output="logs/my run/%j.out",
        setup=Path("my set-up.sh"),
        signal_seconds=600,
        max_restarts=7,
        processes_per_node=2,
        sbatch=("--constraint=h100", "--mem=0"),
    )
    text = render_job(many_options)
    assert options_of(text)[-14:] == [
        "--job-name=mine",
        "--nodes=4",
        "--gpus-per-node=8",
        "--cpus-per-task=16",
        "--mem=500G",
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--time=2-00:00:00",
        "--output=logs/my run/%j.out",
        "--signal=B:USR1@600",
        "--exclusive",
        "--constraint=h100",
        "--mem=0",
    ]
    assert "DPOKIT_MAX_RESTARTS=7" in text
    assert "DPOKIT_PROCESSES_PER_NODE=2" in text
    assert f"DPOKIT_SETUP='{ROOT / 'my set-up.sh'}'" in text


def test_the_script_of_an_array_keeps_the_index_mark():
    array_job = job(array="0-3%2", flags=("--output_dir", "runs/x_%a", "--seed", "%a"))
    check_job(array_job)
    text = render_job(array_job)
    assert "--array=0-3%2" in options_of(text)
    assert arguments_of(text)[-4:] == ["--output_dir", "runs/x_%a", "--seed", "%a"]


def test_hostile_training_flags_reach_the_run_unchanged():
    hostile = ("--run_name", 'it\'s $HOME `id` $(id) "q" \\ * ;&|', "--project", "two\nlines", "--report_to", "")
    assert arguments_of(render_job(job(flags=hostile)))[3:] == list(hostile)


def test_options_of_sbatch_are_quoted_or_refused():
    text = render_job(job(sbatch=("--comment=a b # c $HOME 'd'", "--nodelist=n[1-3,7]", "--exclusive=user")))
    assert "#SBATCH --comment=\"a b # c $HOME 'd'\"" in text
    assert "#SBATCH --nodelist=n[1-3,7]" in text
    for bad in ("constraint=h100", "-C h100", "--constraint h100", "--comment=two\nlines", '--comment=a"b', "--a=\\"):
        with pytest.raises(SettingsError) as refused:
            render_job(job(sbatch=(bad,)))
        assert "do this" in str(refused.value)
    with pytest.raises(SettingsError, match="--job-name has a line break"):
        render_job(job(job_name="x\n#SBATCH --account=theirs"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config_file": CONFIGS / "nothing.yaml"}, "there is no such file"),
        ({"recipe": Path("recipes/nothing.py")}, "there is no file recipes/nothing.py"),
        ({"nodes": 0}, "--nodes is 0"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1"),
        ({"processes_per_node": 0}, "--processes-per-node is 0"),
        ({"max_restarts": -1}, "--max-restarts is -1"),
        ({"signal_seconds": 0}, "--signal-seconds is 0"),
        ({"cpus_per_task": 0}, "--cpus-per-task is 0"),
        ({"mem": "64"}, "--mem 64 has no unit"),
        ({"setup": Path("nothing.sh")}, "--setup nothing.sh: there is no such file"),
        ({"setup": ROOT / "README.md"}, "is no script that bash reads"),
        ({"time": "soon"}, "--time 'soon' is not a time"),
        ({"time": "5"}, "--time 5 is 300 s"),
        ({"array": "a-b"}, "--array 'a-b' is not an array"),
        ({"array": "0-3"}, "would write to runs/dpo_gpt2"),
        ({"config_file": CONFIGS / "single_gpu.yaml", "nodes": 2}, "a placement for one process"),
        ({"config_file": CONFIGS / "single_gpu.yaml", "gpus_per_node": 8}, "a placement for one process"),
        ({"config_file": CONFIGS / "ddp.yaml", "nodes": 2}, "takes all GPUs of a node, and the job requests none"),
        ({"flags": ("--output_dir", "README.md/run")}, "README.md is a file"),
    ],
)
def test_an_invalid_job_is_refused_before_it_is_queued(options, message):
    with pytest.raises(DpokitError, match=message.replace(".", r"\.")) as refused:
        check_job(job(**options))
    assert str(refused.value).count("do this:") == 1


def test_a_finished_run_is_refused_unless_the_flags_allow_it(tmp_path):
    RunDir(tmp_path).write_run(state="finished")
    flags = ("--output_dir", str(tmp_path))
    for more in ((), ("--overwrite_run", "false"), ("--resume_from_checkpoint", "never")):
        with pytest.raises(RunFolderError, match="holds a finished run"):
            check_job(job(flags=(*flags, *more)))
    for more in (("--overwrite_run",), ("--resume_from_checkpoint", "auto")):
        check_job(job(flags=(*flags, *more)))


def test_an_unwritable_folder_is_refused_and_not_created(tmp_path, monkeypatch):
    check_job(job(flags=("--output_dir", str(tmp_path / "a" / "b"))))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(RunFolderError, match="is not writable"):
        check_job(job(flags=("--output_dir", str(tmp_path / "a" / "b"))))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("8:00:00", 28800), ("2-00", 172800), ("1-2:03", 93780), ("1-2:03:04", 93784)],
)
def test_a_time_is_read_as_slurm_reads_it(text, seconds):
    assert parse_seconds(text) == seconds
    assert parse_seconds("infinite") is None


def documented(start: str) -> list[list[str]]:
    """The commands of the documentation and of train.sbatch that begin with `start`, as arguments."""
    text = read_pages() + "\n" + find_body().read_text().replace("\\\n#", " ").replace("\n#   ", "\n")
    return [shlex.split(line) for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("arguments", documented("sbatch "), ids=" ".join)
def test_a_documented_sbatch_names_a_recipe_that_exists(arguments):
    launch_arguments = arguments[arguments.index("launch/train.sbatch") + 1 :]
    environment = (
        {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"} if "2" in arguments or "--nodes=2" in arguments else {}
    )
    assert collect_job_variables(launch_arguments, {"SLURM_JOB_ID": "1", **environment})["words"]


@pytest.mark.parametrize("arguments", documented("dpokit submit "), ids=" ".join)
def test_a_documented_submit_passes_its_checks(arguments):
    verb = typer.main.get_command(app).commands["submit"]
    context = verb.make_context("submit", arguments[2:])
    options = {
        name: value for name, value in context.params.items() if name not in ("dry_run", "recipe", "sbatch", "setup")
    }
    check_job(SlurmJob(recipe=Path(context.params["recipe"]), flags=tuple(context.args), **options))


def write_sbatch(folder: Path, body: str, monkeypatch) -> None:
    (folder / "sbatch").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_submit_returns_the_id_or_the_message_of_sbatch(tmp_path, monkeypatch):
    write_sbatch(tmp_path, f"cat > {tmp_path}/text; echo '4711;cluster'", monkeypatch)
    assert submit_text("the text") == "4711"
    assert (tmp_path / "text").read_text() == "the text"
    write_sbatch(tmp_path, "echo 'sbatch: error: invalid account' >&2; exit 1", monkeypatch)
    with pytest.raises(MachineError, match="invalid account"):
        submit_text("the text")


def test_a_dry_run_prints_only_the_job_script(tmp_path):
    arguments = ["recipes/dpo_gpt2.py", "--config-file", "accelerate_configs/zero3.yaml", "--nodes", "2"]
    flags = ["--output_dir", str(tmp_path / "run"), "--beta", "0.2", "--run_name", "two words"]
    done = dpokit("submit", *arguments, "--gpus-per-node", "8", "--sbatch=--constraint=h100", *flags, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "--constraint=h100" in options_of(done.stdout)
    assert arguments_of(done.stdout) == [
        "--config_file",
        "accelerate_configs/zero3.yaml",
        "recipes/dpo_gpt2.py",
        *flags,
    ]
    assert done.stdout.endswith("esac\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_recipe"], "SettingsError: there is no recipe 'no_such_recipe'"),
        (["dpo_gpt2", "--bta", "0.5"], "SettingsError: the command line: there is no setting 'bta'"),
        (["dpo_gpt2", "--fp16", "--bf16", "--gpus-per-node", "1"], "SettingsError: fp16 and bf16 are both true"),
        (["dpo_gpt2"], "MachineError: there is no sbatch on this machine"),
        (["dpo_gpt2", "--dry-run", "--output", "/"], "SettingsError: --output / is a folder"),
    ],
)
def test_an_invalid_submit_prints_one_message(arguments, message, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("env", "uname", "file", "gcc"):  # programs that imports may call; no sbatch
        (tmp_path / "bin" / name).symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = dpokit("submit", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("do this:") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
