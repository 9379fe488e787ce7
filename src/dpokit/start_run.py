"""`dpokit train`: the command that starts a run. No torch."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpokit.interpreter import PYTHON
from dpokit.run_names import check_file_name
from dpokit.settings.layers import read_yaml

# The settings of a placement that say no more than: one process on this machine.
ONE_PROCESS = {
    "compute_environment": ("LOCAL_MACHINE",),
    "distributed_type": ("NO", False),  # YAML reads an unquoted NO as false
    "num_processes": (1,),
    "num_machines": (1,),
    "machine_rank": (0,),
}
# Files by which Linux shows GPUs: NVIDIA's, AMD's, Intel's and those of WSL.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/dxg")


def build_run_command(recipe: Path, flags: Sequence[str], config_file: Path | None) -> list[str]:
    """The command of a run: `accelerate launch`, or the recipe itself for one process, which needs no launcher.

    Args:
        recipe: the recipe's file.
        flags: the training flags.
        config_file: the file of a placement; None for accelerate's default.

    Raises: SettingsError if the file of the placement cannot be read.
    """
    if config_file is None:
        is_one_process = not (has_gpu() or has_default_configuration(os.environ))
        placement = []
    else:
        check_file_name(config_file, "--config-file")
        settings = read_yaml(str(config_file), "--config-file")
        is_one_process = all(value in ONE_PROCESS.get(name, ()) for name, value in settings.items())
        placement = ["--config_file", str(config_file)]
    if is_one_process:
        return [sys.executable, str(recipe), *flags]
    return [*PYTHON, "-m", "dpokit.launcher", *placement, str(recipe), *flags]


def has_gpu() -> bool:
    """Whether this machine may have GPUs, for which accelerate decides the number of processes."""
    return any(Path(device).exists() for device in GPU_DEVICES)


def has_default_configuration(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate config` has written a file, which holds without --config_file."""
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(environment.get("HF_HOME") or Path(caches, "huggingface")).expanduser() / "accelerate"
    return any((folder / f"default_config.{ending}").is_file() for ending in ("yaml", "yml", "json"))
