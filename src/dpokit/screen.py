"""A clean screen: our own lines, on rank 0, and no warning of a dependency that a user can do nothing about."""

import logging
import os
import sys
import warnings

from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from dpokit.world import is_main_process

# (start of the message, why a user need not see it, delete when)
NOISE = (
    # TRL's own default, True, meets a rename in transformers 5.x. Delete when TRL sets activation_checkpointing.
    r"`(is_)?gradient_checkpointing.*` is deprecated and will be removed in v6",
    # torch's checkpointing speaks of the frozen reference and of eval, where no input needs a gradient: as meant.
    r"None of the inputs have requires_grad=True",
    # DataLoader with pin_memory on a CPU machine. Delete when transformers asks the accelerator first.
    r"'pin_memory' argument is set as true but no accelerator is found",
    # torch asks to name the device of a barrier although gloo has but one.
    r"barrier\(\): using the device under current context",
    # DeepSpeed and accelerate call collectives by names that torch 2.13 renames. Delete when they follow.
    r"`torch\.distributed\.\w+` is deprecated",
    # accelerate leaves 4-bit weights whole on each rank under FSDP2, which is said in the README's table.
    r"Found \d+ non-floating frozen Params4bit",
    # bitsandbytes' paged AdamW is its plain one on a CPU, where there is nothing to page to.
    r"Paged optimizers are not supported on CPU",
)

# (logger, text)
LOGGED_NOISE = (
    # Weights tied to the embedding are stored once, and tied again when the best checkpoint is loaded. Delete when
    # transformers knows its own tied weights there.
    ("transformers.trainer", "There were missing keys in the checkpoint model loaded: ['lm_head.weight']"),
    # DeepSpeed's number is the one that was asked for. Delete when transformers tells accelerate's plugin too.
    ("accelerate.accelerator", "Gradient accumulation steps mismatch"),
    # bitsandbytes' 8-bit AdamW under ZeRO: tests/test_placements.py compares it with one process.
    ("DeepSpeed", "You are using ZeRO with an untested optimizer"),
)


class _Without(logging.Filter):
    """Lets every record pass that does not hold the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def quiet_dependencies() -> None:
    """Called once before anything heavy is built; errors and unknown warnings still show."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name, text in LOGGED_NOISE:
        logging.getLogger(name).addFilter(_Without(text))
    disable_progress_bar()  # of reading and writing weights: a bar a file, on every save
    if not is_main_process():
        warnings.simplefilter("ignore")
        os.environ["TQDM_DISABLE"] = "1"


def say(line: str = "") -> None:
    """One line of ours on stderr, rank 0 alone; above a progress bar that is shown."""
    if is_main_process():
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
