"""What is planned: a recipe's settings, for the devices of the plan and not for the machine that makes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpokit.errors import SettingsError
from dpokit.model.reference import decide_reference
from dpokit.plan.target import Target, find_target, parse_gpus
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.layers import find_recipe, read_defaults
from dpokit.settings.load import Settings, load_settings, read_layers


@dataclass(frozen=True)
class Asked:
    """A recipe with its settings and the devices it is planned for.

    Attributes:
        recipe: the recipe's file.
        defaults: its `DEFAULTS`.
        flags: the flags given over them.
        settings: all layers together.
        target: the devices.
        autocast: the type of mixed precision's products; None without mixed precision.
    """

    recipe: Path
    defaults: dict[str, Any]
    flags: tuple[str, ...]
    settings: Settings
    target: Target
    autocast: torch.dtype | None


def load_asked(recipe: str, flags: Sequence[str], gpus: str | None) -> Asked:
    """Recipe, flags and devices, checked as a run checks them.

    Args:
        recipe: a file, or the name of one in `recipes/`.
        flags: training flags, over the recipe's.
        gpus: `8x80`, or None for this machine's own.

    Raises:
        SettingsError: an unknown recipe, a wrong flag, or `--gpus` that say nothing.
        MachineError: a precision that this machine lacks, where the plan is for this machine.
    """
    path = find_recipe(recipe)
    defaults = read_defaults(path)
    given = None if gpus is None else parse_gpus(gpus)
    asked = _find_asked(path, defaults, flags)
    target = given or find_target(on_cpu=bool(asked.get("use_cpu")))
    if given is not None and asked.get("use_cpu"):
        raise SettingsError(
            "use_cpu is set, and --gpus asks for a plan for GPUs", expected="one of them", do="leave out either"
        )
    if target.kind == "CPU":
        settings = load_settings(str(path), defaults, flags)
    else:
        # Built as for the CPU, which every machine has: DPOConfig refuses GPU settings where there is no GPU.
        built = load_settings(str(path), defaults, [*flags, "--use_cpu", "true", "--bf16", "false", "--fp16", "false"])
        settings = _settings_for_gpus(built, asked)
    settings = decide_reference(settings)
    training = settings.training
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    return Asked(path, defaults, tuple(flags), settings, target, autocast)


def _settings_for_gpus(settings: Settings, asked: Mapping[str, Any]) -> Settings:
    """bf16 is on unless it was said otherwise, as GPUs of today have it."""
    if asked.get("fp16") and asked.get("bf16"):
        raise SettingsError("fp16 and bf16 are both true", expected="one of them", do="--fp16 false or --bf16 false")
    fp16 = bool(asked.get("fp16"))
    bf16 = not fp16 and asked.get("bf16") is not False
    return settings.with_training("the devices of the plan", use_cpu=False, fp16=fp16, bf16=bf16)


def _find_asked(path: Path, defaults: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """What recipe, YAML file and command line say of the machine; the last one wins."""
    _, layers = read_layers(path.stem, defaults, flags)
    return {name: layer[name] for _, layer in layers for name in flags_with(Fact.MACHINE) if name in layer}
