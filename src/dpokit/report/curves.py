"""Builds the figures of a report from the records of its runs. No torch."""

from collections.abc import Sequence
from typing import Any

from dpokit.figures import MOST_RAW_LINES, Figure, Line, is_wide
from dpokit.metrics import EVAL, FIGURES, list_figure
from dpokit.report.read import Run
from dpokit.untrained_loss import LN_2, find_untrained_loss


def build_figures(runs: Sequence[Run]) -> list[Figure]:
    """The figures that have values: all lines of one run, or one figure for each metric of several runs."""
    return _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)


def letter(number: int) -> str:
    """The letter of a run in figures and tables: A to Z, then A2 to Z2 and so on."""
    return chr(ord("A") + number % 26) + (str(number // 26 + 1) if number >= 26 else "")


def find_start_loss(run: Run) -> tuple[float, str] | None:
    """The loss of a policy that equals its reference, and its label; None if the loss type has no such value."""
    kinds = run.setting("loss_type")
    kinds = [kinds] if isinstance(kinds, str) else (kinds or ["sigmoid"])
    loss = find_untrained_loss(kinds, run.setting("loss_weights"), use_weighting=bool(run.setting("use_weighting")))
    if loss is None:
        return None
    weight = loss / LN_2
    return loss, f"{'' if weight == 1 else f'{weight:g} x '}ln 2 = {loss:.3f}"


def explain_figures(runs: Sequence[Run]) -> str:
    """Sentences that explain the marks in the figures."""
    raw = "Pale: each logged value. Above it, if there are many values: their running mean."
    sentences = [
        raw
        if len(runs) <= MOST_RAW_LINES
        else "For many logged values, only their running mean is drawn; each run's own report shows all values.",
        "A cross at the bottom: a value that was not finite.",
    ]
    if any(len(run.starts) > 1 for run in runs):
        sentences.append(f"{'A dotted vertical line' if len(runs) == 1 else 'A triangle at the bottom'}: a restart.")
    if any(find_start_loss(run) is None for run in runs):
        sentences.append("ln 2 is not marked, because this loss_type has another value for an untrained model.")
    return " ".join(sentences)


def _of_one(run: Run) -> list[Figure]:
    restarts = [(start.get("resumed_step") or 0, None) for start in run.starts[1:]]
    figures = []
    for key, title in FIGURES.items():
        lines, metrics = [], list_figure(key)
        for number, metric in enumerate(metrics):
            several = len(metrics) > 1  # then the colour means chosen or rejected, and dots mean an evaluation
            lines += _line(run, metric.name, _join(metric.line, "training"), number, noisy=not metric.exact)
            evaluated = _join(metric.line, "evaluation")
            lines += _line(run, EVAL + metric.name, evaluated, number if several else 1, dots=True)
        figures += _figure(key, title, lines, [run], restarts=restarts)
    return figures


def _of_several(runs: Sequence[Run]) -> list[Figure]:
    figures = []
    restarts = [(start.get("resumed_step") or 0, style) for style, run in enumerate(runs) for start in run.starts[1:]]
    for key, title in FIGURES.items():
        for metric in list_figure(key):
            for prefix in ("", EVAL):
                kind = ("evaluation" if prefix else "training") if _has(runs, EVAL + metric.name) else ""
                lines = [
                    line
                    for number, run in enumerate(runs)
                    for line in _line(
                        run,
                        prefix + metric.name,
                        name_line(number, run.name),
                        number,
                        dots=bool(prefix),
                        noisy=not prefix and not metric.exact,
                    )
                ]
                name = "-".join(filter(None, (prefix.rstrip("_"), key, metric.line)))
                full_title = _join(title, metric.line, kind)
                figures += _figure(name, full_title, lines, runs, restarts=restarts)
    return figures


def name_line(number: int, name: str) -> str:
    """The label of a run in a legend: its letter and its name, shortened to 22 letters."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    return f"{letter(number)}  {name if len(name) <= 22 else f'{name[:10]}...{name[-9:]}'}"


def _line(run: Run, metric: str, label: str, style: int, **more: bool) -> list[Line]:
    steps, values = run.series(metric)
    return [Line(label, steps, values, style, **more)] if steps else []


def _figure(key: str, title: str, lines: list[Line], runs: Sequence[Run], **more: Any) -> list[Figure]:
    if not any(value is not None for line in lines for value in line.values):
        return []
    level, level_label = None, ""
    if title.startswith("Loss"):
        start_losses = {find_start_loss(run) for run in runs}
        shared = start_losses.pop() if len(start_losses) == 1 else None
        level, level_label = shared or (None, "")
    elif title.startswith("Accuracy"):
        level, level_label = 0.5, "chance"
    log = any(metric.scale == "log" for metric in list_figure(key)) and all(is_wide(line.values) for line in lines)
    return [Figure(key, title + (", log" if log else ""), lines, level, level_label, log=log, **more)]


def _join(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _has(runs: Sequence[Run], metric: str) -> bool:
    return any(run.series(metric)[0] for run in runs)
