"""Votes: a JSONL file that is only ever added to, whole lines at a time, and that `dpokit.data` reads as pairs."""

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpokit.errors import RunFolderError, find_disk_trouble
from dpokit.rundir import sync_folder

CHOICES = ("left", "right", "tie", "both_bad")
HEAD = b'{"prompt": ['  # of every line of ours
CHUNK_BYTES = 2**20


def build_vote(
    choice: str,
    *,
    prompt: Sequence[Mapping[str, str]],
    order: Sequence[str],
    answers: Mapping[str, str],
    names: Mapping[str, str],
    blind: bool,
    **more: Any,
) -> dict[str, Any]:
    """One line of the file.

    `prompt`, `chosen` and `rejected` are message lists, the layout that chat models are trained from. Without a
    preference both answers are empty there, so that no reader takes them for one; `answers` has the texts.

    Args:
        choice: one of CHOICES.
        prompt: the conversation up to the question.
        order: which of `base` and `tuned` stood left, and which right.
        answers: of each of the two.
        names: of the models.
        blind: the names were hidden when it was voted.
        more: values to keep beside it.
    """
    preferred = {"left": order[0], "right": order[1]}.get(choice)
    other = {"left": order[1], "right": order[0]}.get(choice)
    texts = (answers[preferred], answers[other]) if preferred and other else ("", "")
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts)
    return {
        "prompt": [dict(message) for message in prompt],
        "chosen": chosen,
        "rejected": rejected,
        "vote": preferred or choice,
        "blind": blind,
        "left": order[0],
        "answers": dict(answers),
        "models": dict(names),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def append_vote(path: Path, vote: Mapping[str, Any]) -> None:
    """Adds one line, on disk when this returns; any number of processes may do so at once.

    An end that a crash tore is mended first: nobody was told that this vote was counted.

    Raises: RunFolderError where the disk refuses, or the file holds something else; it is then as it was.
    """
    line = (json.dumps(vote, allow_nan=False) + "\n").encode()
    try:
        is_new = not path.exists()
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            check_votes(path)
            _mend(file)
            size = os.fstat(file).st_size
            try:
                written = os.write(file, line)
            except OSError:
                os.ftruncate(file, size)
                raise
            if written < len(line):
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, "no space left for a whole line", str(path))
            os.fsync(file)
        finally:
            os.close(file)  # and with it the lock
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        trouble = find_disk_trouble(error)
        raise RunFolderError(
            f"the vote could not be written to {path}: {trouble.seen if trouble else error.strerror}",
            expected="a file that can be added to",
            do="free some space or mend its rights, or --votes with another file",
        ) from error


def check_votes(path: Path) -> None:
    """Raises RunFolderError for a file that does not begin with a vote: somebody else's, whose end is not ours to mend.

    So it does for one that cannot be read. A torn first line is one of ours where it begins as they do.
    """
    try:
        with path.open("rb") as file:
            first = file.readline()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read: {error.strerror}",
            expected="a file that votes were added to, or none",
            do="mend its rights, or --votes with another file",
        ) from error
    try:
        found = json.loads(first)
        ours = isinstance(found, dict) and found.get("vote") in ("base", "tuned", *CHOICES)
    except ValueError:
        ours = not first.endswith(b"\n") and first[: len(HEAD)] == HEAD[: len(first)]
    if not ours:
        raise RunFolderError(
            f"{path} begins with something else than a vote",
            expected="a file that votes were added to, or none",
            do="--votes with another file",
        )


def _mend(file: int) -> None:
    """Cuts off a last line that is not whole, or ends it where only its newline is missing."""
    size = at = os.fstat(file).st_size
    last = b""
    while at and b"\n" not in last:
        begin = max(0, at - CHUNK_BYTES)
        last = os.pread(file, at - begin, begin) + last
        at = begin
    last = last[last.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        whole = isinstance(json.loads(last), dict)
    except ValueError:
        whole = False
    if whole:
        os.write(file, b"\n")
    else:
        os.ftruncate(file, size - len(last))
