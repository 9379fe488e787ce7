"""The request of a plan: a recipe's settings for the devices of the plan, which this machine need not have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpokit.errors import SettingsError
from dpokit.model.reference import decide_reference
from dpokit.plan.devices import Devices, find_target, parse_gpus
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.layers import find_recipe, read_defaults
from dpokit.settings.load import Settings, load_settings, read_layers


@dataclass(frozen=True)
class PlanRequest:
    """A recipe, its settings and the devices of a plan.

    Attributes:
        recipe: the recipe's file.
        defaults: the recipe's `DEFAULTS`.
        flags: the flags of the command line.
        settings: recipe, YAML file and flags merged.
        devices: the devices.
        autocast: the compute dtype of mixed precision; None without mixed precision.
    """

    recipe: Path
    defaults: dict[str, Any]
    flags: tuple[str, ...]
    settings: Settings
    devices: Devices
    autocast: torch.dtype | None


def load_request(recipe: str, flags: Sequence[str], gpus: str | None) -> PlanRequest:
    """Reads recipe, flags and devices, and checks them as a run does.

    Args:
        recipe: a file, or the name of a recipe in `recipes/`.
        flags: training flags, which override the recipe.
        gpus: `8x80`, or None for the devices of this machine.

    Raises:
        SettingsError: an unknown recipe, a wrong flag, or a wrong `--gpus`.
        MachineError: the plan is for this machine, which lacks the precision.
    """
    path = find_recipe(recipe)
    defaults = read_defaults(path)
    named_gpus = None if gpus is None else parse_gpus(gpus)
    machine_flags = _read_machine_flags(path, defaults, flags)
    devices = named_gpus or find_target(on_cpu=bool(machine_flags.get("use_cpu")))
    if named_gpus is not None and machine_flags.get("use_cpu"):
        raise SettingsError("use_cpu is set, but --gpus plans for GPUs", expected="one of the two", do="leave one out")
    if devices.kind == "CPU":
        settings = load_settings(str(path), defaults, flags)
    else:
        # Built for the CPU, which every machine has: without a GPU, DPOConfig refuses GPU settings.
        built = load_settings(str(path), defaults, [*flags, "--use_cpu", "true", "--bf16", "false", "--fp16", "false"])
        settings = _settings_for_gpus(built, machine_flags)
    settings = decide_reference(settings)
    training = settings.training
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    return PlanRequest(path, defaults, tuple(flags), settings, devices, autocast)


def _settings_for_gpus(settings: Settings, machine_flags: Mapping[str, Any]) -> Settings:
    """Returns the settings for GPUs: with bf16, which current GPUs support, unless a flag says otherwise."""
    if machine_flags.get("fp16") and machine_flags.get("bf16"):
        raise SettingsError("fp16 and bf16 are both true", expected="one of them", do="--fp16 false or --bf16 false")
    fp16 = bool(machine_flags.get("fp16"))
    bf16 = not fp16 and machine_flags.get("bf16") is not False
    return settings.with_training("the devices of the plan", use_cpu=False, fp16=fp16, bf16=bf16)


def _read_machine_flags(path: Path, defaults: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """Flags that concern the machine, from recipe, YAML file and command line; a later layer overrides."""
    _, layers = read_layers(path.stem, defaults, flags)
    return {name: layer[name] for _, layer in layers for name in flags_with(Fact.MACHINE) if name in layer}
