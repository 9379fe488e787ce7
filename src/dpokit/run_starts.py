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
    it may be alive. A start that was resumed counts as one with steps, wherever its checkpoints are now.

    Raises: RunFolderError as `RunDir.read_run`.
    """
    record = run.read_run() or {}
    last = (record.get("generations") or [{}])[-1]
    if record.get("state") == "finished" or (record.get("state") == "running" and not is_gone(last)):
        return False
    if _is_another_process(last) or any(start.get("resumed_step") for start in record.get("generations") or []):
        return False
    before_first_step = (run.run_json, run.metrics_jsonl, run.data_json)
    if "shared_prefix" in record or any(path not in before_first_step for path in run.own_files()):
        return False  # run.json has `shared_prefix` from the end of the first step on
    if not run.metrics_jsonl.is_file():
        return True
    logged = read_metrics(run.metrics_jsonl)
    is_readable = bool(logged) or run.metrics_jsonl.stat().st_size == 0
    return is_readable and all(entry["step"] <= 0 for entry in logged)


def is_interrupted_by_another(record: Mapping[str, Any]) -> bool:
    """Whether a signal other than Ctrl-C ended the last start: a scheduler may start that run again."""
    return record.get("state") == "preempted" and not str(record.get("why")).startswith("SIGINT")


def is_gone(start: Mapping[str, Any]) -> bool:
    """Whether the process of a start has ended; False if this cannot be known."""
    return _is_alive(start) is False


def _is_another_process(start: Mapping[str, Any]) -> bool:
    """Whether a start's process lives on this host and is not this one."""
    return _is_alive(start) is True and start["pid"] != os.getpid()


def _is_alive(start: Mapping[str, Any]) -> bool | None:
    """Whether the process of a start lives; None if this cannot be known, as on another host."""
    pid = start.get("pid")
    if start.get("host") != socket.gethostname() or type(pid) is not int or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:  # a number that no process has
        return None
    except OSError:  # a process of another user
        return True
    return True
