"""What is said of a failure, and what is left of the device after one."""

import sys
import traceback
from contextlib import suppress

from dpokit.errors import DpokitError
from dpokit.serve.limits import RefusedError
from dpokit.terminal import echo

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
