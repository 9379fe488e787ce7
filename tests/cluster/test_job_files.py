"""The log of a job: its name for Slurm, and the folders that are made for it."""

from pathlib import Path

import pytest
from conftest import ROOT

from dpokit.cluster.job_files import describe_log, list_indices, log_folders, with_log
from dpokit.cluster.slurm import SlurmJob
from dpokit.errors import DpokitError, MachineError

RECIPE, CONFIG = ROOT / "recipes" / "dpo_gpt2.py", ROOT / "accelerate_configs" / "ddp_cpu.yaml"


def job(output_dir: str | Path, **options: object) -> SlurmJob:
    return with_log(SlurmJob(RECIPE, CONFIG, ("--output_dir", str(output_dir)), **options))


@pytest.mark.parametrize(
    ("output_dir", "options", "log", "folders"),
    [
        ("run", {}, "run/slurm-%j.out", ["run"]),
        ("my run/é", {}, "my run/é/slurm-%j.out", ["my run/é"]),
        ("100%a", {}, "100%%a/slurm-%j.out", ["100%a"]),
        ("run_%a", {"array": "1-3:2,7%2"}, "run_%a/slurm-%A_%a.out", ["run_1", "run_3", "run_7"]),
        ("50%/run_%a", {"array": "0"}, "50%%/run_%a/slurm-%A_%a.out", ["50%/run_0"]),
        ("run", {"output": "logs/%j.out"}, "logs/%j.out", ["logs"]),
        ("run_%a", {"output": "logs/%A_%a.out", "array": "0-9"}, "logs/%A_%a.out", ["logs"]),
        ("run", {"sbatch": ("--output=mine/%j",)}, None, []),
        ('a "quoted" run', {}, None, []),
    ],
)
def test_a_log_lies_in_the_run_folder_or_where_asked(output_dir, options, log, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = job(output_dir, **options)
    assert made.output == (None if log is None else f"{tmp_path}/{log}")
    with log_folders(made):
        inside = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert set(folders) <= set(inside)
    assert all(any(folder.startswith(path) for folder in folders) for path in inside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "folder"}, "--output .*/folder is a folder"),
        ({"output": "logs/all.out", "array": "0-3"}, "every job of --array 0-3 would write its log to"),
        ({"output": "logs/%A.out", "array": "0-3"}, "every job of --array 0-3 would write its log to"),
        ({"output": "%j/log.out"}, "only the job knows %j"),
        ({"output": "%%/%x/log.out"}, "only the job knows %x"),
        ({"output": "%a/log.out"}, "only the job knows %a"),
        ({"output": "file/log.out"}, "the folder of the job's log cannot be created"),
        ({"array": "0-99999999"}, "no index above"),
        ({"array": "0-100000"}, "would lie in 100,001 folders"),
    ],
)
def test_a_log_that_slurm_could_not_write_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DpokitError, match=message) as refused, log_folders(job("run_%a", **options)):
        pass
    assert str(refused.value).count("do this:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_job_that_sbatch_refuses_leaves_no_folder(tmp_path):
    (tmp_path / "runs" / "kept_1").mkdir(parents=True)
    with pytest.raises(MachineError), log_folders(job(tmp_path / "runs" / "kept_%a" / "x", array="0-2")):
        raise MachineError("sbatch refused the job", expected="another", do="that")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["runs", "runs/kept_1"]


def test_the_shown_log_has_the_job_id():
    assert describe_log("/r/100%%/slurm-%j.out", "47") == "/r/100%/slurm-47.out"
    assert describe_log("/r_%a/slurm-%A_%a.out", "47") == "/r_%a/slurm-47_%a.out"


def test_indices_are_those_of_slurm():
    assert list_indices("0-6:2,9,4-5%3") == [0, 2, 4, 5, 6, 9]
