"""If a process dies, hangs or cannot be reached, the run ends with one message within --ddp_timeout."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, find_free_port
from test_launch import TWO, launch

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # the time-out is 5 s: both ranks must start at the same time
RECIPE = str(ROOT / "recipes" / "dpo_gpt2.py")
PATIENCE_SECONDS = 120  # the tests' own time-out, for imports on a busy machine


@pytest.fixture
def port() -> int:
    """A port that nothing listens on."""
    return find_free_port()


@pytest.fixture
def flags(tiny_gpt2, pairs_file, tmp_path) -> list[str]:
    return [
        *("--model_name_or_path", str(tiny_gpt2), "--dataset_name", str(pairs_file), "--eval_fraction", "0.2"),
        *("--output_dir", str(tmp_path / "run"), "--max_length", "96", "--num_train_epochs", "500", "--use_cpu"),
        *("--logging_steps", "1", "--ddp_timeout", "5", "--eval_strategy", "no", "--load_best_model_at_end", "false"),
    ]


@pytest.fixture
def start(port, flags) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts one rank of two, as a scheduler would, without a launcher that monitors it."""
    begun: list[subprocess.Popen] = []

    def start_rank(rank: int, local_rank: int | None = None) -> subprocess.Popen:
        local_rank = rank if local_rank is None else local_rank
        places = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}
        command = [sys.executable, RECIPE, *flags]
        begun.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield start_rank
    for process in begun:
        process.kill()
        process.communicate()


def wait_until_training(folder: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < end, "the run did not begin"
        time.sleep(0.1)


def read_one_message(process: subprocess.Popen, kind: str) -> str:
    _, text = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert "Traceback" not in text
    (message,) = re.findall(rf"^{kind}: .*(?:\n  .*)*", text, re.M)
    return message


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_lost_rank_ends_the_other_with_one_message(sign, start, tmp_path):
    first, second = start(0), start(1)
    wait_until_training(tmp_path / "run")
    second.send_signal(sign)
    message = read_one_message(first, "MachineError")
    assert re.search(r"rank 0 lost rank 1 at step \d+, which ended or did not respond within 5 s", message)
    assert "--ddp_timeout" in message
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["state"] == "failed"
    assert record["why"] in message


def test_a_lost_first_rank_ends_the_others(start, tmp_path):
    first, second = start(0), start(1)
    wait_until_training(tmp_path / "run")
    first.kill()
    assert "rank 1 lost rank 0 at step" in read_one_message(second, "MachineError")


def test_a_rank_that_never_joins_is_an_error_after_the_timeout(start, port, tmp_path):
    message = read_one_message(start(0), "MachineError")
    assert f"rank 0 could not join the other processes at 127.0.0.1:{port} within 5 s" in message
    assert not (tmp_path / "run").exists()


def test_a_master_that_cannot_be_reached_is_named(start, port, tmp_path):
    message = read_one_message(start(1, local_rank=0), "MachineError")
    assert f"rank 1 could not join the other processes at 127.0.0.1:{port} within 5 s" in message
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_in_use_is_named(start, port, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        message = read_one_message(start(0), "MachineError")
    assert str(port) in message
    assert "--main_process_port" in message
    assert not (tmp_path / "run").exists()


def test_a_local_launcher_replaces_a_port_that_is_in_use(port, flags):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        done = launch([*TWO, "--main_process_port", str(port)], *flags, "--max_steps", "1")
    assert done.returncode == 0
    assert "2 CPU processes, DDP" in done.stderr


def test_a_worker_that_dies_at_start_ends_the_launcher(flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", *TWO, RECIPE, *flags]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + PATIENCE_SECONDS
    workers: dict[str, psutil.Process] = {}
    while len(workers) < 2:
        assert time.monotonic() < end
        for child in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error):  # a short-lived child of the launcher may have ended
                workers[child.environ().get("RANK", "")] = child
        workers.pop("", None)
    workers["1"].kill()
    launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode != 0
    assert not any(worker.is_running() for worker in workers.values())


def test_a_run_of_several_says_how_long_it_waits(flags):
    done = launch(TWO, *flags, "--max_steps", "1")
    assert done.returncode == 0
    assert done.stderr.count("a process waits at most 5 s for the others (--ddp_timeout)") == 1
