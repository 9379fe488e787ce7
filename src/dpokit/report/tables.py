"""The tables of a report, as plain text cells. No torch."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpokit.data.tally import CUT
from dpokit.metrics import is_lower_better, list_report_columns
from dpokit.report.curves import letter
from dpokit.report.read import EVAL_LOSS, Run, choose_evaluation, finite, mapping
from dpokit.report.votes import CHOICES, count_votes
from dpokit.settings.flag_facts import Fact, flags_with

MOST_EVALUATIONS = 200
MISSING = "-"
# A cell to align by its digits: a number, perhaps with its interval.
NUMBER = re.compile(r"-?\d[\d.,e+-]*($| \()|NaN|-?$")


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title, note: text above the table.
        head: names of the columns; the first column names the row.
        rows: the cells.
        marked, mark: index of the highlighted row, and the reason for it; None for no row.
        folded: whether the table is hidden until the reader opens it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    marked: int | None = None
    mark: str = ""
    folded: bool = False

    def text_columns(self) -> set[int]:
        """Indices of the columns with text instead of numbers; always with the first one, which names the row."""
        columns = range(len(self.head))
        return {0} | {column for column in columns if not all(NUMBER.match(row[column]) for row in self.rows)}


def number(value: object) -> str:
    """A number in few digits; `NaN` for a logged value that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "NaN" if value is None else str(value)
    if finite(value) is None:
        return "NaN"
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size and not 1e-3 <= size < 1e5:
        return f"{value:.3g}"
    return f"{value:,.{4 if size < 10 else 2}f}"


def interval(value: object) -> str:
    """Formats `{value, low, high}` as `0.71 (0.69 to 0.73)`, and a plain number as `number` does."""
    if not isinstance(value, Mapping):
        return MISSING if value is None else number(value)
    text = number(value.get("value"))
    if "low" in value and "high" in value:
        # Non-breaking spaces: a line may break only before the bracket.
        text += f" ({number(value['low'])}\u00a0to\u00a0{number(value['high'])})"
    text += f", of {number(value['pairs'])} pairs" if "pairs" in value else ""
    return text + (f", p = {number(value['p'])}" if "p" in value else "")


def text_of(value: object) -> str:
    """A setting's value as on the command line."""
    if isinstance(value, float):
        return f"{value:.12g}"  # 0.3, not 0.30000000000000004
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def list_evaluations(run: Run, metric: str = EVAL_LOSS) -> Table | None:
    """The evaluations during training, one row each, as in TRL's own table; None without evaluations."""
    columns = {name: title for name, title in list_report_columns().items() if run.series(name)[0]}
    rows, steps, loss = [], [], MISSING
    for record in run.metrics:
        loss = number(record["loss"]) if "loss" in record else loss
        if any(name in record for name in columns):
            steps.append(record["step"])
            cells = [number(record[name]) if name in record else MISSING for name in columns]
            rows.append([f"{record['step']:,}", loss, *cells])
    if not rows:
        return None
    best = run.best(metric)
    marked = steps.index(best[1]) if best is not None and best[1] in steps else None
    kept = set(range(0, len(rows), -(-len(rows) // MOST_EVALUATIONS))) | {len(rows) - 1}
    kept |= {marked} if marked is not None else set()
    order = sorted(kept)
    shown = (
        ""
        if len(order) == len(rows)
        else f"{len(order):,} of {len(rows):,} evaluations, evenly spaced, with the best and the last"
    )
    end = "lowest" if is_lower_better(metric) else "highest"
    return Table(
        "Evaluations during training",
        ["step", "training loss", *columns.values()],
        [rows[index] for index in order],
        note=shown,
        marked=None if marked is None else order.index(marked),
        mark="" if marked is None else f"{end} {metric}",
    )


def list_restarts(run: Run) -> Table | None:
    """The starts of a run; None for a run that was started only once."""
    if len(run.starts) < 2:
        return None
    rows = []
    for number, start in enumerate(run.starts, start=1):
        if number == len(run.starts):
            step, ended = run.last_step, run.record.get("state")
        else:
            step, ended = start.get("ended_step"), start.get("ended")
            ended = "lost" if ended == "running" else ended
        origin = (start.get(name) for name in ("began", "host", "job", "resumed_step"))
        cells = (number, *origin, step, ended)
        rows.append([MISSING if cell is None else str(cell) for cell in cells])
    head = ["start", "began", "host", "job", "from step", "to step", "ended"]
    return Table("Starts", head, rows, note="Lost: the process ended without a record of the reason.")


def list_data(run: Run) -> list[Table]:
    """One table of the rows kept, dropped and shortened, and one of the reasons for dropping."""
    splits = [(name, split) for name, split in (run.data or {}).items() if isinstance(split, dict) and "rows" in split]
    if not splits:
        return []
    rows, reasons = [], []
    for name, split in splits:
        cut = mapping(split.get("shortened"))
        count, kept = split.get("rows") or 0, split.get("kept") or 0
        counts = [number(v) for v in (count, kept, count - kept, *(cut.get(part, 0) for part in CUT))]
        rows.append([name, *counts, f"{split.get('format', MISSING)}; {split.get('source', MISSING)}"])
        reasons += [[name, reason, number(n)] for reason, n in mapping(split.get("dropped")).items()]
    head = ["split", "rows", "kept", "dropped", *(f"{part} cut" for part in CUT), "format and source"]
    tables = [Table("Data", head, rows)]
    return tables + ([Table("Dropped rows", ["split", "reason", "rows"], reasons)] if reasons else [])


def list_pairs(run: Run) -> list[Table]:
    """The results of `dpokit evaluate`: base and tuned on held-out pairs, then by groups of pairs."""
    pairs = run.pairs or {}
    sides = {side: pairs[side] for side in ("base", "tuned") if isinstance(pairs.get(side), dict)}
    if not sides:
        return []
    names = dict.fromkeys(name for side in sides.values() for name in side if name != "model")
    changes = mapping(pairs.get("difference"))
    rows = [[n, *(interval(side.get(n)) for side in sides.values()), interval(changes.get(n))] for n in names]
    note = describe_choice(run)
    if pairs.get("always_longer") is not None:
        note += f" Always preferring the longer answer has an accuracy of {interval(pairs['always_longer'])}."
    tables = [Table("Held-out pairs, base and tuned", ["", *sides, "difference"], rows, note=note)]
    for kind, groups in mapping(pairs.get("groups")).items():
        cells = [
            [str(g.get("name")), number(g.get("pairs")), *(interval(g.get(n)) for n in ("accuracy", "margin", "loss"))]
            for g in groups
            if isinstance(g, dict)
        ]
        head = [kind, "pairs", "accuracy", "margin", "loss"]
        tables += [Table(f"Held-out pairs by {kind}", head, cells)] if cells else []
    return tables


def describe_choice(run: Run) -> str:
    """Sentences on the evaluation that is shown: its pairs, and its name and rank among several."""
    if (shown := run.evaluation) is None:
        return ""
    data = shown.data
    count, available = (number(data[name]) if name in data else "" for name in ("pairs", "available"))
    count = f"{count} of {available} pairs" if available not in ("", count) else f"{count or 'The'} pairs"
    text = f"{count} of {data.get('name', 'the data')}, with 95 % intervals."
    scored = [evaluation for evaluation in run.evaluations if evaluation.pairs is not None]
    if len(scored) < 2:
        return text
    kind = "of the run's own held-out pairs" if shown.rank(0)[0] else "of the run"
    reason = (
        f"the largest {kind} among {len(scored)} evaluations"
        if shown is choose_evaluation(scored)
        else (f"chosen among {len(scored)} evaluations")
    )
    return f"{text} This is {shown.name}, {reason}."


def list_all_evaluations(run: Run) -> Table | None:
    """All evaluations by `dpokit evaluate`, the one that is shown marked; None for fewer than two."""
    scored = [evaluation for evaluation in run.evaluations if evaluation.pairs is not None]
    if len(scored) < 2:
        return None
    rows = []
    for evaluation in scored:
        data, tuned = evaluation.data, mapping(mapping(evaluation.pairs).get("tuned"))
        better = mapping(mapping(evaluation.pairs).get("verdict")).get("better")
        verdict = "better" if better is True else "worse" if better is False else "no difference shown"
        cells = [evaluation.made.replace("T", " ")[:16] or MISSING, str(data.get("name", MISSING))]
        cells += [number(data["pairs"]) if "pairs" in data else MISSING, ", ".join(evaluation.changed) or MISSING]
        rows.append([evaluation.name, *cells, interval(tuned.get("accuracy")), interval(tuned.get("loss")), verdict])
    marked = next((index for index, other in enumerate(scored) if other is run.evaluation), None)
    return Table(
        "Evaluations by dpokit evaluate",
        ["evaluation", "made, UTC", "data", "pairs", "changed", "accuracy", "loss", "verdict"],
        rows,
        note="dpokit report RUN --evaluation NAME shows another one; dpokit card RUN too.",
        marked=marked,
        mark="" if marked is None else "shown above",
    )


def list_answers(run: Run) -> Table | None:
    """Measures of the sampled answers; None without sampled answers."""
    numbers = run.answer_numbers or {}
    sides = {side: numbers[side] for side in ("base", "tuned") if isinstance(numbers.get(side), dict)}
    names = dict.fromkeys(name for side in sides.values() for name in side)
    rows = [[name, *(interval(side.get(name)) for side in sides.values())] for name in names]
    judge = numbers.get("judge")
    note = ""
    if run.answered is not None and run.answered is not run.evaluation:
        note = f"From {run.answered.name}, of {run.answered.data.get('name', 'the data')}. "
    if isinstance(judge, dict):
        counts = ", ".join(f"{number(judge[n])} {n}" for n in ("wins", "ties", "losses") if n in judge)
        note += f"A judge compared tuned with base: {counts}; win rate {interval(judge.get('win_rate'))}."
    return Table("Sampled answers", ["", *sides], rows, note=note) if rows else None


def list_votes(run: Run) -> Table | None:
    """The counted votes; None without votes."""
    rows = []
    for name, votes in (("blind", [v for v in run.votes if v.get("blind")]), ("all", run.votes)):
        count = count_votes(votes)
        if count.votes:
            rows.append([name, *(number(count.counts[choice]) for choice in CHOICES), interval(count.win_rate)])
    note = "The win rate is tuned's share of the votes with a preference, with its 95 % interval (Wilson)."
    head = ["votes", *(choice.replace("_", " ") for choice in CHOICES), "win rate"]
    return Table("Votes", head, rows, note=note) if rows else None


def list_settings(run: Run) -> list[Table]:
    """One table of the chosen settings, and one of the defaults, each setting with its origin."""
    rows = [[n, text_of(e.get("value")), str(e.get("origin", MISSING))] for n, e in sorted(run.settings().items())]
    head = ["setting", "value", "origin"]
    chosen, defaults = [r for r in rows if r[2] != "default"], [r for r in rows if r[2] == "default"]
    tables = [Table("Settings", head, chosen)] if chosen else []
    title = f"Settings left at their defaults ({len(defaults)})"
    return tables + ([Table(title, head, defaults, folded=True)] if defaults else [])


def compare_runs(runs: Sequence[Run], metric: str, *, is_ranked: bool = True) -> list[Table]:
    """One table of the runs with their best values and differing settings, and one of the settings that they share.

    Args:
        is_ranked: whether the runs are sorted by the metric, the best first.
    """
    names = sorted({name for run in runs for name in run.settings()}.difference(flags_with(Fact.RUN_NAME)))
    chosen = {name for run in runs for name, entry in run.settings().items() if entry.get("origin") != "default"}
    differ = [name for name in names if len({text_of(run.setting(name)) for run in runs}) > 1]
    rows = []
    for index, run in enumerate(runs):
        value, step = run.best(metric) or (None, 0)
        state = [str(run.record.get("state", MISSING)), number(run.last_step or 0)]
        rows.append([letter(index), run.name, number(value), f"{step:,}", *state, *_cells(run, differ)])
    end = "lowest" if is_lower_better(metric) else "highest"
    head = ["", "run", f"{end} {metric}", "at step", "state", "last step", *differ]
    note = f"Sorted by {metric}. " if is_ranked else "In the order of the command. "
    note += "The columns after the last step: settings that differ." if differ else "No setting differs."
    shared = [[name, text_of(runs[0].setting(name))] for name in names if name not in differ and name in chosen]
    marked, mark = (0, f"{end} {metric}") if is_ranked else (None, "")
    tables = [Table("Runs", head, rows, note=note, marked=marked, mark=mark)]
    return tables + ([Table("Settings that all share", ["setting", "value"], shared)] if shared else [])


def _cells(run: Run, names: Iterable[str]) -> list[str]:
    settings: Mapping[str, Any] = run.settings()
    return [text_of(settings[name].get("value")) if name in settings else MISSING for name in names]
