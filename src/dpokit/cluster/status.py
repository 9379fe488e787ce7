"""The status of a run from its folder, and whether its job is done, is requeued or stops. No torch."""

import os
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpokit import errors
from dpokit.checkpoint.store import find_checkpoints
from dpokit.errors import DpokitError
from dpokit.run_starts import count_starts, is_gone
from dpokit.rundir import RunDir, read_metrics
from dpokit.terminal import one_line

# How many crashes of one job lead to another start; preemptions are not counted.
MAX_RESTARTS = 3
RECENT = 50  # logged steps by which the time left is estimated
MOST_SECONDS = 1e9  # a longer time is a damaged record
# Errors that another start may avoid, perhaps on other nodes. The user has to correct every other DpokitError.
RETRYABLE_ERRORS = ("MachineError", "OutOfMemoryError")


@dataclass(frozen=True)
class Status:
    """The status of a run, from its folder.

    Attributes:
        run: the folder.
        state: `running` (or killed on another host, as no end is recorded), `killed`, `preempted`, `finished`,
            `failed`; `none` without run.json.
        why, error: the cause of a failed run, as text and as the name of the error's class.
        last_step: the last logged step; None before the first.
        steps: the number of steps of the whole run; None if it is not recorded yet.
        percent: the share of them that is done; None without `steps`.
        seconds_left: how long the other steps will take, by the latest ones; None without `steps`, before a second
            logged step, and after the end.
        last_sign: when the run last wrote to its metrics, ISO 8601; None before the first time.
        good_step: the step of the newest complete checkpoint; None without one.
        job: the Slurm job of the last start, which may start it again; None outside Slurm.
        generations: how often the run was started.
        began: how many starts the folder has seen, also those of runs that it no longer holds (for `--since`).
        restarts: the number of starts after the first.
        after_crash: the number of starts, in the job that ran last, that followed a crash.
        lost_steps: the number of steps that restarts trained again.
        lost_seconds: the time these steps took, by the median of the kept steps; None before a second logged step.
        next: `done`, `requeue` or `stop`.
        reason: why, in a sentence.
    """

    run: str
    state: str
    why: str | None
    error: str | None
    last_step: int | None
    steps: int | None
    percent: float | None
    seconds_left: float | None
    last_sign: str | None
    good_step: int | None
    job: str | None
    generations: int
    began: int
    restarts: int
    after_crash: int
    lost_steps: int
    lost_seconds: float | None
    next: str
    reason: str

    def record(self) -> dict[str, Any]:
        """The status as JSON values, for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Attempt:
    """A start of a job, for which `decide_next` decides what the job does next.

    Attributes:
        since: how many starts the run folder had seen before it (`Status.began`). If it has seen no more now, this
            start never began, and the folder describes an older one.
        host: the host of its first process. If the folder's last start is on another host, that one has taken over
            the run. (Several starts on one host are the launcher's own restarts.)
        job: the job's number; None outside Slurm.
        number: the number of this start within the job, from 1.
    """

    since: int
    host: str
    job: str | None = None
    number: int = 1


def find_attempt(since: int) -> Attempt:
    """The start that this process belongs to."""
    number = int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1
    return Attempt(since, socket.gethostname(), os.environ.get("SLURM_JOB_ID"), number)


def read_status(run: RunDir, *, max_restarts: int = MAX_RESTARTS, attempt: Attempt | None = None) -> Status:
    """The status of a run, from its folder alone.

    Args:
        run: the folder; it need not exist.
        max_restarts: how many crashes may lead to another start.
        attempt: the start to decide for; None for the last one.

    Raises:
        RunFolderError: run.json is damaged.
    """
    record = run.read_run() or {}
    metrics = read_metrics(run.metrics_jsonl) if run.metrics_jsonl.is_file() else []
    generations: list[dict[str, Any]] = record.get("generations") or []
    good = find_good_step(run)
    after_crash = count_crashes(generations)
    lost = sum(_count_lost_steps(generations))
    step_seconds = _median_step_seconds(metrics)
    steps = _find_steps(record)
    last_step = metrics[-1]["step"] if metrics else None
    decided, reason = decide_next(
        record, good_step=good, after_crash=after_crash, max_restarts=max_restarts, attempt=attempt
    )
    is_killed = record.get("state") == "running" and bool(generations) and is_gone(generations[-1])
    return Status(
        run=str(run.path),
        state="killed" if is_killed else record.get("state") or "none",
        why=record.get("why"),
        error=record.get("error"),
        last_step=last_step,
        steps=steps,
        percent=None if steps is None else round(100 * (last_step or 0) / steps, 1),
        seconds_left=find_seconds_left(metrics, steps) if record.get("state") != "finished" else None,
        last_sign=_read_modification_time(run.metrics_jsonl) if metrics else None,
        good_step=good,
        job=generations[-1].get("job") if generations else None,
        generations=len(generations),
        began=count_starts(record),
        restarts=max(0, len(generations) - 1),
        after_crash=after_crash,
        lost_steps=lost,
        lost_seconds=None if step_seconds is None else round(lost * step_seconds, 1),
        next=decided,
        reason=reason,
    )


def decide_next(
    record: Mapping[str, Any],
    *,
    good_step: int | None,
    after_crash: int,
    max_restarts: int,
    attempt: Attempt | None = None,
) -> tuple[str, str]:
    """`done`, `requeue` or `stop`, and the reason.

    Args:
        record: run.json; empty without one.
        good_step: the step of the newest complete checkpoint.
        after_crash, max_restarts: how many starts followed a crash, and how many may.
        attempt: as for `read_status`.
    """
    state, generations = record.get("state"), record.get("generations") or []
    if attempt is not None and count_starts(record) <= attempt.since:
        return _decide_before_first_record(attempt, record, max_restarts)
    if attempt is not None and generations[-1].get("host") != attempt.host:
        return "stop", f"a later start, on {generations[-1].get('host')}, has taken the run over"
    if state == "finished":
        return "done", "the run is finished"
    if state not in ("running", "preempted", "failed"):
        return "stop", "this folder holds no run of dpokit, or the run never began"
    if state == "failed" and is_user_error(record.get("error")):
        return "stop", f"another start would fail in the same way: {record.get('why')}"
    if is_stuck(generations, good_step):
        return "stop", f"the last two starts both began at step {good_step or 0} and neither left a newer checkpoint"
    if state == "preempted":
        return "requeue", "the run was preempted"
    cause = "no end is recorded: killed, or still running" if state == "running" else str(record.get("why"))
    if after_crash >= max_restarts:
        return "stop", f"{after_crash + 1} crashes, and {max_restarts} restarts are allowed; the last: {cause}"
    return "requeue", cause


def _decide_before_first_record(attempt: Attempt, record: Mapping[str, Any], max_restarts: int) -> tuple[str, str]:
    """The decision after a start that never began.

    If an earlier start of the job did begin, the command is right, and a machine ended this start.
    """
    begun_starts = sum(start.get("job") == attempt.job for start in record.get("generations") or [])
    unbegun_starts = attempt.number - begun_starts
    if attempt.job is None or not begun_starts or record.get("state") == "finished":
        return "stop", "the run never began: see the first error in the log"
    if unbegun_starts > max_restarts:
        return "stop", f"{unbegun_starts} starts of this job never began, and {max_restarts} restarts are allowed"
    return "requeue", "this start never began, but an earlier start of the job did"


def is_user_error(error: str | None) -> bool:
    """True for the name of a DpokitError that another machine would not avoid."""
    kind = getattr(errors, error or "", None)
    is_dpokit_error = isinstance(kind, type) and issubclass(kind, DpokitError)
    return is_dpokit_error and error not in RETRYABLE_ERRORS


def is_stuck(generations: Sequence[Mapping[str, Any]], good_step: int | None) -> bool:
    """True if the last two starts of one job began at the same step, and no newer complete checkpoint exists."""
    last_starts = _select_last_job(generations)[-2:]
    return len(last_starts) == 2 and {int(start.get("resumed_step") or 0) for start in last_starts} == {good_step or 0}


def count_crashes(generations: Sequence[Mapping[str, Any]]) -> int:
    """How many starts of the job that ran last followed a crash.

    `ended` is the state that the next start read. Without it, a start that lost steps has crashed, because a preempted
    run saves its last step.
    """
    starts = _select_last_job(generations)
    ends = [
        start.get("ended") or ("failed" if lost else "preempted")
        for start, lost in zip(starts, _count_lost_steps(starts), strict=False)
    ]
    return sum(end not in ("preempted", "finished") for end in ends)


def find_good_step(run: RunDir) -> int | None:
    """The step of the newest checkpoint whose files match its manifest by name and size; None without one."""
    whole = (checkpoint.step for checkpoint in find_checkpoints(run, deep=False) if checkpoint.resume_problem is None)
    return next(whole, None)


def _select_last_job(generations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The starts of the last start's job: a newly submitted job has a new count."""
    return [start for start in generations if start.get("job") == generations[-1].get("job")]


def _count_lost_steps(generations: Sequence[Mapping[str, Any]]) -> Iterable[int]:
    for start, next_start in pairwise(generations):
        yield max(0, int(start.get("ended_step") or 0) - int(next_start.get("resumed_step") or 0))


def _median_step_seconds(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    step_seconds = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"]) for before, after in pairwise(metrics)
    ]
    return statistics.median(step_seconds) if step_seconds else None


def _find_steps(record: Mapping[str, Any]) -> int | None:
    """The number of steps of the whole run; None if it is unknown, as in a record of dpokit 0.1 without max_steps."""
    steps = record.get("steps") or record.get("settings", {}).get("max_steps", {}).get("value")
    return steps if isinstance(steps, int) and steps > 0 else None


def find_seconds_left(metrics: Sequence[Mapping[str, Any]], steps: int | None) -> float | None:
    """The seconds of the steps that are left, by the mean of the latest RECENT logged ones, with their evaluations."""
    latest = [record for record in metrics[-RECENT:] if isinstance(record.get("seconds"), int | float)]
    if steps is None or len(latest) < 2 or latest[-1]["step"] <= latest[0]["step"]:
        return None
    step_seconds = (latest[-1]["seconds"] - latest[0]["seconds"]) / (latest[-1]["step"] - latest[0]["step"])
    seconds = (steps - latest[-1]["step"]) * step_seconds
    return round(max(0.0, seconds), 1) if abs(seconds) < MOST_SECONDS else None


def _read_modification_time(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")


def describe_progress(status: Status) -> str:
    """The last step of all, the share that is done and the time left: `1,200 of 3,000, 40.0 %, 0:31:10 left`."""
    step = "none yet" if status.last_step is None else f"{status.last_step:,}"
    if status.steps is None:
        return step
    left = "" if status.seconds_left is None else f", {describe_seconds(status.seconds_left)} left"
    return f"{step} of {status.steps:,}, {status.percent:.1f} %{left}"


def describe_seconds(seconds: float) -> str:
    """A duration as `0:31:10` or `2 days, 1:00:00`."""
    return str(timedelta(seconds=round(seconds)))


def describe_status(status: Status) -> str:
    """The status as a few lines of text."""
    state = f"{status.state} ({status.why})" if status.why else status.state
    if status.state == "running":
        state = f"running, or killed; last sign of life {status.last_sign or 'none yet'}"
    if status.state == "none":
        state = "not begun: the folder holds no run.json; if its job has ended, its log says why"
    lost = f"{status.lost_steps:,} steps trained twice"
    if status.lost_steps and status.lost_seconds is not None:
        lost += f", about {status.lost_seconds:,.0f} s"
    lines = {
        "run": status.run,
        "state": state,
        "last logged step": describe_progress(status),
        "last good checkpoint": "none yet" if status.good_step is None else f"checkpoint-{status.good_step}",
        "restarts": f"{status.restarts} ({status.after_crash} after a crash)" if status.restarts else "0",
        "lost": lost,
        "next": f"{status.next}: {status.reason}",
    }
    if status.state == "none":  # the decision is about a job that has ended, and this one may wait in the queue
        del lines["next"]
    return "\n".join(f"{name:<22}{one_line(text)}" for name, text in lines.items())
