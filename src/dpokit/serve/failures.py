"""What is said of a failure, and what is left of the device after one."""

import logging
import sys
import time
import traceback
from contextlib import suppress

from dpokit.errors import DpokitError
from dpokit.serve.request_limits import RefusedError
from dpokit.terminal import echo

REPEAT_SECONDS = 60.0
LOST = "The device of the models is lost, by a CUDA error that only a new process mends: restart dpokit."


def describe(error: Exception, *, hint: str = "The log of the server says more; another question may work.") -> str:
    """A failure in a sentence for the one who asked, with a `hint` where only the code's author could say more."""
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, DpokitError):
        return f"{error.seen}. Expected: {error.expected}. Do this: {error.do}."
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "alloc" in str(error).lower():
        return "The model ran out of memory. Ask for a shorter answer, or begin a new conversation."
    return f"The model failed ({type(error).__name__}). {hint}"


def tell(error: Exception) -> None:
    """Writes what happened to the server's log; a refusal is no news."""
    if isinstance(error, RefusedError):
        return
    with suppress(OSError, ValueError):  # a log that was closed ends nothing
        if isinstance(error, DpokitError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            echo("".join(traceback.format_exception(error)), err=True)


class OnceAMinute(logging.Filter):
    """Writes each message once in REPEAT_SECONDS: who sends nonsense cannot fill the disk with what is said of it."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[str, tuple[float, int]] = {}  # when, and how often it was left out since; by message

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; the next one tells how many were not."""
        message, now = str(record.msg), time.monotonic()  # without its values, so that these are few
        written, left_out = self._written.get(message, (-REPEAT_SECONDS, 0))
        if now - written < REPEAT_SECONDS:
            self._written[message] = written, left_out + 1
            return False
        self._written[message] = now, 0
        if left_out:
            record.msg = f"{message.rstrip()} ({left_out:,} more times since this was last written)"
        return True


def revive_device(error: Exception) -> bool:
    """Gives back what a failed call holds; False where the device answers nothing any more."""
    import torch

    traceback.clear_frames(error.__traceback__)  # its locals are the caches and logits that found no room
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()  # raises for ever after a device-side assert
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True
