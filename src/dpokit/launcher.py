"""`accelerate launch` without its list of unset defaults, and without its traceback below a run's own message.

    python -m dpokit.launcher [--config_file PLACEMENT.yaml] RECIPE [flags]

It takes the arguments of `accelerate launch` and ends with the exit code of the process that failed first.
"""

import logging
import signal
import subprocess
import sys
from typing import Any

from dpokit.interrupts import EXIT_CODE


def launch(arguments: list[str]) -> int:
    """Runs `accelerate launch` in this process; returns 0 or the exit code of the process that failed first.

    It is 75 after a signal to the launcher, as for a run that a signal ended.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # accelerate's list of defaults, and torchrun's records of processes that end; the processes write their own errors.
    logging.disable(logging.ERROR)
    # Ctrl-C reaches the run itself, which saves; a launcher of one process waits for it. torchrun sets its own handler.
    signal.signal(signal.SIGINT, _wait_for_the_run)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        return _as_exit_code(error.returncode)
    except ChildFailedError as error:
        return _as_exit_code(error.get_first_failure()[1].exitcode)
    except SignalException:
        return EXIT_CODE
    return 0


def _wait_for_the_run(*_: Any) -> None:
    """Does nothing; unlike an ignored signal, a handler is not inherited by the run."""


def _as_exit_code(code: int) -> int:
    """A shell's exit code: 128 and the signal's number for a process that a signal killed, of which a line tells."""
    if code >= 0:
        return code
    cause = " (often for lack of memory)" if -code == signal.SIGKILL else ""
    print(f"dpokit: signal {-code} ended a process of the run{cause}", file=sys.stderr)
    return 128 - code


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
