"""Ranks and processes: this process's rank, the requested and the actual number. Built on accelerate's state."""

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

LAUNCHERS = ("accelerate-launch", "accelerate.commands.launch", "dpokit.launcher", "torchrun", "torch.distributed.run")


def is_main_process() -> bool:
    """True on rank 0, which prints and writes files.

    It is read from the launcher's environment, because it is needed before the process group exists, and without it.
    """
    return int(os.environ.get("RANK", "0")) == 0


def find_requested_processes() -> tuple[int, str] | None:
    """The number of processes that the launcher was to start, and its source; None without a launcher.

    torchrun and accelerate's multi-process launchers export WORLD_SIZE. Accelerate's single-process launcher exports
    nothing and drops `--num_processes` silently (with `--cpu`, and with `distributed_type: MULTI_CPU`); then the
    command line of the launcher process is read.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]), "WORLD_SIZE, set by the launcher"
    launcher = find_launcher()
    return None if launcher is None else _read_accelerate_command(launcher[1])


def find_launcher() -> tuple[psutil.Process, list[str]] | None:
    """The launcher that started this process, accelerate's or torchrun, and its arguments; None without one."""
    for parent in psutil.Process().parents():
        try:
            argv = parent.cmdline()
        except psutil.Error:
            continue
        for place, argument in enumerate(argv):
            name = Path(argument).name
            if name in LAUNCHERS:
                return parent, argv[place + 1 :]
            if name == "accelerate" and argv[place + 1 : place + 2] == ["launch"]:
                return parent, argv[place + 2 :]
    return None


def _read_accelerate_command(argv: list[str]) -> tuple[int, str] | None:
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    options, _ = launch_command_parser().parse_known_args(argv)
    if options.num_processes is not None:
        return options.num_processes, f"accelerate launch --num_processes {options.num_processes}"
    config_file = options.config_file or default_config_file
    if not Path(config_file).is_file():
        return None
    with open(config_file) as file:
        number = (yaml.safe_load(file) or {}).get("num_processes")
    return (number, f"num_processes: {number} in {config_file}") if isinstance(number, int) else None


def check_world_size() -> int:
    """The number of processes that train together.

    Raises:
        MachineError: it is not the requested number; each process would train the same thing alone.
    """
    size = PartialState().num_processes
    requested, source = find_requested_processes() or (size, "")
    if requested != size:
        raise MachineError(
            f"{requested} processes were asked for ({source}), but {size} {'is' if size == 1 else 'are'} training",
            expected="every process that was started to take its share of one run",
            do="on CPU: accelerate launch --config_file accelerate_configs/ddp_cpu.yaml (accelerate runs a single "
            "process with --cpu and with MULTI_CPU); on GPUs: --config_file accelerate_configs/ddp.yaml; "
            "for one process: --num_processes 1",
        )
    return size


def find_machine(*, on_cpu: bool) -> dict[str, Any]:
    """The hardware of a run, for run.json: the `device`'s product name and the number of `nodes`; no host name.

    On CPU also the number of `threads` of this process.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = processes // int(os.environ.get("LOCAL_WORLD_SIZE", str(processes)))
    if on_cpu:
        device = f"CPU, {psutil.cpu_count()} cores{_find_processor()}"
        return {"device": device, "nodes": nodes, "threads": torch.get_num_threads()}
    name = getattr(torch.get_device_module(), "get_device_name", None)
    return {"device": str(torch.accelerator.current_accelerator() if name is None else name()), "nodes": nodes}


def _find_processor() -> str:
    """` of ` and the processor's name; "" if Linux reports none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f" of {names[0]}" if names else ""


def check_devices() -> None:
    """Raises MachineError if this machine has GPUs, but fewer than the processes started on it."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if 0 < gpus < processes:
        raise MachineError(
            f"{processes} processes were started on this machine, which has {gpus} GPU{'s' if gpus > 1 else ''}",
            expected="a GPU for each process",
            do=f"accelerate launch --num_processes {gpus}; or --use_cpu, to train on the processor",
        )


def join_world(timeout_seconds: int, *, on_cpu: bool) -> None:
    """Initialises the process group in the two cases where accelerate would not do it right.

    On CPU: over gloo, with `--ddp_timeout`. transformers (5.23) passes this time-out on only for GPUs, and torch's
    default is 30 minutes. DeepSpeed is also set to the CPU. Delete when TrainingArguments passes ddp_timeout on with
    use_cpu.

    After a restart of the workers by `--max_restarts`: with a key prefix for each start. accelerate's launcher keeps
    one store for all starts, and in torch (2.13) each process overwrites its old address there, so the first one to
    connect may try to reach ended processes. Delete when `torch.distributed.rendezvous` separates the starts.
    """
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or "MASTER_ADDR" not in os.environ
    if alone or dist.is_initialized() or not (on_cpu or int(start)):
        return
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(f"start/{start}", store)
    dist.init_process_group("gloo" if on_cpu else None, store=store, rank=rank, world_size=size, timeout=timeout)
