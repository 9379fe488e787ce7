"""Ranks and processes: who am I, how many were asked for, how many are there. Built on accelerate's state."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import yaml
from accelerate import PartialState
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dpokit.errors import MachineError


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


def find_machine(*, on_cpu: bool) -> dict[str, Any]:
    """What a run trains on, for run.json: `device` by its maker's name, and how many `nodes`; no name of a host."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = processes // int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    if on_cpu:
        return {"device": f"CPU, {psutil.cpu_count()} cores{_find_processor()}", "nodes": nodes}
    name = getattr(torch.get_device_module(), "get_device_name", None)
    return {"device": str(torch.accelerator.current_accelerator() if name is None else name()), "nodes": nodes}


def _find_processor() -> str:
    """` of ` and the processor's name, where Linux knows one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f" of {names[0]}" if names else ""


def check_devices() -> None:
    """Raises MachineError where more processes were started on this machine than it has GPUs; none is a CPU run."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if 0 < gpus < processes:
        raise MachineError(
            f"{processes} processes were started on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}",
            expected="a GPU for each process",
            do=f"accelerate launch --num_processes {gpus}; or --use_cpu, to train on the processor",
        )


def join_world(timeout_seconds: int, *, on_cpu: bool) -> None:
    """Joins the launcher's processes where accelerate would join them otherwise than it should.

    On CPU, over gloo, under the collective time-out: transformers hands it on for GPUs alone (5.23), and torch's own is
    30 minutes whatever the flag says. DeepSpeed is kept to the CPU, too. Delete when TrainingArguments passes
    ddp_timeout on with use_cpu.

    Where `--max_restarts` has started the workers again, under keys of this start's own: accelerate's launcher keeps
    one store for all starts, and torch (2.13) writes the new addresses over those of processes that are gone, which
    whoever comes first then tries to reach. Delete when `torch.distributed.rendezvous` tells the starts apart.
    """
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ
    if alone or dist.is_initialized() or not (on_cpu or int(start)):
        return
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    own = PrefixStore(f"start/{start}", store)
    dist.init_process_group("gloo" if on_cpu else None, store=own, rank=rank, world_size=size, timeout=timeout)
