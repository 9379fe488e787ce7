"""The `main` function of recipes: prints a first line before the imports of training, which take seconds."""

import gc
import os
import sys
from collections.abc import Iterator, Mapping
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
    with ending_on_signals():
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(recipe).stem}: importing torch, transformers and TRL", file=sys.stderr, flush=True)
        gc.set_threshold(GC_THRESHOLD)
        module, _, function = program.rpartition(".")
        train = getattr(import_module(module), function)
        with user_errors():
            train(recipe, defaults, sys.argv[1:])


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
