"""The result of a search: ranked trials, the importance of parameters, the best trial against the second."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dpokit.atomic_files import write_json, write_whole
from dpokit.console import say
from dpokit.errors import DpokitError
from dpokit.intervals import find_t
from dpokit.metrics import is_lower_better
from dpokit.report.page import write_report
from dpokit.rundir import RunDir
from dpokit.sweep.space import Space
from dpokit.sweep.study import SETTINGS, WHY, Search
from dpokit.sweep.trial import find_best_value, name_runs

LEAST_TRIALS = 8  # fewer trials give no reliable importance of a parameter


@dataclass(frozen=True)
class Ranked:
    """A trial in the table.

    Attributes:
        number: the trial's number.
        state: finished, pruned, failed, running or waiting.
        settings: the settings that differ between trials.
        values: the best value of the metric, of each seed.
        runs: the folders of its runs.
        why: why the trial was pruned or failed; else None.
    """

    number: int
    state: str
    settings: dict[str, Any]
    values: list[float]
    runs: list[Path]
    why: str | None

    @property
    def value(self) -> float | None:
        return statistics.fmean(self.values) if self.values and self.state == "finished" else None

    def record(self) -> dict[str, Any]:
        """The trial as JSON values."""
        runs = [str(run) for run in self.runs]
        values = {"trial": self.number, "state": self.state, "value": self.value, "values": self.values}
        return values | {"settings": self.settings, "runs": runs, "why": self.why}


STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def rank(space: Space, search: Search) -> list[Ranked]:
    """All trials, finished ones first, best first; in the order of their numbers if they cannot be compared."""
    trials = [_read_trial(space, search.folder, trial) for trial in search.trials()]
    sign = 1 if is_lower_better(space.metric) else -1
    states = list(STATES.values())
    worst = math.inf
    is_ranked = not space.find_obstacles()
    return sorted(
        trials,
        key=lambda trial: (
            states.index(trial.state),
            sign * trial.value if is_ranked and trial.value is not None else worst,
            trial.number,
        ),
    )


def _read_trial(space: Space, folder: Path, trial: FrozenTrial) -> Ranked:
    settings = trial.user_attrs.get(SETTINGS, {})
    runs = [folder / name for name, _ in name_runs(space, trial.number, {**space.settings, **settings})]
    started = [run for run in runs if RunDir(run).run_json.is_file()]
    values = [value for run in started if (value := find_best_value(RunDir(run), space.metric)) is not None]
    return Ranked(trial.number, STATES[trial.state], settings, values, started, trial.user_attrs.get(WHY))


def find_importances(search: Search) -> dict[str, float]:
    """Each parameter's share of the differences between trials, largest first; empty if too few have finished."""
    finished = [trial for trial in search.trials() if trial.state == TrialState.COMPLETE]
    varied = {name for trial in finished for name in trial.params if trial.params[name] != finished[0].params.get(name)}
    if len(finished) < LEAST_TRIALS or len(varied) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        return dict(optuna.importance.get_param_importances(search.study, evaluator=evaluator))
    except (ValueError, RuntimeError) as error:
        say(f"the importance of the parameters is unknown: {error}")
        return {}


def compare_best_two(ranked: Sequence[Ranked], metric: str, obstacles: Sequence[str] = ()) -> str:
    """A sentence on whether the best trial differs from the second by more than the noise between seeds.

    Args:
        obstacles: the settings because of which trials cannot be compared; the sentence then names them.
    """
    finished = [trial for trial in ranked if trial.value is not None]
    if not finished:
        return "No trial has finished."
    if obstacles:
        return describe_obstacles(metric, obstacles)
    first = finished[0]
    sentence = (
        f"Trial {first.number} has the {'lowest' if is_lower_better(metric) else 'highest'} {metric}, {first.value:.4g}"
    )
    if len(finished) == 1:
        return f"{sentence}; no other has finished."
    second = finished[1]
    sentence += f"; next is trial {second.number} with {second.value:.4g}."
    if min(len(first.values), len(second.values)) < 2:
        return f"{sentence} Each has one seed, so the noise is unknown: set seeds: 3 to estimate it."
    interval = find_interval(first.values, second.values)
    if interval is None:
        return f"{sentence} Their seeds gave equal values, so the noise is unknown."
    low, high = interval
    is_within_noise = low <= 0 <= high
    return (
        f"{sentence} By their {len(first.values)} seeds the difference is {low:+.2g} to {high:+.2g} (95 %, Welch's t): "
        + ("within noise, so either may be better." if is_within_noise else "beyond noise.")
    )


def describe_obstacles(metric: str, obstacles: Sequence[str]) -> str:
    """A sentence on why the trials of a search are not ranked."""
    return f"Not ranked, because {metric} of trials with different {' and '.join(obstacles)} cannot be compared."


def find_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the difference of two means, of two or more values each, by Welch's t (Welch, 1947).

    None if neither mean's values differ: they show no noise to compare with.
    """
    squared_errors = [statistics.variance(values) / len(values) for values in (first, second)]
    difference, error = statistics.fmean(first) - statistics.fmean(second), math.sqrt(sum(squared_errors))
    if error == 0:
        return None
    denominator = sum(
        squared_error**2 / (len(values) - 1)
        for squared_error, values in zip(squared_errors, (first, second), strict=True)
    )
    width = find_t(sum(squared_errors) ** 2 / denominator) * error
    return difference - width, difference + width


def write_outcome(space: Space, search: Search) -> dict[str, Any]:
    """Writes sweep.json, README.md, the report of all runs and the link `best`; returns the content of sweep.json."""
    ranked, importances = rank(space, search), find_importances(search)
    # A run that ended before its first evaluation has no curve to show; the table says why it ended.
    runs = [run for trial in ranked for run in trial.runs if find_best_value(RunDir(run), space.metric) is not None]
    report = None
    try:
        if runs:
            output = search.folder / "report" / "report.html"
            report = write_report(runs, output=output, metric=space.metric).report
    except DpokitError as error:
        say(f"no report could be written: {error.seen}")
    obstacles = space.find_obstacles()
    best = _link_best(search.folder, [] if obstacles else ranked)
    outcome = {
        "metric": space.metric,
        "verdict": compare_best_two(ranked, space.metric, obstacles),
        "best": None if best is None else str(best),
        "report": None if report is None else str(report),
        "importances": importances,
        "trials": [trial.record() for trial in ranked],
    }
    write_json(search.folder / "sweep.json", outcome)
    write_whole(search.folder / "README.md", describe_outcome(search.folder, outcome).encode())
    return outcome


def _link_best(folder: Path, ranked: Sequence[Ranked]) -> Path | None:
    """Points the link `best` to a run of the best trial and returns its folder; None without a finished trial."""
    link = folder / "best"
    if not ranked or ranked[0].value is None:
        if link.is_symlink():  # of an earlier metric or version
            link.unlink(missing_ok=True)
        return None
    first = ranked[0]
    distances = [abs(value - first.value) for value in first.values] if first.value is not None else []
    # Of several seeds the run nearest to their mean: the best seed would overstate the settings.
    best = first.runs[distances.index(min(distances))]
    temporary = folder / f".best-{os.getpid()}"
    temporary.symlink_to(best.name)
    temporary.replace(link)  # atomic, as another worker may do the same at this moment
    return best


def describe_outcome(folder: Path, outcome: Mapping[str, Any]) -> str:
    """The text of the search's README.md."""
    names = list(dict.fromkeys(name for trial in outcome["trials"] for name in trial["settings"]))
    lines = [f"# Search {folder.name}", "", outcome["verdict"], ""]
    if outcome["best"] is not None:
        lines += [f"Best run: [{Path(outcome['best']).name}]({Path(outcome['best']).name})"]
    if outcome["report"] is not None:
        lines += ["Curves of all runs: [report/report.html](report/report.html)"]
    lines += ["", _row(["trial", *names, outcome["metric"], "state"]), _row(["---"] * (len(names) + 3))]
    for trial in outcome["trials"]:
        cells = [describe_setting(trial["settings"].get(name, "")) for name in names]
        lines.append(_row([str(trial["trial"]), *cells, describe_values(trial["values"]), describe_state(trial)]))
    if outcome["importances"]:
        lines += ["", "Share of the differences between trials:", ""]
        lines += [f"- {name}: {share:.0%}" for name, share in outcome["importances"].items()]
    return "\n".join(lines) + "\n"


def describe_setting(value: Any) -> str:
    """A setting for the table, numbers with four digits; sweep.json has all digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_values(values: Sequence[float]) -> str:
    """The mean, with the standard deviation between seeds if there are several."""
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def describe_state(trial: Mapping[str, Any]) -> str:
    return f"{trial['state']}: {trial['why']}" if trial["why"] else str(trial["state"])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
