"""Every error a user can meet, one tree.

    DpokitError             what was seen, what was expected, what to do
      SettingsError         a recipe, a YAML file or the command line
      DataError             a dataset, a file, a row
      ModelError            a model, a tokenizer, an adapter
      MachineError          precision, devices, number of processes
      RunFolderError        a run folder that is taken, foreign or cannot be written
      GateError             a run that cannot be right
      JudgeError            a judge that cannot be reached, refuses, or does not speak as expected
      HubError              a Hub that cannot be reached, refuses or fails, and what must not go there
      ReleaseError          what was to follow training, and ended early

All of them end a run with exit code 2 and one message on rank 0; anything else is our bug and keeps its traceback.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from dpokit.credentials import hide_secrets
from dpokit.terminal import escape_controls, one_line


class DpokitError(Exception):
    """A mistake or a state of the machine that the user can mend.

    Args:
        seen: what was found, with the name of the flag, file or row.
        expected: what would have been right.
        do: the next thing to do.
    """

    def __init__(self, seen: str, *, expected: str, do: str) -> None:
        # A value that was refused, or a server's answer, may hold a secret, or control characters.
        self.seen, self.do = one_line(hide_secrets(seen)), one_line(hide_secrets(do))
        self.expected = escape_controls(expected)
        super().__init__(f"{self.seen}\n  expected:  {expected}\n  do this:   {self.do}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Ranks send errors to each other; pickling an exception forgets arguments given by keyword.
        return partial(type(self), expected=self.expected, do=self.do), (self.seen,)


class SettingsError(DpokitError):
    """A setting that is unknown, retired, of the wrong type, or at odds with another."""


class DataError(DpokitError):
    """Preference data that is missing, unreadable, of no known format, or leaves no usable pair."""


class ModelError(DpokitError):
    """A model or tokenizer that cannot be found, or that cannot be trained with preference pairs."""


class MachineError(DpokitError):
    """A precision, device or number of processes that was asked for and is not there."""


class RunFolderError(DpokitError):
    """A run folder that belongs to another run, or that cannot be written."""


class GateError(DpokitError):
    """A run that cannot be right, by its start or by its steps; `--gates warn` lets it go on."""


class JudgeError(DpokitError):
    """A judge's endpoint that cannot be reached, refuses, fails, or is no chat-completions endpoint."""


class HubError(DpokitError):
    """A Hub that cannot be reached, refuses or goes on failing, or a file that must not be sent to it."""


class ReleaseError(DpokitError):
    """A verb that was to follow training and ended early; the run itself is whole."""


_DISK_TROUBLE = {
    errno.ENOSPC: ("no space is left on the disk", "free some space, or choose another disk with --output_dir"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another disk with --output_dir"),
    errno.EACCES: ("writing is not permitted", "choose a folder of yours with --output_dir"),
    errno.EPERM: ("writing is not permitted", "choose a folder of yours with --output_dir"),
    errno.EROFS: ("the file system is read-only", "choose another folder with --output_dir"),
    errno.EEXIST: ("a file is where a folder is needed", "choose another folder with --output_dir"),
    errno.EISDIR: ("a folder is where a file is needed", "choose another folder with --output_dir"),
    errno.ENAMETOOLONG: ("a name in the path is too long", "choose another folder with --output_dir"),
    errno.ELOOP: ("a link in the path leads back to itself", "choose another folder with --output_dir"),
    errno.EIO: ("the disk failed", "look at the disk, or choose another one with --output_dir"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another folder with --output_dir"),
    errno.ENOENT: ("the folder cannot be made there", "choose another folder with --output_dir"),
}


# Allocators of the CPU and of GPUs, the operating system and C++ name it so.
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|std::bad_alloc", re.IGNORECASE)


def find_disk_trouble(error: BaseException) -> RunFolderError | None:
    """The user's view of an operating-system error on writing; None where it is something else.

    Libraries wrap `OSError` in errors of their own, and some lose the number, so causes and texts are read.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        number = number or _read_number(str(seen))
        if number in _DISK_TROUBLE:
            trouble, remedy = _DISK_TROUBLE[number]
            where = f" ({seen.filename})" if isinstance(seen, OSError) and seen.filename else ""
            return RunFolderError(f"{trouble}{where}", expected="a folder this run can write to", do=remedy)
        seen = seen.__cause__ or seen.__context__
    return None


def _read_number(text: str) -> int | None:
    """Of Rust's `os error 28` (safetensors, tokenizers) and torch's `strerror: No space left on device`."""
    if told := re.search(r"os error (\d+)", text, re.I):
        return int(told[1])
    _, _, words = text.partition("strerror: ")
    return next((number for number in _DISK_TROUBLE if words.startswith(os.strerror(number))), None)


@contextmanager
def path_errors() -> Iterator[None]:
    """Turns a path that no file can have into the user's message: a verb was given it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR):
            raise
        raise RunFolderError(
            f"{str(error.filename)[:80]}: {error.strerror}", expected="the path of a file or a folder", do="correct it"
        ) from error
