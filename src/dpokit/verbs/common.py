"""Shared by all verbs. Neither this module nor the top of a verb's module imports torch, so `--help` is quick."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dpokit.errors import DpokitError, path_errors
from dpokit.interrupts import working
from dpokit.settings.flag_help import HELP
from dpokit.terminal import echo


class TrainingCommand(TyperCommand):
    """A command with a recipe as its argument, which also completes training flags and the recipes of ./recipes."""

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        items = super().shell_complete(ctx, incomplete)
        if not incomplete.startswith("--"):
            return items
        # The items' class is click's or Typer's own copy of it; every command has at least --help.
        options = super().shell_complete(ctx, "--")
        names = {option.value.replace("_", "-") for option in options}
        flags = [f"--{name}" for name in HELP if f"--{name}".replace("_", "-") not in names]
        return items + [type(options[0])(flag) for flag in flags if flag.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """The recipes of ./recipes that begin with a text, and as paths if it contains a slash."""
    paths = sorted(Path("recipes").glob("*.py"))
    names = [str(path) for path in paths] + [path.stem for path in paths]
    return [name for name in names if name.startswith(incomplete) and ("/" in incomplete) == ("/" in name)]


def complete_run(incomplete: str) -> list[str]:
    """The run folders that begin with a text: in ./runs, or in the folder that the text names."""
    parent = Path(incomplete).parent if "/" in incomplete else Path("runs")
    folders = sorted(path.parent for path in parent.glob("*/run.json"))
    return [str(folder) for folder in folders if str(folder).startswith(incomplete) or not incomplete]


Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="recipes/NAME.py, or NAME. It comes first.", autocompletion=complete_recipe),
]

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@contextmanager
def errors_without_torch() -> Iterator[None]:
    """Turns an error that the user can correct into one message and exit code 2, like `story.user_errors`.

    Unlike that function it does not ask the other ranks which of them shows the message, which needs torch.
    """
    try:
        with working(), path_errors():
            yield
    except DpokitError as error:
        if os.environ.get("RANK", "0") == "0":
            echo(f"\n{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
