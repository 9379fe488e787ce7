"""Collective work of processes: one builds before the others, and a lost process is reported."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import find_free_port
from torch import OutOfMemoryError
from torch.distributed import DistNetworkError

from dpokit.distributed.coordination import build_on_each_machine_first, decide_on_main_process, peer_errors
from dpokit.errors import DataError, MachineError

build_first = partial(build_on_each_machine_first, timeout_seconds=60)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26770"),
        RuntimeError("Application timeout caused pair closure"),
        DistNetworkError("The client socket has timed out after 5000ms while trying to connect to (host, 29500)"),
    ],
)
def test_a_lost_process_is_the_users_error(error):
    with pytest.raises(MachineError, match=r"127.0.0.1|pair closure|timed out"), peer_errors(5):
        raise error


@pytest.mark.parametrize("text", ["DataLoader timed out after 5 seconds", "gloo: unsupported dtype"])
def test_another_error_is_not_changed(text):
    with pytest.raises(RuntimeError, match=text), peer_errors(5):
        raise RuntimeError(text)


@pytest.mark.parametrize("ask", [decide_on_main_process, build_first])
def test_one_process_gets_its_own_result_or_error(ask):
    answers = []

    def answer() -> Path:
        answers.append(Path("run/checkpoint-3"))
        return answers[-1]

    def refuse() -> Path:
        raise DataError("a hole", expected="a row", do="fill it")

    assert ask(answer) == Path("run/checkpoint-3")
    assert len(answers) == 1, "the work is done once"
    with pytest.raises(DataError, match="a hole") as error:
        ask(refuse)
    assert error.value.do == "fill it"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_memory_that_runs_out_is_one_message_with_rank_and_step(error, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    message = "rank 3 ran out of memory at step 7"
    with pytest.raises(MachineError, match=message) as raised, peer_errors(5, lambda: " at step 7"):
        raise error
    assert "--per_device_train_batch_size" in raised.value.do


# Each rank prints when it begins to build and when it is done; the collective time-out is 3 s. The ranks wait for each
# other before it is in force, because imports may take one of them longer, and at the end, because rank 0 hosts the
# store that rank 1 still reads. Tests that start it run alone, so that no other test delays a rank by 3 s.
BUILDER = """
import os, sys, time
from pathlib import Path
from accelerate import PartialState
from dpokit.errors import DataError, DpokitError
from dpokit.distributed.coordination import build_on_each_machine_first, peer_errors
from dpokit.distributed.processes import join_world

def meet(where, seconds):
    signs = [Path(__file__).with_name(f"{where}-{rank}") for rank in (0, 1)]
    signs[int(os.environ["RANK"])].touch()
    end = time.monotonic() + seconds
    while not all(sign.exists() for sign in signs) and time.monotonic() < end:
        time.sleep(0.02)

meet("ready", 100)
join_world(3, on_cpu=True)
rank = PartialState(cpu=True).process_index

def build():
    print("builds", flush=True)
    time.sleep(float(sys.argv[1]))
    if sys.argv[2] == str(rank):
        raise DataError("a hole", expected="a row", do="fill it")
    print("built", flush=True)
    return rank

try:
    with peer_errors(3):
        print("has", build_on_each_machine_first(build, timeout_seconds=3), flush=True)
except DpokitError as error:
    print(type(error).__name__, error.seen, flush=True)
meet("done", 3)
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts one of two ranks, which builds for `seconds`; `fails` is the rank whose build raises an error."""
    script, port, begun = tmp_path / "builder.py", find_free_port(), []
    script.write_text(BUILDER)

    def start_rank(rank: int, local_rank: int, seconds: float, fails: int | None = None) -> subprocess.Popen:
        places = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in places.items()}
        command = [sys.executable, str(script), str(seconds), str(fails)]
        begun.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return begun[-1]

    yield start_rank
    for process in begun:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen) -> str:
    """The next line of the script; gloo of torch 2.10 writes lines of its own to the same place."""
    return next(line for line in process.stdout if not line.startswith("[Gloo]"))


def lines_of(process: subprocess.Popen) -> list[str]:
    return [line for line in process.communicate(timeout=120)[0].splitlines() if not line.startswith("[Gloo]")]


@pytest.mark.alone
def test_a_build_may_take_longer_than_the_collective_timeout(start):
    first, second = start(0, 0, 7), start(1, 1, 0)
    assert next_line(first) == "builds\n"
    time.sleep(5)
    assert second.poll() is None
    assert lines_of(first) == ["built", "has 0"]
    assert lines_of(second) == ["builds", "built", "has 1"]


@pytest.mark.alone
def test_each_machine_builds_by_itself(start):
    first, second = start(0, 0, 2), start(1, 0, 2)
    began = [next_line(process) for process in (first, second)]
    assert began == ["builds\n", "builds\n"]
    assert first.poll() is None
    assert [lines_of(process)[-1] for process in (first, second)] == ["has 0", "has 1"]


@pytest.mark.alone
@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_any_machine_is_raised_on_every_rank(start, fails):
    processes = [start(rank, 0, 0.5, fails) for rank in (0, 1)]
    assert [lines_of(process)[-1] for process in processes] == ["DataError a hole"] * 2


@pytest.mark.alone
@pytest.mark.parametrize("sign", [signal.SIGSTOP, signal.SIGKILL])
def test_a_silent_builder_is_given_up_after_the_time_out(start, sign):
    first, second = start(0, 0, 0), start(1, 0, 600)
    assert next_line(second) == "builds\n"
    second.send_signal(sign)
    lost = "rank 0 lost rank 1, which ended or did not respond within 3 s: rank 1 gave no sign of life"
    assert lost in lines_of(first)[-1]
