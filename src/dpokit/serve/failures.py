"""Describes and logs a failure of the models, and frees the device's memory after it."""

import logging
import sys
import time
import traceback
from contextlib import suppress

from dpokit.errors import DpokitError
from dpokit.serve.request_limits import RefusedError
from dpokit.terminal import echo

REPEAT_SECONDS = 60.0
LOST = "A CUDA error has disabled the models' device until the process ends: restart dpokit."


def describe_failure(error: Exception, *, hint: str = "See the server's log; another question may work.") -> str:
    """The failure as a sentence for the user, with a `hint` if its class has no text for users."""
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, DpokitError):
        return f"{error.seen}. Expected: {error.expected}. Do this: {error.do}."
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "alloc" in str(error).lower():
        return "The model ran out of memory. Ask for a shorter answer, or start a new conversation."
    return f"The model failed ({type(error).__name__}). {hint}"


def log_failure(error: Exception) -> None:
    """Writes a failure to the server's log; a refused question is not logged."""
    if isinstance(error, RefusedError):
        return
    with suppress(OSError, ValueError):  # a closed log must not stop the server
        if isinstance(error, DpokitError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            echo("".join(traceback.format_exception(error)), err=True)


class OnceAMinute(logging.Filter):
    """Lets each message through once in REPEAT_SECONDS, so that invalid requests cannot fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[str, tuple[float, int]] = {}  # by message: last time, number omitted since

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; the next written one has the number of omitted ones."""
        # The key is the format string without its values, so that the table stays small.
        message, now = str(record.msg), time.monotonic()
        written, left_out = self._written.get(message, (-REPEAT_SECONDS, 0))
        if now - written < REPEAT_SECONDS:
            self._written[message] = written, left_out + 1
            return False
        self._written[message] = now, 0
        if left_out:
            record.msg = f"{message.rstrip()} ({left_out:,} more times since this was last written)"
        return True


def revive_device(error: Exception) -> bool:
    """Frees the memory that a failed call holds; False if the device no longer works."""
    import torch

    traceback.clear_frames(error.__traceback__)  # the frames hold the caches and logits that filled the memory
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()  # raises from now on after a device-side assert
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True
