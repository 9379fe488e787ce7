"""The devices a plan is made for: given as `8x80`, or those of this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dpokit.errors import SettingsError

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """So many devices of one kind.

    Attributes:
        kind: `GPU`, or `CPU` for this machine's processor and its memory.
        count: devices that train together.
        memory_gib: of each.
        host_gib: memory of the machine that holds them; None where the devices are not here.
        origin: where this comes from, in words.
    """

    kind: str
    count: int
    memory_gib: float
    host_gib: float | None
    origin: str

    def words(self) -> str:
        """`8 GPUs of 80 GiB (--gpus)`."""
        if self.kind == "CPU":
            return f"the CPU with {self.memory_gib:.1f} GiB of memory ({self.origin})"
        return f"{self.count} GPU{'s' * (self.count > 1)} of {self.memory_gib:g} GiB ({self.origin})"


def parse_gpus(text: str) -> Target:
    """`8x80` is 8 GPUs of 80 GiB each; `80` is one. Raises: SettingsError for anything else."""
    found = re.fullmatch(r"\s*(?:(\d+)\s*[xX]\s*)?(\d+(?:\.\d+)?)\s*", text)
    count, memory = (int(found[1] or 1), float(found[2])) if found else (0, 0.0)
    if count < 1 or memory <= 0:
        raise SettingsError(
            f"--gpus {text!r} is no number of GPUs with their memory",
            expected="COUNTxGIB, or GIB for one GPU: 8x80, 1x24, 80",
            do="--gpus 8x80 for eight GPUs of 80 GiB each",
        )
    return Target("GPU", count, memory, None, f"--gpus {text.strip()}")


def find_target(*, on_cpu: bool = False) -> Target:
    """The GPUs of this machine, the smallest one's memory; without one, or asked for it, its processor."""
    host_gib = find_host_bytes() / GIB
    if on_cpu or not torch.cuda.is_available():
        return Target("CPU", 1, host_gib, host_gib, "this machine")
    count = torch.cuda.device_count()
    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return Target("GPU", count, round(smallest / GIB, 1), host_gib, "this machine")


def find_host_bytes() -> int:
    """This machine's memory, or what its control group may take, where that is less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    memory = int(psutil.virtual_memory().total)
    return min(memory, int(text)) if text.isdigit() else memory
