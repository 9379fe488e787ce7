"""The command `dpokit VERB`. Progress goes to stderr, the result to stdout; `--help` imports no torch."""

import gc

from dpokit.interrupts import ending_on_signals
from dpokit.story import GC_THRESHOLD


def main() -> None:
    """Runs the command; pyproject.toml names this function as the console script."""
    with ending_on_signals():
        gc.set_threshold(GC_THRESHOLD)
        from dpokit.verbs.app import app

        app()


if __name__ == "__main__":
    main()
