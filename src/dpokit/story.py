"""The `main` function of recipes: prints a first line before the imports of training, which take seconds."""

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from dpokit.errors import DpokitError, path_errors
from dpokit.interrupts import ending_on_signals, working

# By default Python's garbage collector runs every 700 new objects, which takes a fifth of the time of the imports.
GC_THRESHOLD = 100_000


def main(recipe: str, defaults: Mapping[str, Any], program: str = "dpokit.run.train") -> None:
    """Trains with the recipe's defaults and the flags of the command line.

    `kind` in the defaults is `dpo` (if it is missing) or `sft`; `program` is the full name of the function that trains.

    An error that the user can correct ends in one message on rank 0 and exit code 2; a signal in one line and exit code
    75; any other error keeps its traceback.
    """
    if {"-h", "--help", "--help-all", "--help_all"} & set(sys.argv[1:]):
        show_help(recipe, defaults, sys.argv[1:])
        return
    with ending_on_signals():
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(recipe).stem}: importing torch, transformers and TRL", file=sys.stderr, flush=True)
        gc.set_threshold(GC_THRESHOLD)
        module, _, function = program.rpartition(".")
        train = getattr(import_module(module), function)
        with user_errors():
            train(recipe, defaults, sys.argv[1:])


def show_help(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> None:
    """Prints the flags of a recipe: the most used ones without importing torch, or all with `--help-all`."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        if {"-h", "--help"} & set(argv):
            from dpokit.settings.help_page import render_help

            print(render_help(recipe, defaults, argv))
        else:
            from dpokit.settings.flags import FlagParser, split_kind

            FlagParser(split_kind(defaults)[0], prog=Path(recipe).name).print_all_flags()
    except DpokitError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error that the user can correct into one message, shown by one rank, and exit code 2."""
    try:
        with working(), path_errors():
            yield
    except DpokitError as error:
        from dpokit.distributed.coordination import is_first_to_report

        if is_first_to_report():
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
