"""What a run folder says of its run, and what should become of it: done, requeue or stop. No torch."""

import os
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpokit import errors
from dpokit.checkpoint.store import find_checkpoints
from dpokit.errors import DpokitError, RunFolderError
from dpokit.rundir import RunDir, read_metrics
from dpokit.terminal import one_line

# Crashes of one job that end in another start; preemptions are not counted.
MAX_RESTARTS = 3
# What another start, on other nodes perhaps, may well survive. Every other error of ours is the user's to mend.
WORTH_ANOTHER_START = ("MachineError", "OutOfMemoryError")


@dataclass(frozen=True)
class Status:
    """A run as its folder shows it.

    Attributes:
        run: the folder.
        state: `running` (or killed: nobody wrote an end), `preempted`, `finished`, `failed`; `none` without a run.json.
        why, error: what ended a failed run, in words and as the name of its class.
        last_step: the last logged one; None before any.
        last_sign: when the run last wrote to its metrics, ISO 8601; None before any.
        good_step: the step of the newest checkpoint that is whole; None without one.
        generations: how often the run was started.
        restarts: starts after the first.
        after_crash: those of them, in the job that ran last, that followed neither a preemption nor an end of its own.
        lost_steps: steps that restarts had to train once more.
        lost_seconds: the time they took, by the median of the steps that were kept; None before a second logged step.
        next: `done`, `requeue` or `stop`.
        reason: of `next`, in a sentence.
    """

    run: str
    state: str
    why: str | None
    error: str | None
    last_step: int | None
    last_sign: str | None
    good_step: int | None
    generations: int
    restarts: int
    after_crash: int
    lost_steps: int
    lost_seconds: float | None
    next: str
    reason: str

    def record(self) -> dict[str, Any]:
        """JSON values, for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Attempt:
    """A start of a job, which asks what should become of the job now.

    Attributes:
        since: how many starts the run folder showed before it. Where it shows no more, this one never began, and
            whatever the folder says is of an older one.
        host: where it has its first process. Where the folder's last start is of another host, that one has taken the
            run over. (Several of one host are a launcher's own restarts.)
        job: the job's number; None outside Slurm.
        number: which start of the job it is, from 1.
    """

    since: int
    host: str
    job: str | None = None
    number: int = 1


def find_attempt(since: int) -> Attempt:
    """The start that this process is part of."""
    number = int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1
    return Attempt(since, socket.gethostname(), os.environ.get("SLURM_JOB_ID"), number)


def read_status(run: RunDir, *, max_restarts: int = MAX_RESTARTS, attempt: Attempt | None = None) -> Status:
    """The status of a run, from its folder alone.

    Args:
        run: the folder; it need not exist.
        max_restarts: crashes that may be followed by another start.
        attempt: the start that asks; None for the last one.

    Raises:
        RunFolderError: run.json is damaged.
    """
    record = run.read_run() or {}
    metrics = read_metrics(run.metrics_jsonl) if run.metrics_jsonl.is_file() else []
    generations: list[dict[str, Any]] = record.get("generations") or []
    good = find_good_step(run)
    after_crash = count_crashes(generations)
    lost = sum(_lost_steps(generations))
    step_seconds = _median_step_seconds(metrics)
    decided, reason = decide_next(
        record, good_step=good, after_crash=after_crash, max_restarts=max_restarts, attempt=attempt
    )
    return Status(
        run=str(run.path),
        state=record.get("state") or "none",
        why=record.get("why"),
        error=record.get("error"),
        last_step=metrics[-1]["step"] if metrics else None,
        last_sign=_time_of(run.metrics_jsonl) if metrics else None,
        good_step=good,
        generations=len(generations),
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
    """`done`, `requeue` or `stop`, and why.

    Args:
        record: run.json; empty without one.
        good_step: of the newest checkpoint that is whole.
        after_crash, max_restarts: how many starts followed a crash, and how many may.
        attempt: as for `read_status`.
    """
    state, generations = record.get("state"), record.get("generations") or []
    if attempt is not None and len(generations) <= attempt.since:
        return _decide_for_unbegun(attempt, record, max_restarts)
    if attempt is not None and generations[-1].get("host") != attempt.host:
        return "stop", f"a later start, on {generations[-1].get('host')}, has taken the run over"
    if state == "finished":
        return "done", "the run is finished"
    if state not in ("running", "preempted", "failed"):
        return "stop", "there is no run here: none began, or none of this toolkit"
    if state == "failed" and is_users_mistake(record.get("error")):
        return "stop", f"another start would meet the same: {record.get('why')}"
    if stands_still(generations, good_step):
        return "stop", f"the last two starts both began at step {good_step or 0} and neither left a newer checkpoint"
    if state == "preempted":
        return "requeue", "the run was preempted"
    ended = "nobody wrote an end: killed, or still running" if state == "running" else str(record.get("why"))
    if after_crash >= max_restarts:
        return "stop", f"{after_crash + 1} crashes, and {max_restarts} restarts are allowed; the last: {ended}"
    return "requeue", ended


def _decide_for_unbegun(attempt: Attempt, record: Mapping[str, Any], max_restarts: int) -> tuple[str, str]:
    """Where an earlier start of the job did begin, the command is right, and what ended this one was the machines."""
    begun = sum(one.get("job") == attempt.job for one in record.get("generations") or [])
    lost = attempt.number - begun
    if attempt.job is None or not begun or record.get("state") == "finished":
        return "stop", "the run never began: the first error in the log says why"
    if lost > max_restarts:
        return "stop", f"{lost} starts of this job never began, and {max_restarts} restarts are allowed"
    return "requeue", "this start ended before it began, as others of the job have not"


def is_users_mistake(error: str | None) -> bool:
    """True for the name of an error of ours that no other machine would mend."""
    kind = getattr(errors, error or "", None)
    ours = isinstance(kind, type) and issubclass(kind, DpokitError)
    return ours and error not in WORTH_ANOTHER_START


def stands_still(generations: Sequence[Mapping[str, Any]], good_step: int | None) -> bool:
    """True where the last two starts of one job began at the same step, which is still the newest good one."""
    last = _of_last_job(generations)[-2:]
    return len(last) == 2 and {int(one.get("resumed_step") or 0) for one in last} == {good_step or 0}


def count_crashes(generations: Sequence[Mapping[str, Any]]) -> int:
    """How many starts of the job that ran last followed a crash.

    `ended` says what state the next start found. Without it, one that lost steps has crashed: a preempted run saves its
    last step.
    """
    mine = _of_last_job(generations)
    ends = [
        one.get("ended") or ("failed" if lost else "preempted")
        for one, lost in zip(mine, _lost_steps(mine), strict=False)
    ]
    return sum(end not in ("preempted", "finished") for end in ends)


def find_good_step(run: RunDir) -> int | None:
    """The step of the newest checkpoint that is whole by its manifest's names and sizes; None without one."""
    whole = (checkpoint.step for checkpoint in find_checkpoints(run, deep=False) if checkpoint.resume_problem is None)
    return next(whole, None)


def _of_last_job(generations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Starts under another job than the last one's are of the past: whoever submits anew has a new count."""
    return [one for one in generations if one.get("job") == generations[-1].get("job")]


def _lost_steps(generations: Sequence[Mapping[str, Any]]) -> Iterable[int]:
    for one, after in pairwise(generations):
        yield max(0, int(one.get("ended_step") or 0) - int(after.get("resumed_step") or 0))


def _median_step_seconds(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    between = [(after["seconds"] - one["seconds"]) / (after["step"] - one["step"]) for one, after in pairwise(metrics)]
    return statistics.median(between) if between else None


def _time_of(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")


def check_run(run: RunDir) -> None:
    """Raises RunFolderError where there is no run to speak of."""
    if not run.run_json.is_file():
        raise RunFolderError(
            f"{run.path} holds no run.json" if run.path.is_dir() else f"there is no folder {run.path}",
            expected="the folder of a run: its --output_dir",
            do="correct the path, or look at the log of the job: a run that never began has no folder",
        )


def describe(status: Status) -> str:
    """The status in a few lines, for the screen."""
    state = f"{status.state} ({status.why})" if status.why else status.state
    if status.state == "running":
        state = f"running, or killed; last sign of life {status.last_sign or 'none yet'}"
    lost = f"{status.lost_steps:,} steps trained twice"
    if status.lost_steps and status.lost_seconds is not None:
        lost += f", about {status.lost_seconds:,.0f} s"
    lines = {
        "run": status.run,
        "state": state,
        "last logged step": "none yet" if status.last_step is None else f"{status.last_step:,}",
        "last good checkpoint": "none yet" if status.good_step is None else f"checkpoint-{status.good_step}",
        "restarts": f"{status.restarts} ({status.after_crash} after a crash)" if status.restarts else "0",
        "lost": lost,
        "next": f"{status.next}: {status.reason}",
    }
    return "\n".join(f"{name:<22}{one_line(text)}" for name, text in lines.items())
