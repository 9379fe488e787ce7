"""The verdict on one run in one sentence. No torch."""

from dpokit.metrics import is_lower_better
from dpokit.report.curves import find_start_loss
from dpokit.report.read import EVAL_LOSS, Run, mapping


def build_verdict(run: Run, metric: str = EVAL_LOSS) -> str:
    """One sentence on one run: the verdict of `dpokit evaluate` with its interval, or else the result of training."""
    verdict = find_evaluation_verdict(run)
    if verdict is not None:
        return verdict
    if not run.metrics:
        return "No step has been logged yet."
    best = run.best(metric)
    remedy = f"dpokit evaluate {run.path} compares base and tuned model"
    if best is None:
        unknown = f"{metric} was not measured, so the result on held-out pairs is unknown"
        return f"{unknown}; {remedy} on held-out pairs, with an interval."
    start = find_start_loss(run) if metric == EVAL_LOSS else None
    return f"{_describe_best(run, metric, best)}{_compare(best[0], start)}. This has no interval; {remedy} with one."


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


def _compare(value: float, start: tuple[float, str] | None) -> str:
    if start is None:
        return ""
    side = "below" if value < start[0] else "not below"
    return f"; the best is {side} {start[1]}, the loss of an untrained model"
