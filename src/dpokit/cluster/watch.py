"""`dpokit status` of several runs: a table, once or until all runs have ended. No torch."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta

from rich.live import Live
from rich.table import Table

from dpokit.cluster.status import Status, describe_progress, describe_seconds
from dpokit.safe_console import SafeConsole
from dpokit.terminal import echo, one_line

EVERY_SECONDS = 5.0
ENDED_EARLY = ("failed", "preempted", "killed")  # Slurm may start such a run again
LINE_SECONDS = 60.0  # between two lines about a running run where there is no terminal


def build_run_table(statuses: Sequence[Status], *, now: datetime) -> Table:
    """A row for each run: state, progress, time left and the age of the last logged step."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for name in ("step", "done", "left", "last sign"):
        table.add_column(name, justify="right")
    for status in statuses:
        decision = f", {status.next}" if status.state in ENDED_EARLY else ""
        table.add_row(
            one_line(status.run),
            "not begun" if status.state == "none" else status.state + decision,
            "" if status.last_step is None else f"{status.last_step:,}",
            "" if status.percent is None else f"{status.percent:.1f} %",
            "" if status.seconds_left is None else describe_seconds(status.seconds_left),
            "" if status.last_sign is None else describe_age(status.last_sign, now),
        )
    return table


def describe_age(moment: str, now: datetime) -> str:
    """How long ago an ISO 8601 moment was, in its largest unit: `12 s ago`, `3 h ago`."""
    seconds = max(0, (now - datetime.fromisoformat(moment)) // timedelta(seconds=1))
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def print_runs(statuses: Sequence[Status]) -> None:
    """Prints the table on stdout."""
    SafeConsole(highlight=False).print(build_run_table(statuses, now=datetime.now().astimezone()))


def watch_runs(read: Callable[[], Sequence[Status]], *, pause: Callable[[float], None] = time.sleep) -> bool:
    """Shows the runs until each has finished or stopped for good; returns whether all have finished.

    On a terminal it redraws the table every few seconds, elsewhere it prints a line for each change of a state and, at
    most each minute, for new steps. A run that has not begun, or that Slurm will requeue, is waited for.

    Args:
        read: returns the current statuses, always in the same order.
        pause: waits for some seconds.
    """
    console = SafeConsole(highlight=False)
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    printed: dict[str, tuple[str, float]] = {}
    with live or nullcontext():
        while True:
            statuses = read()
            if live is not None:
                live.update(build_run_table(statuses, now=datetime.now().astimezone()), refresh=True)
            else:
                _print_changes(statuses, printed)
            if all(has_ended(status) for status in statuses):
                return all(status.state == "finished" for status in statuses)
            pause(EVERY_SECONDS)


def has_ended(status: Status) -> bool:
    """Whether no further start of the run is expected."""
    return status.state == "finished" or (status.state in ENDED_EARLY and (status.next == "stop" or status.job is None))


def _print_changes(statuses: Sequence[Status], printed: dict[str, tuple[str, float]]) -> None:
    """Prints a line for each run that changed; `printed` has the last state of each and the time of its line."""
    for status in statuses:
        state, moment = printed.get(status.run, ("", 0.0))
        is_new = state.partition(":")[0] != status.state
        line = f"{status.state}: {describe_progress(status)}"
        if is_new or (line != state and time.monotonic() - moment >= LINE_SECONDS):
            printed[status.run] = (line, time.monotonic())
            reason = f" ({status.reason})" if status.state in ENDED_EARLY else ""
            echo(one_line(f"{status.run}: {line.replace('none: none yet', 'not begun')}{reason}"))
