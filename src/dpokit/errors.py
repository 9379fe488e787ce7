"""All errors that a user can correct, as one tree of classes.

    DpokitError             has the problem, the expected state and the remedy
      SettingsError         a recipe, a YAML file or the command line
      DataError             a dataset, a file, a row
      ModelError            a model, a tokenizer, an adapter
      MachineError          precision, devices, number of processes
      RunFolderError        a run folder that another run uses, that is damaged or that cannot be written
      GateError             a run whose start or steps show that its result will be wrong
      JudgeError            a judge that cannot be reached, refuses, or replies in another format
      HubError              a Hub that cannot be reached, refuses or fails, or a file that must not be uploaded
      ReleaseError          a verb that follows training and failed

Each of them ends a run with exit code 2 and one message on rank 0; any other error is a bug and keeps its traceback.
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
    """A mistake, or a state of the machine, that the user can correct.

    Args:
        problem: the wrong value or state, with the name of the flag, file or row.
        expected: a correct value or state.
        do: the next thing to do.
    """

    def __init__(self, problem: str, *, expected: str, do: str) -> None:
        # A refused value or a server's answer may hold a secret or control characters.
        self.seen, self.do = one_line(hide_secrets(problem)), one_line(hide_secrets(do))
        self.expected = escape_controls(expected)
        super().__init__(f"{self.seen}\n  expected:  {self.expected}\n  do this:   {self.do}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Ranks send errors to each other; by default, pickling an exception loses its keyword arguments.
        return partial(type(self), expected=self.expected, do=self.do), (self.seen,)


class SettingsError(DpokitError):
    """A setting that is unknown, retired, of the wrong type, or in conflict with another one."""


class DataError(DpokitError):
    """Preference data that is missing, unreadable, in an unknown format, or without a usable pair."""


class ModelError(DpokitError):
    """A model or tokenizer that cannot be found, or that cannot be trained with preference pairs."""


class MachineError(DpokitError):
    """A requested precision, device or number of processes that this machine does not have."""


class RunFolderError(DpokitError):
    """A run folder that belongs to another run, is damaged or cannot be written."""


class GateError(DpokitError):
    """A run whose start or steps show that its result will be wrong; with `--gates warn` it continues."""


class JudgeError(DpokitError):
    """A judge's endpoint that cannot be reached, refuses, fails, or does not serve chat completions."""


class HubError(DpokitError):
    """A Hub that cannot be reached, refuses or keeps failing, or a file that must not be uploaded."""


class ReleaseError(DpokitError):
    """A verb that follows training and failed; the run itself is complete."""


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
    errno.ENOENT: ("the folder cannot be created there", "choose another folder with --output_dir"),
}


# Allocators of the CPU and of GPUs, the operating system and C++ name it so.
# Errors of reading the data; the others (ENOSPC, EROFS, ...) come from writing the cache.
READ_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|std::bad_alloc", re.IGNORECASE)


def find_disk_trouble(error: BaseException) -> RunFolderError | None:
    """A RunFolderError for an operating-system error on writing; None for any other error."""
    for cause, number in _walk_causes(error):
        if number in _DISK_TROUBLE:
            trouble, remedy = _DISK_TROUBLE[number]
            where = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
            return RunFolderError(f"{trouble}{where}", expected="a folder this run can write to", do=remedy)
    return None


def is_missing_file(error: BaseException) -> bool:
    """Whether an error says that a file or its folder does not exist."""
    return any(number == errno.ENOENT for _, number in _walk_causes(error))


def _walk_causes(error: BaseException) -> Iterator[tuple[BaseException, int | None]]:
    """An error and its causes, each with its errno if it has one.

    Libraries wrap `OSError` in errors of their own, and some drop its number, so causes and messages are searched.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        yield cause, number or _read_number(str(cause))
        cause = cause.__cause__ or cause.__context__


def find_disk_trouble_or(error: BaseException, problem: str, expected: str, do: str) -> Exception:
    """Returns the error of the disk if it is full or failing while the cache is written, else a DataError."""
    trouble = None if getattr(error, "errno", None) in READ_ERRORS else find_disk_trouble(error)
    return trouble or DataError(problem, expected=expected, do=do)


def _read_number(text: str) -> int | None:
    """The errno in Rust's `os error 28` (safetensors, tokenizers), or in torch's messages, which spell it out."""
    if match := re.search(r"os error (\d+)", text, re.I):
        return int(match[1])
    if re.match(r"Parent directory .* does not exist", text):
        return errno.ENOENT
    _, _, message = text.partition("strerror: ")
    return next((number for number in _DISK_TROUBLE if message.startswith(os.strerror(number))), None)


@contextmanager
def path_errors() -> Iterator[None]:
    """Turns the error about a path that no file can have into a RunFolderError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR):
            raise
        raise RunFolderError(
            f"{str(error.filename)[:80]}: {error.strerror}", expected="the path of a file or a folder", do="correct it"
        ) from error
