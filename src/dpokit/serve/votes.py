"""Votes: a JSONL file that is only appended to, in complete lines; `dpokit.data` reads it as pairs."""

import errno
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpokit.atomic_files import sync_folder
from dpokit.errors import RunFolderError, find_disk_trouble

CHOICES = ("left", "right", "tie", "both_bad")
LINE_START = b'{"prompt": ['  # of every line that build_vote makes
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
    """A vote as one line of the file.

    `prompt`, `chosen` and `rejected` are message lists, the format of chat training data. Without a preference `chosen`
    and `rejected` have empty answers, so that no reader takes them for a pair; `answers` has the texts.

    Args:
        choice: one of CHOICES.
        prompt: the conversation up to the question.
        order: the sides `base` and `tuned` in the order left, right.
        answers: the text of each side.
        names: the model name of each side.
        blind: whether the names were hidden during the vote.
        more: further values to store.
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
    """Appends one line and syncs it to disk; safe for any number of processes at once.

    It first repairs a last line that a crash cut; that vote was never confirmed to the user.

    Raises: RunFolderError if the write fails or the file holds something else; the file is then unchanged.
    """
    line = (json.dumps(vote, allow_nan=False) + "\n").encode()
    try:
        is_new = not path.exists()
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            check_votes(path)
            _repair_last_line(file)
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
            os.close(file)  # also releases the lock
        if is_new:
            sync_folder(path.parent)
    except OSError as error:
        trouble = find_disk_trouble(error)
        raise RunFolderError(
            f"the vote could not be written to {path}: {trouble.seen if trouble else error.strerror}",
            expected="a file that can be appended to",
            do="free some space or correct its permissions, or --votes with another file",
        ) from error


def check_votes(path: Path) -> None:
    """Raises RunFolderError for a file that does not begin with a vote, or cannot be read.

    A file that dpokit did not write must not be repaired. A cut first line counts as a vote if it begins like one.
    """
    try:
        with path.open("rb") as file:
            first = file.readline()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read: {error.strerror}",
            expected="a file of votes, or no file",
            do="correct its permissions, or --votes with another file",
        ) from error
    try:
        fields = json.loads(first)
        is_vote = isinstance(fields, dict) and fields.get("vote") in ("base", "tuned", *CHOICES)
    except ValueError:
        is_vote = not first.endswith(b"\n") and first[: len(LINE_START)] == LINE_START[: len(first)]
    if not is_vote:
        raise RunFolderError(
            f"{path} does not begin with a vote",
            expected="a file of votes, or no file",
            do="--votes with another file",
        )


def _repair_last_line(file: int) -> None:
    """Removes an incomplete last line, or adds its newline if only that is missing."""
    size = offset = os.fstat(file).st_size
    last_line = b""
    while offset and b"\n" not in last_line:
        start = max(0, offset - CHUNK_BYTES)
        last_line = os.pread(file, offset - start, start) + last_line
        offset = start
    last_line = last_line[last_line.rfind(b"\n") + 1 :]
    if not last_line:
        return
    try:
        is_complete = isinstance(json.loads(last_line), dict)
    except ValueError:
        is_complete = False
    if is_complete:
        os.write(file, b"\n")
    else:
        os.ftruncate(file, size - len(last_line))
