"""Shared by all verbs. Neither this module nor the top of a verb's module imports torch, so `--help` is quick."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from dpokit.errors import DpokitError, path_errors
from dpokit.interrupts import working
from dpokit.terminal import echo

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
