"""Output on stderr: dpokit's own lines on rank 0, without warnings of libraries that a user cannot act on."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Self

from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from dpokit.distributed.processes import is_main_process
from dpokit.terminal import escape_controls

# Patterns of warnings that are hidden: each comment says why, and when to delete the pattern.
NOISE = (
    # TRL's own default sets a flag that transformers 5.x renames. Delete when TRL sets activation_checkpointing.
    r"`(is_)?gradient_checkpointing.*` is deprecated and will be removed in v6",
    # torch's checkpointing warns about the frozen reference and about evaluation, where no input needs a gradient.
    r"None of the inputs have requires_grad=True",
    # DataLoader with pin_memory on a CPU machine. Delete when transformers asks the accelerator first.
    r"'pin_memory' argument is set as true but no accelerator is found",
    # torch asks for the device of a barrier, although gloo has only one.
    r"barrier\(\): using the device under current context",
    # DeepSpeed and accelerate call collectives by names that torch 2.13 renames. Delete when they follow.
    r"`torch\.distributed\.\w+` is deprecated",
    # accelerate leaves 4-bit weights whole on each rank under FSDP2, as docs/placements.md explains.
    r"Found \d+ non-floating frozen Params4bit",
    # On a CPU, bitsandbytes runs its plain AdamW instead of the paged one; there is no other memory to page to.
    r"Paged optimizers are not supported on CPU",
)

# Logger, and text of the records that are hidden.
LOGGED_NOISE = (
    # Weights tied to the embedding are stored once, and tied again when the best checkpoint is loaded. Delete when
    # transformers leaves tied weights out of this warning.
    ("transformers.trainer", "There were missing keys in the checkpoint model loaded: ['lm_head.weight']"),
    # DeepSpeed's number is the one that the user set. Delete when transformers passes it to accelerate's plugin, too.
    ("accelerate.accelerator", "Gradient accumulation steps mismatch"),
    # bitsandbytes' 8-bit AdamW under ZeRO: tests/test_placements.py compares it with one process.
    ("DeepSpeed", "You are using ZeRO with an untested optimizer"),
)


class _Without(logging.Filter):
    """Passes only the records that do not contain the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def quiet_dependencies() -> None:
    """Hides the listed warnings, and all warnings on ranks other than 0; errors and other warnings still show."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name, text in LOGGED_NOISE:
        logging.getLogger(name).addFilter(_Without(text))
    disable_progress_bar()  # transformers shows one bar per weights file on every load and save
    if not is_main_process():
        warnings.simplefilter("ignore")
        hide_progress()


def say(line: str = "") -> None:
    """Prints a line on stderr, on rank 0 only; it appears above a progress bar."""
    if is_main_process():
        tqdm.write(escape_controls(line), file=sys.stderr)
        sys.stderr.flush()


LINE_SECONDS = 30.0  # least time between two lines of progress if the output is no terminal


def hide_progress() -> None:
    """Hides progress in this process and in the processes that it starts."""
    os.environ["TQDM_DISABLE"] = "1"


def is_progress_hidden() -> bool:
    """True on every rank but 0, and with `--disable_tqdm`."""
    return bool(os.environ.get("TQDM_DISABLE")) or not is_main_process()


def has_bars() -> bool:
    """True if progress is shown as bars, because stderr is a terminal."""
    return sys.stderr.isatty() and not is_progress_hidden()


def track_progress(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    hidden: bool = False,
) -> Any:
    """Shows progress on stderr: a tqdm bar in a terminal, plain lines elsewhere, nothing if it is hidden.

    Args:
        items: what to iterate over; without it the caller counts with `update`.
        desc: the activity.
        unit: what is counted, in the singular.
        total: the count at the end; by default the length of `items`.
        initial: the count at the start.
        leave: keep the bar, or write a line, at the end.
        hidden: show nothing.
    """
    hidden = hidden or is_progress_hidden()
    if hidden or has_bars():
        return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, leave=leave, disable=hidden)
    return PlainProgress(items, desc=desc, unit=unit, total=total, initial=initial, leave=leave)


class PlainProgress:
    """Progress in a log file, with tqdm's methods: at most one line every LINE_SECONDS, and one at the end."""

    def __init__(
        self, items: Iterable[Any] | None, *, desc: str, unit: str, total: int | None, initial: int, leave: bool
    ) -> None:
        if total is None and isinstance(items, Sized):
            total = len(items)
        self.items, self.desc, self.unit, self.total, self.leave = items, desc, unit, total, leave
        self.n = self.initial = initial
        self.values: Mapping[str, Any] = {}
        self.begun = self.last_line = time.monotonic()
        self.closed = False

    def __iter__(self) -> Iterator[Any]:
        for item in self.items or ():
            yield item
            self.update()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Adds n to the count."""
        self.n += n
        if time.monotonic() - self.last_line >= LINE_SECONDS:
            self._write_line()

    def set_postfix(self, values: Mapping[str, Any] | None = None, refresh: bool = True, **more: Any) -> None:
        """Sets the values that the next lines show."""
        self.values = {**(values or {}), **more}

    def close(self) -> None:
        """Writes the last line."""
        if self.leave and not self.closed:
            self._write_line()
        self.closed = True

    def _write_line(self) -> None:
        self.last_line = time.monotonic()
        done, seconds = self.n - self.initial, self.last_line - self.begun
        parts = [f"{self.unit} {self.n:,}" + (f" of {self.total:,}" if self.total else "")]
        parts += [f"{name} {value}" for name, value in self.values.items()]
        if done and seconds > 0:
            rate = done / seconds
            parts.append(f"{rate:.2f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}")
            if self.total and self.n < self.total:
                parts.append(f"{tqdm.format_interval((self.total - self.n) / rate)} left")
        say(f"{self.desc}: {', '.join(parts)}")
