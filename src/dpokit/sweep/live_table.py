"""The screen of a search: a table that is updated while it runs, and its result at the end."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.live import Live
from rich.table import Table

from dpokit.rundir import RunDir
from dpokit.safe_console import SafeConsole
from dpokit.sweep.ranking import describe_setting, describe_state, describe_values, rank
from dpokit.sweep.space import Space
from dpokit.sweep.study import Search
from dpokit.sweep.trial import follow
from dpokit.terminal import echo

MOST_ROWS = 40


class Screen:
    """Shows a search on stderr: a live table on a terminal, else a line for each trial whose state changes."""

    def __init__(self, space: Space, search: Search) -> None:
        self.space = space
        self.search = search
        self.console = SafeConsole(stderr=True, highlight=False)
        self.live: Live | None = None
        self._printed_states: dict[int, str] = {}

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.show()
            self.live.stop()

    def show(self) -> None:
        """Updates the table, or prints a line for each changed state."""
        if self.live is not None:
            self.live.update(build_table(self.space, self.search), refresh=True)
            return
        for trial in sorted(rank(self.space, self.search), key=lambda trial: trial.number):
            if self._printed_states.get(trial.number) != trial.state and trial.state != "waiting":
                self._printed_states[trial.number] = trial.state
                value = f", {self.space.metric} {describe_values(trial.values)}" if trial.value is not None else ""
                echo(f"trial {trial.number}: {describe_state(trial.record())}{value}", err=True)


def build_table(space: Space, search: Search) -> Table:
    """A table of the trials in their current order."""
    ranked = rank(space, search)
    names = list(dict.fromkeys(name for trial in ranked for name in trial.settings))
    ended = sum(trial.state in ("finished", "pruned", "failed") for trial in ranked)
    table = Table(title=f"{search.folder}: {ended} of {space.trials} trials", title_justify="left", box=None)
    for name in ("trial", *names, space.metric, "state"):
        table.add_column(name, justify="left" if name in names else "right" if name != "state" else "left")
    for trial in ranked[:MOST_ROWS]:
        state = describe_state(trial.record())[:60]
        if trial.state == "running":
            state += "".join(f", {_describe_progress(RunDir(run), space.metric)}" for run in trial.runs[-1:])
        cells = [describe_setting(trial.settings.get(name, "")) for name in names]
        table.add_row(str(trial.number), *cells, describe_values(trial.values), state)
    if len(ranked) > MOST_ROWS:
        table.add_row("...", *[""] * len(names), "", f"and {len(ranked) - MOST_ROWS} more")
    return table


def _describe_progress(run: RunDir, metric: str) -> str:
    logged = follow(run, metric)
    return f"step {logged[-1]['step']:,}" if logged else "preparing"


def watch(
    space: Space, search: Search, *, every_seconds: float = 2.0, pause: Callable[[float], None] = time.sleep
) -> None:
    """Shows a search of other workers until it is over or the user interrupts."""
    with Screen(space, search) as screen:
        while True:
            screen.show()
            if search.is_over():
                return
            pause(every_seconds)


def print_outcome(outcome: Mapping[str, Any]) -> None:
    """Prints the result of a search on stdout."""
    echo(outcome["verdict"])
    for name, share in outcome["importances"].items():
        echo(f"  {name}: {share:.0%} of the differences between trials")
    for name in ("best", "report"):
        if outcome[name] is not None:
            echo(f"{name}: {outcome[name]}")
