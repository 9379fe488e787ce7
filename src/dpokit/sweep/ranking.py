"""What a search found: trials in order, what mattered, whether the first is better than the second beyond noise."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from dpokit.console import say
from dpokit.errors import DpokitError
from dpokit.metrics import is_lower_better
from dpokit.report.page import write_report
from dpokit.rundir import RunDir, write_json, write_whole
from dpokit.sweep.space import Space
from dpokit.sweep.study import SETTINGS, WHY, Search
from dpokit.sweep.trial import find_best, name_runs

LEAST_TRIALS = 8  # fewer say nothing of a parameter's importance
# Student's t, 97.5 %, by degrees of freedom (any table of the distribution).
T_97_5: tuple[float, ...] = (
    12.71,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
T_97_5 += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Ranked:
    """A trial in the table.

    Attributes:
        number: of the trial.
        state: finished, pruned, failed, running or waiting.
        settings: what it differs in.
        values: the metric at its best, of each seed.
        runs: folders, as many.
        why: of one that was pruned or failed.
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
        """JSON values."""
        runs = [str(run) for run in self.runs]
        told = {"trial": self.number, "state": self.state, "value": self.value, "values": self.values}
        return told | {"settings": self.settings, "runs": runs, "why": self.why}


STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def rank(space: Space, search: Search) -> list[Ranked]:
    """All trials, the finished ones first, the best of them at the top."""
    found = [_read_trial(space, search.folder, trial) for trial in search.trials()]
    sign = 1 if is_lower_better(space.metric) else -1
    order = list(STATES.values())
    worst = math.inf
    return sorted(
        found, key=lambda one: (order.index(one.state), worst if one.value is None else sign * one.value, one.number)
    )


def _read_trial(space: Space, folder: Path, trial: FrozenTrial) -> Ranked:
    settings = trial.user_attrs.get(SETTINGS, {})
    runs = [folder / name for name, _ in name_runs(space, trial.number, {**space.settings, **settings})]
    there = [run for run in runs if RunDir(run).run_json.is_file()]
    values = [value for run in there if (value := find_best(RunDir(run), space.metric)) is not None]
    return Ranked(trial.number, STATES[trial.state], settings, values, there, trial.user_attrs.get(WHY))


def find_importances(search: Search) -> dict[str, float]:
    """Share of each parameter in what made trials differ, the largest first; empty where too few have finished."""
    finished = [trial for trial in search.trials() if trial.state == TrialState.COMPLETE]
    varied = {name for trial in finished for name in trial.params if trial.params[name] != finished[0].params.get(name)}
    if len(finished) < LEAST_TRIALS or len(varied) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        return dict(optuna.importance.get_param_importances(search.study, evaluator=evaluator))
    except (ValueError, RuntimeError) as error:
        say(f"the importance of parameters is not known: {error}")
        return {}


def judge(ranked: Sequence[Ranked], metric: str) -> str:
    """One sentence: whether the best trial differs from the second by more than seeds do."""
    finished = [one for one in ranked if one.value is not None]
    if not finished:
        return "No trial has finished."
    first = finished[0]
    lead = (
        f"Trial {first.number} has the {'lowest' if is_lower_better(metric) else 'highest'} {metric}, {first.value:.4g}"
    )
    if len(finished) == 1:
        return f"{lead}; no other has finished."
    second = finished[1]
    lead += f"; next is trial {second.number} with {second.value:.4g}."
    if min(len(first.values), len(second.values)) < 2:
        return f"{lead} Each was trained with one seed, so nobody knows whether that is noise: seeds: 3 would tell."
    low, high = find_interval(first.values, second.values)
    within = low <= 0 <= high
    return (
        f"{lead} By their {len(first.values)} seeds the difference is {low:+.2g} to {high:+.2g} (95 %, Welch's t): "
        + ("within noise, so either may be the better." if within else "beyond noise.")
    )


def find_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the difference of two means of two values or more, by Welch's t (B. L. Welch, 1947)."""
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    gap, error = statistics.fmean(first) - statistics.fmean(second), math.sqrt(sum(parts))
    if error == 0:
        return gap, gap
    below = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    freedom = int(sum(parts) ** 2 / below)  # rounded down: the wider interval
    width = (T_97_5[freedom - 1] if freedom <= len(T_97_5) else 1.96) * error
    return gap - width, gap + width


def write_outcome(space: Space, search: Search) -> dict[str, Any]:
    """Writes sweep.json, README.md, the report of all runs and the link `best`; returns what sweep.json holds."""
    ranked, importances = rank(space, search), find_importances(search)
    # A run that ended before its first evaluation has no place among the others' curves; the table says why.
    runs = [run for one in ranked for run in one.runs if find_best(RunDir(run), space.metric) is not None]
    report = None
    try:
        if runs:
            output = search.folder / "report" / "report.html"
            report = write_report(runs, output=output, metric=space.metric).report
    except DpokitError as error:
        say(f"no report could be written: {error.seen}")
    best = _link_best(search.folder, ranked)
    outcome = {
        "metric": space.metric,
        "verdict": judge(ranked, space.metric),
        "best": None if best is None else str(best),
        "report": None if report is None else str(report),
        "importances": importances,
        "trials": [one.record() for one in ranked],
    }
    write_json(search.folder / "sweep.json", outcome)
    write_whole(search.folder / "README.md", describe_outcome(search.folder, outcome).encode())
    return outcome


def _link_best(folder: Path, ranked: Sequence[Ranked]) -> Path | None:
    """`best` points to the best trial's best run."""
    link = folder / "best"
    if not ranked or ranked[0].value is None:
        return None
    first = ranked[0]
    gaps = [abs(value - first.value) for value in first.values] if first.value is not None else []
    # Of several seeds the one nearest to their mean: the luckiest would promise more than the settings keep.
    best = first.runs[gaps.index(min(gaps))]
    new = folder / f".best-{os.getpid()}"
    new.symlink_to(best.name)
    new.replace(link)  # another worker may do the same just now
    return best


def describe_outcome(folder: Path, outcome: Mapping[str, Any]) -> str:
    """The search's README.md."""
    names = list(dict.fromkeys(name for one in outcome["trials"] for name in one["settings"]))
    lines = [f"# Search {folder.name}", "", outcome["verdict"], ""]
    if outcome["best"] is not None:
        lines += [f"Best run: [{Path(outcome['best']).name}]({Path(outcome['best']).name})"]
    if outcome["report"] is not None:
        lines += ["Curves of all runs: [report/report.html](report/report.html)"]
    lines += ["", _row(["trial", *names, outcome["metric"], "state"]), _row(["---"] * (len(names) + 3))]
    for one in outcome["trials"]:
        cells = [describe_setting(one["settings"].get(name, "")) for name in names]
        lines.append(_row([str(one["trial"]), *cells, describe_values(one["values"]), describe_state(one)]))
    if outcome["importances"]:
        lines += ["", "What made trials differ:", ""]
        lines += [f"- {name}: {share:.0%}" for name, share in outcome["importances"].items()]
    return "\n".join(lines) + "\n"


def describe_setting(value: Any) -> str:
    """A setting in a table; sweep.json has all of its digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_values(values: Sequence[float]) -> str:
    """A mean, with the seeds' standard deviation where there are several."""
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def describe_state(one: Mapping[str, Any]) -> str:
    return f"{one['state']}: {one['why']}" if one["why"] else str(one["state"])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
