"""The machine of a GPU day, read without torch: its GPU, driver and packages, and what a stage would lack on it."""

import importlib.metadata
import importlib.util
import os
import runpy
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "triton")
PACKAGES += ("pytest", "nvidia-ml-py", "gguf")
BF16_CAPABILITY = 8.0
GIB = 2**30


class LackError(Exception):
    """The machine lacks something that a stage or a case needs; the message says what, and what to do."""


@dataclass(frozen=True)
class Machine:
    """What NVML and the installed packages say.

    Attributes:
        gpu: name of the first visible GPU; empty if there is none.
        trouble: why there is none.
        driver: version of the driver, such as `580.95.05`.
        driver_cuda: the newest CUDA that the driver runs, such as `13.0`; 0 if unknown.
        torch_cuda: the CUDA that torch is built for; empty if it is built without.
        capability: compute capability, such as 9.0.
        total_gib, free_gib: memory of the GPU; of the machine in a dry run.
        versions: versions of the installed packages; the others are missing.
        commit: of the checkout; empty outside of git.
    """

    gpu: str
    trouble: str
    driver: str
    driver_cuda: float
    torch_cuda: str
    capability: float
    total_gib: float
    free_gib: float
    versions: dict[str, str]
    commit: str

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def find_identity(self, *, dry_run: bool) -> dict[str, Any]:
        """What results must have in common to be in one table."""
        names = ("torch", "transformers", "trl")
        return {"gpu": self.gpu, "dry run": dry_run, **{name: self.versions.get(name, "") for name in names}}


class Gpu:
    """The first visible GPU, by NVML. Raises: LackError if there is none, or no driver, or no NVML."""

    def __init__(self) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and visible.partition(",")[0].strip() in ("", "-1"):
            raise LackError(f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it")
        try:
            import pynvml
        except ImportError as error:
            raise LackError("nvidia-ml-py is not installed: pip install nvidia-ml-py") from error
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            first = (visible or "0").partition(",")[0].strip()
            by_index = first.isdecimal()
            find = pynvml.nvmlDeviceGetHandleByIndex if by_index else pynvml.nvmlDeviceGetHandleByUUID
            self.handle = find(int(first) if by_index else first)
        except pynvml.NVMLError as error:
            raise LackError(f"no NVIDIA GPU or no driver ({error}): nvidia-smi must list a GPU") from error

    def describe(self) -> dict[str, Any]:
        memory = self.nvml.nvmlDeviceGetMemoryInfo(self.handle)
        cuda = self.nvml.nvmlSystemGetCudaDriverVersion_v2()  # 13000 is 13.0
        major, minor = self.nvml.nvmlDeviceGetCudaComputeCapability(self.handle)
        return {
            "gpu": self.nvml.nvmlDeviceGetName(self.handle),
            "driver": self.nvml.nvmlSystemGetDriverVersion(),
            "driver_cuda": cuda // 1000 + cuda % 1000 / 100,
            "capability": major + minor / 10,
            "total_gib": memory.total / GIB,
            "free_gib": memory.free / GIB,
        }

    def sample(self) -> dict[str, float]:
        """Watts, GiB in use by all processes, percent of time in use, MHz and degrees Celsius, as in `nvidia-smi`."""
        nvml, handle = self.nvml, self.handle
        return {
            "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gib": nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
            "percent": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "mhz": float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "celsius": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        }


def read_machine(*, dry_run: bool = False, memory_gib: float | None = None) -> Machine:
    """Reads the machine; in a dry run its GPU, if it has one, is left alone.

    Args:
        memory_gib: the most memory that the day may use.
    """
    facts: dict[str, Any] = {"gpu": "", "trouble": "", "driver": "", "driver_cuda": 0.0, "capability": 0.0}
    facts |= {"total_gib": 0.0, "free_gib": 0.0}
    if dry_run:
        import psutil

        memory = psutil.virtual_memory()
        facts |= {"total_gib": memory.total / GIB, "free_gib": memory.available / GIB}
    else:
        try:
            facts |= Gpu().describe()
        except LackError as lack:
            facts["trouble"] = str(lack)
    if memory_gib is not None:
        facts["free_gib"] = min(facts["free_gib"], memory_gib)
    return Machine(**facts, torch_cuda=read_torch_cuda(), versions=read_versions(), commit=read_commit())


def read_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_torch_cuda() -> str:
    """The CUDA that torch is built for, read without the import of torch; empty without torch or without CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return ""
    file = Path(next(iter(spec.submodule_search_locations)), "version.py")
    return str(runpy.run_path(str(file)).get("cuda") or "")


def read_commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def find_lack(
    machine: Machine, *, packages: tuple[str, ...], gib: float, bf16: bool = True, dry_run: bool = False
) -> str | None:
    """Returns what the machine lacks for a stage, and what to do; None if it lacks nothing that is known.

    Args:
        packages: the packages that the stage imports.
        gib: the free memory that it needs.
        bf16: whether it computes in bf16 on the GPU.
    """
    missing = [name for name in packages if name not in machine.versions]
    if missing:
        return f"not installed: {', '.join(missing)}; tests/gpu/pack.sh packs them on a machine with a network"
    if not dry_run:
        if machine.trouble:
            return machine.trouble
        if not machine.torch_cuda:
            return f"torch {machine.versions['torch']} is built without CUDA: install a build with CUDA"
        if machine.driver_cuda and int(machine.driver_cuda) < int(machine.torch_cuda.partition(".")[0]):
            return (
                f"driver {machine.driver} is too old: it runs CUDA up to {machine.driver_cuda:.1f}, and torch is built "
                f"for CUDA {machine.torch_cuda}; install a newer driver, or torch for CUDA {int(machine.driver_cuda)}"
            )
        if bf16 and machine.capability < BF16_CAPABILITY:
            return f"bf16 needs compute capability 8.0, and {machine.gpu} has {machine.capability:.1f}"
    if machine.free_gib < gib:
        return (
            f"{gib:.2f} GiB of free memory, and there are {machine.free_gib:.2f} of {machine.total_gib:.1f}; "
            "end the programs that hold it"
        )
    return None
