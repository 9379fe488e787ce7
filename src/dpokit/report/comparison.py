"""Whether values of several runs can be compared, their order, and a sentence on them. No torch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpokit.errors import SettingsError
from dpokit.metrics import EVAL, find_needs, is_lower_better
from dpokit.report.curves import letter
from dpokit.report.read import Run, mapping
from dpokit.report.tables import number, text_of
from dpokit.settings.flag_facts import Fact, flags_of_pairs, flags_with

ACCURACY = "eval_rewards/accuracies"
MOST_GROUPS = 4  # of runs with different values, in a sentence


def find_obstacles(runs: Sequence[Run], metric: str) -> list[str]:
    """What differs between the runs so that their values of the metric cannot be compared; [] if they can.

    Losses need the same pairs, loss and beta; rewards and margins the same pairs and beta; accuracies and log-probs the
    same pairs.
    """
    return list(_list_obstacles(runs, metric))


def _list_obstacles(runs: Sequence[Run], metric: str) -> Iterator[str]:
    needs = find_needs(metric)
    if not needs:
        return
    difference = _find_pair_difference(runs, "eval" if metric.startswith(EVAL) else "train")
    if difference is not None:
        yield difference
    flags = flags_with(Fact.LOSS) if needs == "loss" else ("beta",) if needs == "beta" else ()
    for flag in flags:
        if _differ(runs, flag):
            yield f"{flag} ({_list_groups(runs, lambda run, flag=flag: _describe_setting(run, flag))})"


def _find_pair_difference(runs: Sequence[Run], split: str) -> str | None:
    """The pairs of each run if they are not the same, else None.

    By the fingerprint of their token ids; if a run of an older version lacks it, by the settings that select them and
    by the fingerprint of all pairs.
    """
    name = "the held-out pairs" if split == "eval" else "the training pairs"
    groups = _list_groups(runs, lambda run: _describe_split(run, split))
    fingerprints = [mapping(mapping(run.data).get(split)).get("fingerprint") for run in runs]
    of_all = [mapping(run.data).get("fingerprint") for run in runs]
    for hashes in (fingerprints, of_all):
        if None not in hashes and len(set(map(str, hashes))) == 1:
            return None
    if len({_describe_split(run, split) for run in runs}) > 1:
        return f"{name} ({groups})"
    is_held_out_of_training = any(run.setting("eval_fraction") is not None for run in runs)
    flags = flags_of_pairs(with_training_rows=split == "train" or is_held_out_of_training)
    if different := [flag for flag in flags if _differ(runs, flag)]:
        return f"{name} (by {', '.join(different)})"
    if _differ_in_all(runs):
        return f"their pairs ({_list_groups(runs, lambda run: str(mapping(run.data).get('fingerprint'))[:8])})"
    return None


def _differ_in_all(runs: Sequence[Run]) -> bool:
    """Whether the fingerprints of all pairs differ, and not because of other training rows or no held-out pairs."""
    if any(_differ(runs, flag) for flag in flags_with(Fact.TRAIN_ROWS)):
        return False
    hashes: dict[bool, set[str]] = {}
    for run in runs:
        data = mapping(run.data)
        if data.get("fingerprint") is not None:
            hashes.setdefault(bool(data.get("eval")), set()).add(str(data["fingerprint"]))
    return any(len(of_same) > 1 for of_same in hashes.values())


def _differ(runs: Sequence[Run], flag: str) -> bool:
    """Whether the setting differs between the runs that have it; run.json of an older version lacks newer flags."""
    return len({_describe_setting(run, flag) for run in runs if flag in run.settings()}) > 1


def _describe_setting(run: Run, flag: str) -> str:
    value = run.setting(flag)
    if flag == "loss_weights" and value is None:  # TRL then weighs each loss type with 1
        value = [1.0] * len(run.setting("loss_type") or [1])
    return text_of(value)


def _describe_split(run: Run, split: str) -> str:
    record = mapping(mapping(run.data).get(split))
    kept = f"{number(record['kept'])} pairs of " if isinstance(record.get("kept"), int) else ""
    source = record.get("source") or run.setting("dataset_name") or "unknown data"
    fingerprint = record.get("fingerprint")
    return f"{kept}{source}" + (f", {str(fingerprint)[:8]}" if fingerprint else "")


def _list_groups(runs: Sequence[Run], describe: Callable[..., Any]) -> str:
    """`A, C: 0.1; B: 0.3`: the letters of the runs with each value."""
    groups: dict[str, list[str]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(str(describe(run)), []).append(letter(place))
    texts = [f"{', '.join(letters)}: {value}" for value, letters in groups.items()]
    more = len(texts) - MOST_GROUPS
    return "; ".join(texts[:MOST_GROUPS]) + (f"; and {more} more" if more > 0 else "")


def build_comparison(runs: Sequence[Run], metric: str, obstacles: Sequence[str]) -> str:
    """One sentence on several runs: sorted by the metric, the best first, or with obstacles to their comparison."""
    end = "lowest" if is_lower_better(metric) else "highest"
    if obstacles:
        sentence = f"Not ranked, because {metric} of these runs cannot be compared: they differ in {_join(obstacles)}."
        other = ACCURACY if metric != ACCURACY and all(run.best(ACCURACY) for run in runs) else None
        if other is not None and not find_obstacles(runs, other):
            sentence += f" Their {other} can be: --metric {other}."
        return sentence
    points = [run.best(metric) or (0.0, 0) for run in runs]
    (first, step), (second, second_step) = points[0], points[1]
    if first == second:
        tied = sum(value == first for value, _ in points)
        return f"{tied} of {len(runs)} runs share the {end} {metric}, {first:.4g}. {_advise(runs, metric)}"
    return (
        f"{letter(0)} ({runs[0].name}) has the {end} {metric}, {first:.4g} at step {step:,}; next is {letter(1)} "
        f"({runs[1].name}) with {second:.4g} at step {second_step:,}. {_advise(runs, metric)}"
    )


def _advise(runs: Sequence[Run], metric: str) -> str:
    advice = "This has no interval: dpokit evaluate RUN gives one for each."
    is_relative = metric.removeprefix(EVAL).startswith(("loss", "rewards/")) and runs[0].setting("kind") != "sft"
    if is_relative and len({text_of(run.setting("model_name_or_path")) for run in runs}) > 1:
        advice = f"Each is measured against its own base. {advice}"
    return advice


def _join(parts: Sequence[str]) -> str:
    return " and in ".join(filter(None, [", in ".join(parts[:-1]), parts[-1]]))


def sort_runs(runs: Sequence[Run], metric: str) -> list[Run]:
    """The runs, sorted by their best value of the metric. Raises: SettingsError: a run has no value of the metric."""
    check_logged_metric(runs, metric)
    sign = 1 if is_lower_better(metric) else -1
    return sorted(runs, key=lambda run: sign * (run.best(metric) or (0.0, 0))[0])


def check_logged_metric(runs: Sequence[Run], metric: str) -> None:
    """Raises SettingsError if a run has no finite value of the metric."""
    without = [run.name for run in runs if run.best(metric) is None]
    if not without:
        return
    common = sorted(set.intersection(*(run.metric_names() for run in runs)))
    shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
    raise SettingsError(
        f"--metric {metric}: no value of it in {shown}",
        expected=f"a metric that every run has: {', '.join(common) or 'they have no common metric'}",
        do=f"--metric {'loss' if 'loss' in common else common[0]}" if common else "report these runs one by one",
    )
