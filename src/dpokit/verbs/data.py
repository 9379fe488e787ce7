"""Verbs on data: data check."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from dpokit.terminal import echo, one_line
from dpokit.verbs.common import PASS_ON, errors_without_torch

app = typer.Typer()
group = typer.Typer(no_args_is_help=True, help="Check preference data before a run: dpokit data check SOURCE.")
app.add_typer(group, name="data")


@group.command(context_settings=PASS_ON)
def check(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="SOURCE", help="Files, folders or Hub ids, before all flags.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write data-check.json and data-check.html, with examples and histograms."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with code 2 if there is a finding, or if nearly equal texts were not searched."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of data-check.json on stdout.")] = False,
) -> None:
    """Looks for what is wrong with preference pairs, and says what to do about it.

    It finds pairs that are repeated or contradict each other, held-out prompts
    that are also trained on, looks of the answers that alone tell which one is
    preferred, damaged texts, keys and personal data.

    All flags of a run may follow, also --config run.yaml, and the rows are read
    as that run would read them. Without SOURCE, the datasets that these flags
    name are checked.

    Example: dpokit data check pairs.jsonl --max_length 1024 --output check
    """
    arguments = arguments or []
    first_flag = next((at for at, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    with redirect_stdout(sys.stderr), errors_without_torch():
        from dpokit.data.doctor.screen import passes, print_check
        from dpokit.data_check import check_sources
        from dpokit.report.data_page import make_check_folder, write_check

        if output is not None:
            make_check_folder(output)  # a problem with the folder shows before the rows are read
        record = check_sources(arguments[:first_flag], arguments[first_flag:])
        written = None if output is None else write_check(output, record)
    if as_json:
        echo(json.dumps(record, indent=2))
    else:
        print_check(record)
        if written is not None:
            echo(one_line(written.page))
    if strict and not passes(record):
        raise typer.Exit(2)
