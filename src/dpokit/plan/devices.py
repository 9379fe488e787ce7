"""The devices of a plan: those of `--gpus 8x80`, or those of this machine."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dpokit.errors import SettingsError

GIB = 2**30


@dataclass(frozen=True)
class Devices:
    """A number of equal devices.

    Attributes:
        kind: `GPU`, or `CPU` for this machine's processor and its memory.
        count: how many train together.
        memory_gib: memory of each device.
        host_gib: memory of their machine; None if this machine does not have the devices.
        origin: the source of these numbers, as text.
    """

    kind: str
    count: int
    memory_gib: float
    host_gib: float | None
    origin: str

    def describe(self) -> str:
        """Returns `8 GPUs of 80 GiB (--gpus 8x80)`."""
        if self.kind == "CPU":
            return f"the CPU with {self.memory_gib:.1f} GiB of memory ({self.origin})"
        return f"{self.count} GPU{'s' * (self.count > 1)} of {self.memory_gib:g} GiB ({self.origin})"


def parse_gpus(text: str) -> Devices:
    """Reads `8x80` as 8 GPUs of 80 GiB each, and `80` as one GPU. Raises: SettingsError for anything else."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX]\s*)?(\d+(?:\.\d+)?)\s*", text)
    count, memory = (int(match[1] or 1), float(match[2])) if match else (0, 0.0)
    if count < 1 or memory <= 0:
        raise SettingsError(
            f"--gpus {text!r} is not a number of GPUs with their memory",
            expected="COUNTxGIB, or GIB for one GPU: 8x80, 1x24, 80",
            do="--gpus 8x80 for eight GPUs of 80 GiB each",
        )
    return Devices("GPU", count, memory, None, f"--gpus {text.strip()}")


def find_target(*, on_cpu: bool = False) -> Devices:
    """Returns this machine's GPUs, all with the memory of the smallest; its CPU if it has none or if `on_cpu`."""
    host_gib = find_host_bytes() / GIB
    if on_cpu or not torch.cuda.is_available():
        return Devices("CPU", 1, host_gib, host_gib, "this machine")
    count = torch.cuda.device_count()
    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return Devices("GPU", count, round(smallest / GIB, 1), host_gib, "this machine")


def find_host_bytes() -> int:
    """Returns the memory of this machine, or the limit of its control group if that is lower."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    memory = int(psutil.virtual_memory().total)
    return min(memory, int(text)) if text.isdigit() else memory
