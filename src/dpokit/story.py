"""What a recipe calls. It says that it has begun before it imports what training needs, which takes seconds."""

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpokit.errors import DpokitError

# Python's collector goes through all that is imported every 700 new objects: a fifth of the time that imports take.
GC_THRESHOLD = 100_000


def main(recipe: str, defaults: Mapping[str, Any]) -> None:
    """Trains by the recipe's defaults and the command line.

    `kind` among the defaults says how: `dpo`, which needs no word, or `sft`.

    A mistake of the user ends in one message on rank 0 and exit code 2; anything else keeps its traceback.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(recipe).stem}: importing torch, transformers and TRL", file=sys.stderr, flush=True)
    gc.set_threshold(GC_THRESHOLD)
    from dpokit.run import train

    with user_errors():
        train(recipe, defaults, sys.argv[1:])


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what the user can mend into one message of all ranks together and exit code 2."""
    try:
        yield
    except DpokitError as error:
        from dpokit.peers import speaks_for_all

        if speaks_for_all():
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
