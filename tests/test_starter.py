"""`dpokit init`, from a checkout and from a wheel outside of any checkout."""

import os
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from dpokit.starter import FOLDERS, list_starter_files, write_starter_files
from dpokit.verbs.app import app


def test_init_copies_every_recipe_and_placement(tmp_path):
    outcome = CliRunner().invoke(app, ["init", str(tmp_path / "mine")])
    assert outcome.exit_code == 0, outcome.stderr
    for folder in ("recipes", "accelerate_configs"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".yaml"):
                assert (tmp_path / "mine" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert (tmp_path / "mine" / "launch" / "train.sbatch").is_file()
    assert "accelerate launch recipes/dpo_quickstart.py" in outcome.stdout


def test_init_twice_changes_nothing(tmp_path):
    assert write_starter_files(tmp_path) == write_starter_files(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_init_overwrites_no_changed_file(kind, tmp_path):
    path = tmp_path / "recipes" / "dpo_gpt2.py"
    path.parent.mkdir()
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    outcome = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert outcome.exit_code == 2
    assert "recipes/dpo_gpt2.py exist" in outcome.stderr.replace("\n", "")
    assert not (tmp_path / "accelerate_configs").exists()


def test_init_into_a_file_is_one_message(tmp_path):
    (tmp_path / "file").write_text("mine")
    outcome = CliRunner().invoke(app, ["init", str(tmp_path / "file")])
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel's files, as pip installs them."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith("tests") or name.endswith((".pyc", ".jsonl"))]
    return site


def run_outside(site, folder, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_wheel_has_every_file_of_the_package(site):
    sources = {path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.*") if path.suffix != ".pyc"}
    packaged = {path.relative_to(site) for path in site.rglob("*.*")}
    assert sorted(map(str, sources - packaged)) == []
    starter = site / "dpokit" / "starter_files"
    assert sorted(path.relative_to(starter) for path in starter.rglob("*.*") if path.suffix != ".pyc") == sorted(
        relative for _, relative in list_starter_files()
    )
    assert all((starter / folder).is_dir() for folder in FOLDERS)


@pytest.mark.slow
@pytest.mark.cold
def test_a_wheel_trains_outside_of_a_checkout(site, tiny_gpt2, tmp_path):
    shown = run_outside(site, tmp_path, "dpokit.cli", "init", "mine")
    assert shown.returncode == 0, shown.stderr
    project = tmp_path / "mine"
    where = run_outside(site, project, "dpokit.cli", "plan", "recipes/dpo_8b.py", "--gpus", "8x80", "--help")
    assert where.returncode == 0, where.stderr
    rows = [f'{{"prompt": "Question {n}?", "chosen": " Yes {n}.", "rejected": " No."}}\n' for n in range(8)]
    (project / "pairs.jsonl").write_text("".join(rows))
    words = ["accelerate.commands.launch", "--config_file", "accelerate_configs/single_gpu.yaml", "recipes/dpo_gpt2.py"]
    words += ["--dataset_name", "pairs.jsonl", "--eval_fraction", "0.3", "--model_name_or_path", str(tiny_gpt2)]
    words += ["--max_steps", "1", "--report_to", "none", "--max_length", "64"]
    trained = run_outside(site, project, *words)
    assert trained.returncode == 0, trained.stderr[-3000:]
    shown = run_outside(site, project, "dpokit.cli", "evaluate", "runs/dpo_gpt2")
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert list((project / "runs" / "dpo_gpt2" / "eval").glob("*/pairs.json"))
