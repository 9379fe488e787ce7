"""Which figures a report has, from the records of its runs. No torch."""

from collections.abc import Sequence
from typing import Any

from dpokit.figures import MOST_RAW_LINES, Figure, Line, is_wide
from dpokit.metrics import EVAL, FIGURES, list_figure
from dpokit.report.read import Run
from dpokit.untrained_loss import LN_2, find_untrained_loss


def build_figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures of which there is anything to show: one run with all its lines, or several runs over each other."""
    return _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)


def letter(number: int) -> str:
    """What a run is called in figures and tables: A to Z, then A2 to Z2 and so on."""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


def find_start_loss(run: Run) -> tuple[float, str] | None:
    """The loss of a policy that is still its reference, and its name; None where the loss tells no such number."""
    kinds = run.setting("loss_type")
    kinds = [kinds] if isinstance(kinds, str) else (kinds or ["sigmoid"])
    loss = find_untrained_loss(kinds, run.setting("loss_weights"), use_weighting=bool(run.setting("use_weighting")))
    if loss is None:
        return None
    weight = loss / LN_2
    return loss, f"{'' if weight == 1 else f'{weight:g} x '}ln 2 = {loss:.3f}"


def explain_figures(runs: Sequence[Run]) -> str:
    """How the figures are to be read."""
    raw = "Pale: each logged value; over it, where they are many, their running mean."
    told = [
        raw
        if len(runs) <= MOST_RAW_LINES
        else "Of many logged values the running mean is drawn; each run's own report has them all.",
        "A cross at the foot: a value that was not finite.",
    ]
    if any(len(run.starts) > 1 for run in runs):
        told.append(f"{'A dotted upright line' if len(runs) == 1 else 'A triangle at the foot'}: a restart.")
    if any(find_start_loss(run) is None for run in runs):
        told.append("ln 2 is not marked, as the loss of an untrained model is another one here (loss_type).")
    return " ".join(told)


def _of_one(run: Run) -> list[Figure]:
    restarts = [(start.get("resumed_step") or 0, None) for start in run.starts[1:]]
    figures = []
    for key, title in FIGURES.items():
        lines, metrics = [], list_figure(key)
        for number, metric in enumerate(metrics):
            beside = len(metrics) > 1  # then colour tells chosen from rejected, and dots tell an evaluation
            lines += _line(run, metric.name, _words(metric.line, "training"), number, noisy=not metric.exact)
            evaluated = _words(metric.line, "evaluation")
            lines += _line(run, EVAL + metric.name, evaluated, number if beside else 1, dots=True)
        figures += _figure(key, title, lines, [run], restarts=restarts)
    return figures


def _of_several(runs: Sequence[Run]) -> list[Figure]:
    figures = []
    restarts = [(start.get("resumed_step") or 0, at) for at, run in enumerate(runs) for start in run.starts[1:]]
    for key, title in FIGURES.items():
        for metric in list_figure(key):
            for prefix in ("", EVAL):
                kind = ("evaluation" if prefix else "training") if _has(runs, EVAL + metric.name) else ""
                lines = [
                    line
                    for at, run in enumerate(runs)
                    for line in _line(
                        run,
                        prefix + metric.name,
                        name_line(at, run.name),
                        at,
                        dots=bool(prefix),
                        noisy=not prefix and not metric.exact,
                    )
                ]
                name = "-".join(filter(None, (prefix.rstrip("_"), key, metric.line)))
                words = _words(title, metric.line, kind)
                figures += _figure(name, words, lines, runs, restarts=restarts)
    return figures


def name_line(number: int, name: str) -> str:
    """A run in a legend: its letter, and as much of its name as there is room for."""
    name = "".join(sign if sign.isprintable() else "?" for sign in name)
    return f"{letter(number)}  {name if len(name) <= 22 else f'{name[:10]}...{name[-9:]}'}"


def _line(run: Run, metric: str, label: str, style: int, **more: bool) -> list[Line]:
    steps, values = run.series(metric)
    return [Line(label, steps, values, style, **more)] if steps else []


def _figure(key: str, title: str, lines: list[Line], runs: Sequence[Run], **more: Any) -> list[Figure]:
    if not any(value is not None for line in lines for value in line.values):
        return []
    level, level_label = None, ""
    if title.startswith("Loss"):
        known = {find_start_loss(run) for run in runs}
        only = known.pop() if len(known) == 1 else None
        level, level_label = only or (None, "")
    elif title.startswith("Accuracy"):
        level, level_label = 0.5, "chance"
    log = any(metric.scale == "log" for metric in list_figure(key)) and all(is_wide(line.values) for line in lines)
    return [Figure(key, title + (", log" if log else ""), lines, level, level_label, log=log, **more)]


def _words(*words: str) -> str:
    return ", ".join(filter(None, words))


def _has(runs: Sequence[Run], metric: str) -> bool:
    return any(run.series(metric)[0] for run in runs)
