"""The threads of a run on CPU: each process takes its share of the cores, unless the user set a number.

The launchers set OMP_NUM_THREADS to 1 where the user did not: torchrun for several processes, accelerate also for one
process. The other cores would be idle. More threads than cores are slower: at the end of each operation a thread spins
until the others have had their turn (docs/LOG.md, 2026-11-29).
"""

import math
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from dpokit.distributed.processes import find_launcher

ROOT = Path("/")
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
FLAG = "--num_cpu_threads_per_process"  # of accelerate launch, which exports it as OMP_NUM_THREADS


@dataclass(frozen=True)
class CpuLimits:
    """The cores that one process may use.

    Attributes:
        machine: an id of the machine; processes with the same id share its cores.
        cores: the names of the physical cores on which the system runs the process.
        cpus: most CPUs that its cgroup grants; infinite without a quota.
        task: the number of the Slurm task that the process belongs to; "" outside of Slurm.
        task_cpus: CPUs that Slurm gives the task; infinite if the job names no number.
    """

    machine: str
    cores: tuple[str, ...]
    cpus: float = math.inf
    task: str = ""
    task_cpus: float = math.inf


def share_cores(limits: CpuLimits, processes: Sequence[CpuLimits]) -> int:
    """The number of threads for a process: at least 1.

    Args:
        limits: those of this process.
        processes: the limits of all processes of the run, this one included; those on other machines do not count.
    """
    neighbours = [neighbour for neighbour in processes if neighbour.machine == limits.machine]
    users = Counter(core for neighbour in neighbours for core in neighbour.cores)
    cores = sum(Fraction(1, users[core]) for core in limits.cores)
    in_task = sum(neighbour.task == limits.task for neighbour in neighbours)
    return max(1, int(min(cores, limits.cpus / len(neighbours), limits.task_cpus / in_task)))


def count_cores() -> int:
    """The number of cores that this process may use."""
    limits = read_limits()
    return share_cores(limits, [limits])


def read_limits(root: Path = ROOT) -> CpuLimits:
    """The limits of this process: affinity, cgroups and Slurm. The root is that of /proc and /sys."""
    # In a batch script without srun all processes are in the script's own task, which has the CPUs of all tasks.
    is_in_task = "SLURM_STEP_ID" in os.environ
    task_cpus = os.environ.get("SLURM_CPUS_PER_TASK" if is_in_task else "SLURM_CPUS_ON_NODE", "")
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)  # not on a Mac
    return CpuLimits(
        machine=_read_text(root / "proc/sys/kernel/random/boot_id") or socket.gethostname(),
        cores=tuple(sorted({_find_core(root, cpu) for cpu in cpus})),
        cpus=_read_quota(root),
        task=os.environ.get("SLURM_PROCID", ""),
        task_cpus=int(task_cpus) if task_cpus.isdigit() and int(task_cpus) else math.inf,
    )


def _read_text(path: Path) -> str:
    """The text of a file of /proc or /sys; "" if the system does not have it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _find_core(root: Path, cpu: int) -> str:
    """The physical core of a logical CPU, named by all its logical CPUs; they compute no faster than one of them."""
    return _read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def _read_quota(root: Path) -> float:
    """The CPUs that the cgroups of this process grant, of version 2 or 1; each parent's quota holds as well.

    In a container the path in /proc may be the host's, which the container does not have; its parents then lead to the
    mounted root, which has the container's quota.
    """
    quotas = [math.inf]
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        cgroup = top / path.strip("/")
        for folder in (cgroup, *(parent for parent in cgroup.parents if parent.is_relative_to(top))):
            if controllers:
                quota, period = (_read_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            else:
                quota, _, period = _read_text(folder / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit():  # without a quota it is `max` in version 2 and -1 in version 1
                quotas.append(int(quota) / int(period))
    return min(quotas)


def find_users_number() -> str | None:
    """The variable or flag by which the user set the number of threads; None if the user set none.

    A launcher changes OMP_NUM_THREADS only for the processes that it starts, so its own environment is the user's.
    """
    environment: Mapping[str, str] = os.environ
    arguments: list[str] = []
    launcher = find_launcher()
    if launcher is not None:
        process, arguments = launcher
        with suppress(psutil.Error):
            environment = process.environ()
    numbers = NUMBERS if torch.backends.mkl.is_available() else NUMBERS[:1]
    names = [name for name in numbers if environment.get(name)]
    flags = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    return next(iter(names), FLAG if FLAG.replace("-", "_") in flags else None)


def set_threads() -> str:
    """Gives this process its share of the cores, unless the user set a number; returns a line about it. Collective."""
    limits = read_limits()
    share = share_cores(limits, gather_object([limits]))
    source = find_users_number()
    if source is None:
        torch.set_num_threads(share)
    threads, processes = torch.get_num_threads(), PartialState().num_processes
    return (
        f"CPU: {threads} thread{'s' if threads > 1 else ''}"
        + (f" in each of {processes} processes" if processes > 1 else "")
        + (f" ({source} is set; {share} would use all cores)" if source and share != threads else "")
    )
