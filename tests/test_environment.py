"""`dpokit env`: what a report of a bug needs, and nothing that is secret or private."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpokit import environment
from dpokit.environment import collect_environment, describe_environment, hide_user, list_packages, list_variables
from dpokit.verbs.app import app

SECRETS = {
    "HF_TOKEN": "hf_" + "a1B2" * 8,
    "WANDB_API_KEY": "local-" + "0123456789abcdef",
    "HF_ENDPOINT": "https://me:pass-word-12@hub.corp.example",
    "OPENAI_API_KEY": "sk-" + "x1y2" * 8,
    "ACCELERATE_PASSWORD": "short",
}


def test_the_report_names_versions_hardware_and_variables(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    record = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert record["packages"]["trl"][0].isdigit()
    assert record["torch"].startswith(record["packages"]["torch"])
    assert "cores for this process" in record["processor"]
    assert record["variables"]["NCCL_SOCKET_IFNAME"] == "eth0"
    text = CliRunner().invoke(app, ["env"]).stdout
    assert all(f"{name}:" in text for name in record)


def test_no_secret_and_no_name_of_the_user_is_shown(monkeypatch, tmp_path):
    home = tmp_path / "homes" / "alice"
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", f"{home}/.cache/hf")
    monkeypatch.setenv("DPOKIT_CACHE", "/scratch/alice/cache")
    monkeypatch.setenv("AWS_PROFILE", "alice-private")
    record = collect_environment()
    text = describe_environment(record) + json.dumps(record)
    assert not [name for name, value in SECRETS.items() if value.rpartition("//")[2].partition("@")[0] in text]
    assert "alice" not in text
    assert record["variables"]["HF_HOME"] == "~/.cache/hf"
    assert record["variables"]["DPOKIT_CACHE"] == "/scratch/USER/cache"
    assert record["variables"]["HF_TOKEN"] == "***"
    assert record["variables"]["HF_ENDPOINT"] == "https://***@hub.corp.example"


@pytest.mark.parametrize("module", ["torch", "accelerate.commands.config.config_args"])
def test_a_broken_installation_is_reported_and_not_raised(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(environment, "import_module", _break)
    record = collect_environment()
    assert record["torch"] == "ImportError: torch: cannot open shared object file"
    assert record["packages"]["torch"][0].isdigit()


def _break(name: str) -> None:
    raise ImportError(f"{name}:\n cannot open shared object file")


def test_a_package_that_is_missing_is_told_from_an_optional_one(monkeypatch):
    def find(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", find)
    packages = list_packages()
    assert (packages["torch"], packages["wandb"]) == ("missing", "not installed")
    assert "pytest" not in packages


@pytest.mark.parametrize(
    ("name", "is_shown"),
    [
        ("CUDA_VISIBLE_DEVICES", True),
        ("RANK", True),
        ("RANKING", False),
        ("SLURM_NNODES", True),
        ("SLURM_JOB_USER", False),
        ("SLURM_SUBMIT_HOST", False),
        ("WANDB_ENTITY", False),
        ("PATH", False),
        ("USER", False),
    ],
)
def test_only_variables_that_change_a_run_are_shown(name, is_shown):
    assert (name in list_variables({name: "x"})) is is_shown


@pytest.mark.parametrize(
    ("text", "home", "shown"),
    [
        ("/home/a.b/x:/home/a.b", "/home/a.b", "~/x:~"),
        ("/home/a.bc/x", "/home/a.b", "/home/a.bc/x"),
        ("/data/a.b/x", "/home/a.b", "/data/USER/x"),
        ("/data/root/x:/root/y", "/root", "/data/USER/x:~/y"),
        ("/srv/x", "/", "/srv/x"),
    ],
)
def test_the_home_folder_and_the_users_name_are_replaced(text, home, shown):
    assert hide_user(text, home=home, user=Path(home).name) == shown
