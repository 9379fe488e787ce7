"""All verbs of `dpokit`, as one command."""

from importlib.metadata import version
from typing import Annotated

import typer

from dpokit.verbs import evaluation as proof
from dpokit.verbs import publish as release
from dpokit.verbs import runs, search, start, talk

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Training flags have underscores: a verb's own options are known by either spelling.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
for room in (start, runs, proof, release, search, talk):  # the order in which --help lists them
    app.add_typer(room.app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpokit {version('dpokit')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Preference training (DPO) on one to many GPUs. A verb's own --help says more."""
