"""Verbs that begin a project: init, env."""

import json
import shlex
import sys
from contextlib import redirect_stdout
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


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Shows versions, hardware and launcher variables for a report of a bug, without secrets."""
    with redirect_stdout(sys.stderr), errors_without_torch():
        from dpokit.environment import collect_environment, describe_environment

        record = collect_environment()
    echo(json.dumps(record, indent=2) if as_json else describe_environment(record))
