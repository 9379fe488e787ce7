"""What all verbs share. Nothing here, or at the top of their files, needs torch: `--help` is quick."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dpokit.errors import DpokitError, path_errors
from dpokit.interrupts import working
from dpokit.terminal import echo

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@contextmanager
def errors_without_torch() -> Iterator[None]:
    """What the user can mend in one message and exit code 2; the story's own way of it needs torch."""
    try:
        with working(), path_errors():
            yield
    except DpokitError as error:
        echo(f"\n{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
