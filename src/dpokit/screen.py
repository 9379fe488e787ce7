"""A clean screen: our own lines, on rank 0, and no warning of a dependency that a user can do nothing about."""

import logging
import os
import sys
import warnings

from dpokit.world import is_main_process

# (start of the message, why a user need not see it, delete when)
NOISE = (
    # TRL's own default, True, meets a rename in transformers 5.x. Delete when TRL sets activation_checkpointing.
    r"`gradient_checkpointing.*` is deprecated and will be removed in v6",
    # torch's checkpointing speaks of the frozen reference and of eval, where no input needs a gradient: as meant.
    r"None of the inputs have requires_grad=True",
    # DataLoader with pin_memory on a CPU machine. Delete when transformers asks the accelerator first.
    r"'pin_memory' argument is set as true but no accelerator is found",
    # torch asks to name the device of a barrier although gloo has but one.
    r"barrier\(\): using the device under current context",
)


class _NoKernelsHub(logging.Filter):
    # bitsandbytes looks for an optional faster CPU kernel at import, 4-bit or not; its own works. Delete when it asks
    # only on use.
    def filter(self, record: logging.LogRecord) -> bool:
        return "kernels-community" not in record.getMessage()


def quiet_dependencies() -> None:
    """Called once before anything heavy is built; errors and unknown warnings still show."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("bitsandbytes").addFilter(_NoKernelsHub())
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.backends.utils"):
        logging.getLogger(name).addFilter(_NoKernelsHub())
    if not is_main_process():
        warnings.simplefilter("ignore")
        os.environ["TQDM_DISABLE"] = "1"


def say(line: str = "") -> None:
    """One line of ours on stderr, rank 0 alone."""
    if is_main_process():
        print(line, file=sys.stderr, flush=True)
