"""`dpokit VERB`: one verb a room. Progress goes to stderr, the answer to stdout; `--help` needs no torch."""

import gc

from dpokit.interrupts import ending_on_signals
from dpokit.story import GC_THRESHOLD


def main() -> None:
    """The console script."""
    with ending_on_signals():
        gc.set_threshold(GC_THRESHOLD)
        from dpokit.verbs.app import app

        app()


if __name__ == "__main__":
    main()
