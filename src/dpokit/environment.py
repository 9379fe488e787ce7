"""The environment of dpokit, for a report of a bug: versions, hardware and launcher variables, without secrets.

Every part may fail, because a broken installation is what such a report is about; the part then shows its error.
"""

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

from dpokit.credentials import HIDDEN, SECRET_VARIABLE, hide_secrets

# Beginnings of the names of variables that change a launch or a run.
VARIABLES = re.compile(
    r"(ACCELERATE|CUDA|DEEPSPEED|DPOKIT|DS|FSDP|GLOO|GOMP|HF|HIP|HSA|KMP|MALLOC|MKL|NCCL|OMP|PET|PYTORCH|ROCR|TOKENIZERS|"
    r"TORCH|TORCHELASTIC|TORCHINDUCTOR|TQDM|TRANSFORMERS|TRITON|TRL|XPU)_"
    r"|(CONDA_PREFIX|GROUP_RANK|LD_LIBRARY_PATH|LD_PRELOAD|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PYTHONPATH|"
    r"RANK|VIRTUAL_ENV|WANDB_MODE|WORLD_SIZE|XDG_CACHE_HOME)$"
    r"|SLURM_(CPUS_ON_NODE|CPUS_PER_TASK|GPUS_ON_NODE|NNODES|NODEID|NTASKS|PROCID|RESTART_COUNT|STEP_ID)$"
)


def collect_environment() -> dict[str, Any]:
    """Names and JSON values of all parts; texts have no secret, and `~` and `USER` in place of the user's names."""
    parts: dict[str, Callable[[], Any]] = {
        "dpokit": lambda: version("dpokit"),
        "python": lambda: f"{platform.python_version()} ({platform.python_implementation()}), {_find_installer()}",
        "system": _describe_system,
        "processor": _describe_processor,
        "torch": _describe_torch,
        "GPUs": _list_gpus,
        "packages": list_packages,
        "accelerate's default configuration": _find_default_configuration,
        "variables": lambda: list_variables(os.environ),
    }
    record: dict[str, Any] = {}
    for name, find in parts.items():
        try:
            value = find()
        except Exception as error:
            value = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        record[name] = _hide(value)
    return record


def describe_environment(record: Mapping[str, Any]) -> str:
    """The record as lines of text."""
    lines = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            lines += [f"{name}:", *(f"  {key:<24} {text}" for key, text in value.items())]
        elif isinstance(value, list):
            lines += [f"{name}: {'; '.join(map(str, value)) or 'none'}"]
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


def list_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change a launch or a run; `***` for the value of one that is a secret by its name."""
    return {
        name: HIDDEN if SECRET_VARIABLE.search(name) else value
        for name, value in sorted(environment.items())
        if VARIABLES.match(name) or (name.startswith(("WANDB_", "OPENAI_")) and SECRET_VARIABLE.search(name))
    }


def list_packages() -> dict[str, str]:
    """The version of each package that dpokit or one of its extras needs."""
    names = {}
    for requirement in requires("dpokit") or ():
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if "extra == 'dev'" not in requirement.replace('"', "'") and name != "dpokit":
            names[name] = "not installed" if "extra ==" in requirement else "missing"
    for name in names:
        try:
            names[name] = version(name)
        except PackageNotFoundError:
            continue
    return dict(sorted(names.items()))


def _hide(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _hide(text) for name, text in value.items()}
    if isinstance(value, list):
        return [_hide(text) for text in value]
    return hide_user(hide_secrets(str(value)), home=str(Path.home()), user=Path.home().name)


def hide_user(text: str, *, home: str, user: str) -> str:
    """The text with `~` for the home folder, and `USER` for a folder of the user's name elsewhere."""
    if len(home) > 1:
        text = re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", text)
    return re.sub(rf"(?<=/){re.escape(user)}(?![\w.-])", "USER", text) if user else text


def _find_installer() -> str:
    """How Python is installed: conda, a virtual environment, or the system."""
    if Path(sys.prefix, "conda-meta").is_dir():
        return "conda"
    return "virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"


def _describe_system() -> str:
    libc = " ".join(platform.libc_ver()).strip()
    release = platform.release()
    wsl = ", WSL" if "microsoft" in release.lower() else ""
    return f"{platform.system()} {release} {platform.machine()}{wsl}" + (f", {libc}" if libc else "")


def _describe_processor() -> str:
    from dpokit.distributed.cores import count_cores

    gib = psutil.virtual_memory().total / 2**30
    return f"{count_cores()} cores for this process, {psutil.cpu_count()} logical CPUs, {gib:.0f} GiB memory"


def _describe_torch() -> str:
    torch = import_module("torch")
    build = torch.version.cuda and f"CUDA {torch.version.cuda}"
    build = build or (torch.version.hip and f"ROCm {torch.version.hip}") or "no CUDA and no ROCm"
    return f"{torch.__version__}, built for {build}"


def _list_gpus() -> list[str]:
    torch = import_module("torch")
    if torch.cuda.is_available():
        gpus = []
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            capability = f"{properties.major}.{properties.minor}"
            gpus.append(
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}"
            )
        return gpus
    return [str(torch.accelerator.current_accelerator())] if torch.accelerator.is_available() else []


def _find_default_configuration() -> str:
    """The file that `accelerate launch` reads without --config_file; it is made by `accelerate config`."""
    from accelerate.commands.config.config_args import default_config_file

    return default_config_file if Path(default_config_file).is_file() else "none"
