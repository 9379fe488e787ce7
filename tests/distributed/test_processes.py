"""The requested and the actual number of processes, and the rank that prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from conftest import ROOT

from dpokit.distributed.processes import (
    _read_accelerate_command,
    check_devices,
    check_world_size,
    find_requested_processes,
    is_main_process,
)
from dpokit.errors import MachineError

RECIPE = "recipes/dpo_gpt2.py"


@pytest.fixture(autouse=True)
def no_default_config(monkeypatch, tmp_path) -> Path:
    """Replaces the path of accelerate's default config, which a user may have written with `accelerate config`."""
    path = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
    return path


def test_the_requested_number_is_the_launchers_world_size(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    number, where = find_requested_processes()
    assert number == 4
    assert "WORLD_SIZE" in where


def test_without_a_launcher_no_number_is_requested(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert find_requested_processes() is None


@pytest.mark.parametrize(
    "argv",
    [
        ["--num_processes", "2", RECIPE],
        ["--num_processes=2", RECIPE],
        ["--num-processes", "2", RECIPE],
        ["--cpu", "--num_processes", "2", RECIPE, "--beta", "0.5"],
        ["--num_processes", "2", "-m", "recipes.dpo_gpt2"],
    ],
    ids=" ".join,
)
def test_a_number_on_accelerates_command_line_is_read(argv):
    assert _read_accelerate_command(argv) == (2, "accelerate launch --num_processes 2")


def test_a_number_in_accelerates_config_file_is_read(tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    number, where = _read_accelerate_command(["--config_file", str(config), RECIPE])
    assert number == 2
    assert str(config) in where


def test_the_command_line_is_stronger_than_the_config_file(tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text("num_processes: 2\n")
    argv = ["--config_file", str(config), "--num_processes", "3", RECIPE]
    assert _read_accelerate_command(argv) == (3, "accelerate launch --num_processes 3")


def test_a_number_in_the_users_default_config_is_read(no_default_config):
    no_default_config.write_text("num_processes: 8\n")
    number, where = _read_accelerate_command([RECIPE])
    assert number == 8
    assert str(no_default_config) in where


@pytest.mark.parametrize("text", ["", "distributed_type: 'NO'\n"])
def test_a_config_file_without_a_number_asks_for_none(text, tmp_path):
    config = tmp_path / "plain.yaml"
    config.write_text(text)
    assert _read_accelerate_command(["--config_file", str(config), RECIPE]) is None


@pytest.mark.parametrize(
    "argv", [[RECIPE], ["--cpu", RECIPE], [RECIPE, "--num_processes", "4"], ["--config_file", "none.yaml", RECIPE]]
)
def test_a_command_without_a_number_asks_for_none(argv):
    assert _read_accelerate_command(argv) is None


def test_the_projects_own_configs_ask_for_what_they_say():
    for name, number in (("ddp_cpu", 2), ("single_gpu", 1)):
        config = str(ROOT / "accelerate_configs" / f"{name}.yaml")
        assert _read_accelerate_command(["--config_file", config, RECIPE])[0] == number


def test_a_single_process_launcher_is_found_by_its_command_line(tmp_path):
    """The real launcher: it starts one process and exports no WORLD_SIZE; only its command line has the number."""
    script = tmp_path / "show.py"
    script.write_text(
        "from dpokit.distributed.processes import find_requested_processes as find\nprint('asked', find())\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert "asked (2, 'accelerate launch --num_processes 2')" in done.stdout


def test_one_process_is_accepted_if_one_or_none_is_requested(monkeypatch):
    assert check_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert check_world_size() == 1


def test_fewer_processes_than_requested_are_refused(monkeypatch):
    PartialState()  # has one process: it is built before the environment says two
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MachineError, match=r"2 processes were asked for .* but 1 is training") as error:
        check_world_size()
    assert "ddp_cpu.yaml" in error.value.do
    assert "--num_processes 1" in error.value.do


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(MachineError, match="4 processes were started on this machine, which has 2 GPUs") as error:
        check_devices()
    assert "--num_processes 2" in error.value.do
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_devices()


@pytest.mark.parametrize(("rank", "is_main"), [(None, True), ("0", True), ("1", False)])
def test_rank_0_and_a_process_without_a_rank_are_main(rank, is_main, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is is_main
