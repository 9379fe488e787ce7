"""The command `dpokit` with all its verbs."""

from importlib.metadata import version
from typing import Annotated

import typer

from dpokit.verbs import data, evaluation, publish, runs, search, start, talk

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Training flags have underscores, so a verb's own options accept underscores as well as dashes.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
for module in (start, data, runs, evaluation, publish, search, talk):  # the order in which --help lists them
    app.add_typer(module.app)


def _show_version(is_set: bool) -> None:
    if is_set:
        typer.echo(f"dpokit {version('dpokit')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Preference training (DPO) on one to many GPUs. See also each verb's --help."""
