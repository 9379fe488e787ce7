"""Ranks and processes: who am I, how many were asked for, how many are there. Built on accelerate's state."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml
from accelerate import PartialState

from dpokit.errors import DpokitError, MachineError

T = TypeVar("T")


def is_main_process() -> bool:
    """True on the one process of the world that speaks and writes.

    Read from the launcher's environment: it must be right before, and even when, the process group cannot be built.
    """
    return int(os.environ.get("RANK", "0")) == 0


def find_asked_processes() -> tuple[int, str] | None:
    """How many processes the launcher was told to start, and where that was said; None without a launcher.

    torchrun and accelerate's multi-process launchers export WORLD_SIZE. Accelerate's single-process launcher exports
    nothing and drops `--num_processes` silently (with `--cpu`, and with `distributed_type: MULTI_CPU`): there, the
    command line of the launcher itself is read.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "WORLD_SIZE, set by the launcher"
    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:
            continue
        for place, word in enumerate(words):
            name = Path(word).name
            if name in ("accelerate-launch", "accelerate.commands.launch"):
                return _read_accelerate_command(words[place + 1 :])
            if name == "accelerate" and words[place + 1 : place + 2] == ["launch"]:
                return _read_accelerate_command(words[place + 2 :])
    return None


def _read_accelerate_command(words: list[str]) -> tuple[int, str] | None:
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    asked, _ = launch_command_parser().parse_known_args(words)
    if asked.num_processes is not None:
        return asked.num_processes, f"accelerate launch --num_processes {asked.num_processes}"
    config_file = asked.config_file or default_config_file
    if not Path(config_file).is_file():
        return None
    with open(config_file) as file:
        number = (yaml.safe_load(file) or {}).get("num_processes")
    return (int(number), f"num_processes: {number} in {config_file}") if number is not None else None


def check_world_size() -> int:
    """The number of processes that train together.

    Raises:
        MachineError: it is not the number that was asked for; each process would train the same thing alone.
    """
    size = PartialState().num_processes
    asked = find_asked_processes()
    if asked is not None and asked[0] != size:
        raise MachineError(
            f"{asked[0]} processes were asked for ({asked[1]}), but {size} is training"
            if size == 1
            else f"{asked[0]} processes were asked for ({asked[1]}), but {size} are training",
            expected="every process that was started to take its share of one run",
            do="on CPU: accelerate launch --config_file accelerate_configs/ddp_cpu.yaml (accelerate runs a single "
            "process with --cpu and with MULTI_CPU); on GPUs: --config_file accelerate_configs/ddp.yaml; "
            "for one process: --num_processes 1",
        )
    return size


def decide_on_main_process(decide: Callable[[], T]) -> T:
    """Rank 0 decides; every rank gets its answer (any picklable object), or raises its DpokitError."""
    answer, error = _try_on_main_process(decide)
    answer, error = _broadcast((answer, error))
    if error is not None:
        raise error
    return answer


def main_process_first(build: Callable[[], T]) -> T:
    """What `build` returns, on every rank: rank 0 builds first, and the others find its cached files.

    An error of rank 0 is raised on every rank, so that none waits for a rank that is gone.
    """
    result, error = _try_on_main_process(build)
    error = _broadcast(error)
    if error is not None:
        raise error
    return result if is_main_process() else build()


def _try_on_main_process(call: Callable[[], T]) -> tuple[Any, DpokitError | None]:
    if not is_main_process():
        return None, None
    try:
        return call(), None
    except DpokitError as error:
        return None, error


def _broadcast(value: Any) -> Any:
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]
