"""Ranks and processes: who am I, how many were asked for, how many are there. Built on accelerate's state."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
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
    return (number, f"num_processes: {number} in {config_file}") if isinstance(number, int) else None


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


def check_devices() -> None:
    """Raises MachineError where more processes were started on this machine than it has GPUs; none is a CPU run."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if 0 < gpus < processes:
        raise MachineError(
            f"{processes} processes were started on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}",
            expected="a GPU for each process",
            do=f"accelerate launch --num_processes {gpus}; or --use_cpu, to train on the processor",
        )


def join_on_cpu(timeout_seconds: int) -> None:
    """Joins the launcher's CPU processes over gloo, under the collective time-out; DeepSpeed is kept to the CPU too.

    transformers hands the time-out on for GPUs alone (5.23); torch's own, on CPU, is 30 minutes whatever the flag says.
    Delete when TrainingArguments passes ddp_timeout on with use_cpu.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))


def speaks_for_all() -> bool:
    """Whether this process shows an error that ended its run: the first of the world that asks does.

    Other ranks have met the same, or a consequence of it. Before the world is joined, one process per machine speaks.
    """
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        return bool(store.add("dpokit/errors_shown", 1) == 1)
    except RuntimeError:  # the store went down with the process that kept it
        return True


# What gloo, NCCL and the rendezvous say when another process is gone, cannot be reached or does not answer.
_LOST = re.compile(
    "timed out|timeout|connection (closed|reset) by peer|connection refused|address already in use", re.I
)


@contextmanager
def peer_errors(timeout_seconds: int) -> Iterator[None]:
    """Turns what gloo, NCCL or the rendezvous raise when another process is gone or silent into a MachineError.

    Args:
        timeout_seconds: the collective time-out in force (`--ddp_timeout`), for the message.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        of_torch = isinstance(error, dist.DistError) or re.search("gloo|pair closure", text)
        if not of_torch or not _LOST.search(text):
            raise
        raise _lost_peer(text[:200], timeout_seconds) from error


def _lost_peer(text: str, timeout_seconds: int) -> MachineError:
    rank = os.environ.get("RANK", "0")
    if not dist.is_initialized():
        master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return MachineError(
            f"rank {rank} could not join the other processes at {master} within {timeout_seconds} s: {text}",
            expected="a first process (rank 0) that listens there, and a network that lets it be reached",
            do="check the address and the port (--main_process_ip, --main_process_port), and that rank 0 was started",
        )
    return MachineError(
        f"rank {rank} lost another process, or waited {timeout_seconds} s for it in vain: {text}",
        expected="every process to take part in every step",
        do="look for the first error above, on any rank or machine (killed? out of memory?); where a process only "
        "needed longer, raise --ddp_timeout",
    )


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
