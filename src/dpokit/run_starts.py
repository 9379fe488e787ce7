"""The starts that a run folder has seen, and whether one of them took a step. No torch."""

import os
import socket
from collections.abc import Mapping
from typing import Any

from dpokit.errors import RunFolderError
from dpokit.rundir import RunDir, read_metrics


def count_starts(record: Mapping[str, Any]) -> int:
    """How many starts a folder has seen, from its run.json; also those of runs that it no longer holds."""
    return int(record.get("former_starts") or 0) + len(record.get("generations") or [])


def clear_folder(run: RunDir) -> int:
    """Deletes the files of a former run, and returns how many starts the folder has seen. Raises: OSError."""
    try:
        starts = count_starts(run.read_run() or {})
    except RunFolderError:  # damaged
        starts = 0
    run.clear()
    return starts


def has_only_failed_starts(run: RunDir) -> bool:
    """Whether the folder holds nothing but starts that ended before their first step, such as one with a typo.

    No run owns such a folder. A start that is recorded as running has ended if its process is gone; on another machine
    it may be alive.

    Raises: RunFolderError as `RunDir.read_run`.
    """
    record = run.read_run() or {}
    last = (record.get("generations") or [{}])[-1]
    if record.get("state") == "finished" or (record.get("state") == "running" and not _is_gone(last)):
        return False
    before_first_step = (run.run_json, run.metrics_jsonl, run.data_json)
    if "shared_prefix" in record or any(path not in before_first_step for path in run.own_files()):
        return False  # run.json has `shared_prefix` from the end of the first step on
    return not run.metrics_jsonl.is_file() or all(entry["step"] <= 0 for entry in read_metrics(run.metrics_jsonl))


def _is_gone(start: Mapping[str, Any]) -> bool:
    """Whether the process of a start has ended; False if this cannot be known."""
    pid = start.get("pid")
    if start.get("host") != socket.gethostname() or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # a process of another user; a number that no process has
        return False
    return False
