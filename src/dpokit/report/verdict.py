"""The verdict on one run in one sentence. No torch."""

import shlex

from dpokit.metrics import is_lower_better
from dpokit.report.curves import find_start_loss
from dpokit.report.read import EVAL_LOSS, Run, mapping


def build_verdict(run: Run, metric: str = EVAL_LOSS) -> str:
    """The verdict of `dpokit evaluate` with its interval, or else the result of training, in one sentence.

    A run that judged its own answers, such as the quickstart, has that judgement as a sentence before it.
    """
    judged = run.record.get("judged")
    return (f"{judged} " if isinstance(judged, str) and judged.strip() else "") + _build_measured_verdict(run, metric)


def _build_measured_verdict(run: Run, metric: str) -> str:
    verdict = find_evaluation_verdict(run)
    if verdict is not None:
        return verdict
    if not run.metrics:
        return "No step has been logged yet."
    best = run.best(metric)
    remedy = f"dpokit evaluate {shlex.quote(str(run.path))} compares base and tuned model"
    if best is None:
        unknown = f"{metric} was not measured, so the result on held-out pairs is unknown"
        return f"{unknown}; {remedy} on held-out pairs, with an interval."
    start = find_start_loss(run) if metric == EVAL_LOSS else None
    first = _compare_with_first(run, metric, best) if start is None else _compare(best[0], start)
    return f"{_describe_best(run, metric, best)}{first}. This has no interval; {remedy} with one."


def find_evaluation_verdict(run: Run) -> str | None:
    """The verdict of `dpokit evaluate`; None without one."""
    text = mapping((run.pairs or {}).get("verdict")).get("text")
    return text if isinstance(text, str) and text.strip() else None


def _describe_best(run: Run, metric: str, best: tuple[float, int]) -> str:
    steps, values = run.series(metric)
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
    name = "evaluation loss" if metric == EVAL_LOSS else metric
    end = "lowest" if is_lower_better(metric) else "highest"
    if len(points) == 1:
        return f"The only {name} is {best[0]:.4g}, at step {best[1]:,}"
    last_step, last = points[-1]
    sentence = f"The {end} {name} is {best[0]:.4g}, at step {best[1]:,}"
    if last == best[0]:
        return f"{sentence}, {'the last one' if last_step == best[1] else 'and the last is as good'}"
    return f"{sentence}; the last, {last:.4g} at step {last_step:,}, is worse"


def _compare_with_first(run: Run, metric: str, best: tuple[float, int]) -> str:
    steps, values = run.series(metric)
    first_step, first = next((s, v) for s, v in zip(steps, values, strict=True) if v is not None)
    return "" if first_step == best[1] else f"; the first was {first:.4g}, at step {first_step:,}"


def _compare(value: float, start: tuple[float, str]) -> str:
    side = "below" if value < start[0] else "not below"
    return f"; the best is {side} {start[1]}, the loss of an untrained model"
