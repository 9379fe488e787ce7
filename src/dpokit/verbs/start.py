"""The verb that begins a project: init."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dpokit.terminal import echo, one_line
from dpokit.verbs.common import errors_without_torch

app = typer.Typer()


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or an existing folder.")],
) -> None:
    """Copies recipes, presets, search spaces, accelerate configs and the Slurm job into a folder."""
    from dpokit.starter import write_starter_files

    with errors_without_torch():
        paths = write_starter_files(folder)
    echo(f"{len(paths)} files are in {one_line(folder)}; next:")
    echo(f"  cd {one_line(shlex.quote(str(folder)))}\n  accelerate launch recipes/dpo_quickstart.py")
