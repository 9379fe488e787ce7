"""`--help` of a recipe: its most used flags by group, each with its value and where that comes from. No torch."""

import ast
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from dpokit.settings.flag_help import GROUPS, HELP, find_default, is_shown
from dpokit.settings.layers import parse_yaml, read_yaml
from dpokit.settings.yielding import yield_defaults

LEFT, ORIGIN = 34, 8  # columns of a flag with its value, and of the value's origin
BY_MACHINE = ("use_cpu", "bf16")  # unless set; as `load.find_machine_settings`, which needs torch
LEAST_WIDTH, MOST_WIDTH = 80, 120


def render_help(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str], *, width: int | None = None) -> str:
    """The page of `--help`.

    Args:
        recipe: the recipe's file.
        defaults: the recipe's `DEFAULTS`.
        argv: the command line; its other flags are also values in force.
        width: in columns; None for the terminal's.

    Raises: SettingsError if the file of `--config` cannot be read.
    """
    kind = "sft" if defaults.get("kind") == "sft" else "dpo"
    values, origins = find_values_in_force(defaults, argv)
    width = min(MOST_WIDTH, max(LEAST_WIDTH, width or shutil.get_terminal_size().columns))
    description = textwrap.wrap(read_first_line(recipe), width)
    lines = [
        f"accelerate launch [--config_file PLACEMENT.yaml] {min(recipe, os.path.relpath(recipe), key=len)}",
        "    [--config FILE.yaml] [--flag value ...]",
        "",
        *([*description, ""] if description else []),
        *textwrap.wrap(
            "Each flag has its value and where the value comes from: the recipe, a file (--config), a flag, dpokit or "
            "TRL. --help-all shows every flag; docs/settings.md explains them.",
            width,
        ),
    ]
    for group, rows in GROUPS.items():
        shown = {name: row for name, row in rows.items() if is_shown(name, kind)}
        lines += ["", group]
        for name, row in shown.items():
            value = values.get(name, find_default(name, kind))
            origin = origins.get(name, "" if value is None else "dpokit" if row.is_own else "TRL")
            if name in BY_MACHINE and values.get(name) is None:
                value, origin = "by machine", "dpokit"
            lines += _render_row(name, format_value(value), origin, row.text, width)
    return "\n".join(lines)


def _render_row(name: str, value: str, origin: str, text: str, width: int) -> list[str]:
    flag = f"  --{name} {value}".rstrip()
    left = [flag] if len(flag) < LEFT else [f"  --{name}", *(f"    {part}" for part in textwrap.wrap(value, LEFT - 6))]
    right = textwrap.wrap(text, width - LEFT - ORIGIN, break_long_words=False)
    rows = zip_longest(left, [origin], right, fillvalue="")
    return [f"{first:<{LEFT}}{second:<{ORIGIN}}{third}".rstrip() for first, second, third in rows]


def find_values_in_force(defaults: Mapping[str, Any], argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values that recipe, YAML file and command line set, and the origin of each, as a run would have them.

    Values are read, but not checked: a run does that.

    Raises: SettingsError if the file of `--config` cannot be read.
    """
    flags = read_command_line(argv)
    layers = [("recipe", {name: value for name, value in defaults.items() if name != "kind"})]
    if config := flags.pop("config", None):
        layers.append(("file", read_yaml(str(config), "--config")))
    layers.append(("flag", flags))
    try:
        values, origins, _ = yield_defaults(layers)
    except (TypeError, ValueError, KeyError, AttributeError):  # a value of a wrong type, of which the run will tell
        values = {name: value for _, layer in layers for name, value in layer.items()}
        origins = {name: origin for origin, layer in layers for name in layer}
    return values, origins


def read_command_line(argv: Sequence[str]) -> dict[str, Any]:
    """The flags and their values: a list for several values, true for none, and false for `--no_FLAG`."""
    texts: dict[str, list[str]] = {}
    name = ""
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            texts[name] = [value] if equals else []
        elif name:
            texts[name].append(argument)
    values: dict[str, Any] = {}
    for name, items in texts.items():
        if not items and name.startswith("no_") and name.removeprefix("no_") in HELP:
            values[name.removeprefix("no_")] = False
        elif name not in ("help", "help_all"):
            parsed = [_parse(item) for item in items]
            values[name] = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return values


def _parse(text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def format_value(value: Any) -> str:
    """A value as one would type it after its flag; empty for none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(format_value, value))
    return str(value)


def read_first_line(recipe: str) -> str:
    """The first line of the recipe's docstring; empty without one."""
    try:
        text = ast.get_docstring(ast.parse(Path(recipe).read_text()))
    except (OSError, SyntaxError, ValueError):
        text = None
    return (text or "").partition("\n")[0]
