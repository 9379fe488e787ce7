"""Changes defaults of weaker layers that contradict a stronger layer's setting, such as a flag of the user."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpokit.settings.flag_facts import WORKER_OPTIONS, Fact, flags_with
from dpokit.settings.mixture import NAMES

Values = Mapping[str, Any]
DEFAULT = object()  # marks a setting to be removed, so that TRL's default holds
OF_4_BIT, OF_LORA = flags_with(Fact.FOUR_BIT), flags_with(Fact.LORA)


@dataclass(frozen=True)
class Couple:
    """A rule for settings that contradict each other: some are kept, and the others change.

    Attributes:
        flags: the settings that are kept; all must be set, and their rank is that of the weakest layer among them.
        clashes: whether the values contradict each other.
        yields: new values of the other settings; a value stays if a layer of the same or a higher rank set it.
        if_changed: apply the rule only if a stronger layer changed the flag's value; the others fit the old value.
    """

    flags: tuple[str, ...]
    clashes: Callable[[Values], bool]
    yields: Callable[[Values], Values]
    if_changed: bool = False


def _drop(*names: str) -> Callable[[Values], Values]:
    return lambda _: dict.fromkeys(names, DEFAULT)


def _set(**changes: Any) -> Callable[[Values], Values]:
    return lambda _: changes


def _name(values: Values, flag: str) -> str:
    """The value of a strategy or another choice, which may be an enum; "" if it is not set."""
    value = values.get(flag, "")
    return str(getattr(value, "value", value))


def _keeps_best(values: Values) -> bool:
    return bool(values.get("load_best_model_at_end"))


def _strategies_differ(values: Values) -> bool:
    strategies = {_name(values, "eval_strategy"), _name(values, "save_strategy")}
    return _keeps_best(values) and len(strategies) == 2 and strategies <= {"steps", "epoch"}


def _steps_differ(values: Values) -> bool:
    """Whether some save is not at an evaluation, as the best checkpoint needs."""
    if not _keeps_best(values) or {_name(values, "eval_strategy"), _name(values, "save_strategy")} != {"steps"}:
        return False
    evaluated, saved = (float(values.get(name) or 0) for name in ("eval_steps", "save_steps"))
    if not evaluated or not saved:
        return False
    if (evaluated < 1) != (saved < 1):  # one is a share of the run, the other a number of steps
        return True
    times = saved / evaluated
    return round(times) < 1 or abs(times - round(times)) > 1e-6


def _is_on(flag: str) -> Callable[[Values], bool]:
    return lambda values: bool(values[flag])


def _is_off(flag: str) -> Callable[[Values], bool]:
    return lambda values: not values[flag]


def _is_named(flag: str) -> Callable[[Values], bool]:
    return lambda values: values[flag] is not None


def _always(_: Values) -> bool:
    return True


OF_ROWS = ("columns", "ignore_columns", "format", "ranked", "min_score_gap")
OF_MIXTURE = ("balance_sources", "max_pairs_per_source", "max_length_gap", "drop_duplicates", "mixture_seed")
OF_SOURCES = (*NAMES, "dataset_config", *OF_ROWS, *OF_MIXTURE)
COUPLES = (
    # Evaluation, saving, the best checkpoint.
    Couple(
        ("eval_strategy",),
        lambda values: _name(values, "eval_strategy") == "no",
        lambda values: (
            {"load_best_model_at_end": False, "eval_on_start": False}
            | ({"save_strategy": "steps"} if _name(values, "save_strategy") == "best" else {})
            | ({"lr_scheduler_type": DEFAULT} if _name(values, "lr_scheduler_type") == "reduce_lr_on_plateau" else {})
        ),
    ),
    Couple(
        ("save_strategy",),
        lambda values: _name(values, "save_strategy") == "no",
        _set(load_best_model_at_end=False),
    ),
    Couple(("eval_strategy", "save_strategy"), _strategies_differ, _set(load_best_model_at_end=False)),
    Couple(("eval_strategy",), _strategies_differ, lambda values: {"save_strategy": values["eval_strategy"]}),
    Couple(("save_strategy",), _strategies_differ, lambda values: {"eval_strategy": values["save_strategy"]}),
    Couple(("eval_steps", "save_steps"), _steps_differ, _set(load_best_model_at_end=False)),
    Couple(("eval_steps",), _steps_differ, lambda values: {"save_steps": values["eval_steps"]}),
    Couple(("save_steps",), _steps_differ, lambda values: {"eval_steps": values["save_steps"]}),
    Couple(("metric_for_best_model",), _always, _drop("greater_is_better"), if_changed=True),
    # PEFT and quantisation.
    Couple(("use_peft",), _is_off("use_peft"), _drop(*OF_LORA, *OF_4_BIT, "load_in_4bit", "load_in_8bit")),
    Couple(("load_in_8bit",), _is_on("load_in_8bit"), _drop(*OF_4_BIT, "load_in_4bit")),
    Couple(("load_in_4bit",), _is_on("load_in_4bit"), _drop("load_in_8bit")),
    Couple(("load_in_4bit",), _is_off("load_in_4bit"), _drop(*OF_4_BIT)),
    # Precision.
    Couple(("fp16",), _is_on("fp16"), _set(bf16=False)),
    Couple(("bf16",), _is_on("bf16"), _set(fp16=False)),
    Couple(
        ("fp16",),
        lambda values: bool(values["fp16"]) and values.get("dtype") == "bfloat16",
        _set(dtype="float16"),
    ),
    # The length of the run.
    Couple(("num_train_epochs",), lambda values: (values.get("max_steps") or -1) > 0, _drop("max_steps")),
    # A schedule, an optimizer or a loss, and its own settings.
    Couple(("lr_scheduler_type",), _always, _drop("lr_scheduler_kwargs"), if_changed=True),
    Couple(("optim",), _always, _drop("optim_args", "optim_target_modules"), if_changed=True),
    Couple(("loss_type",), _always, _drop("loss_weights"), if_changed=True),
    # The reference.
    Couple(("sync_ref_model",), _is_on("sync_ref_model"), _set(precompute_ref_log_probs=False)),
    Couple(("precompute_ref_log_probs",), _is_on("precompute_ref_log_probs"), _set(sync_ref_model=False)),
    # Data.
    Couple(("dataloader_num_workers",), _is_off("dataloader_num_workers"), _drop(*WORKER_OPTIONS)),
    *(
        Couple(
            (name,),
            _is_named(name),
            _drop(*(other for other in NAMES if other != name)),
        )
        for name in NAMES
    ),
    *(
        Couple(
            (name,),
            _always,
            _drop("dataset_config", "dataset_train_split", "dataset_test_split", *OF_ROWS),
            if_changed=True,
        )
        for name in NAMES
    ),
    Couple(("dataset_streaming",), _is_on("dataset_streaming"), _set(precompute_ref_log_probs=False)),
    Couple(("dataset_test_split",), lambda values: values.get("eval_fraction") is not None, _drop("eval_fraction")),
    Couple(("eval_fraction",), lambda values: values["eval_fraction"] is not None, _drop("dataset_test_split")),
)


def yield_defaults(layers: Sequence[tuple[str, Values]]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Merges layers; if a stronger layer contradicts defaults of a weaker one, these defaults change.

    Two settings of one layer that contradict each other stay, and a later check reports them.

    Args:
        layers: name and values of each layer, the weakest first.

    Returns:
        The values; the layer that each comes from; a sentence for each rule that changed something.
    """
    values: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    origins: dict[str, str] = {}
    changed: set[str] = set()
    for rank, (layer, layer_values) in enumerate(layers):
        same = {name for name, value in layer_values.items() if name in values and values[name] == value}
        changed = (changed | layer_values.keys()) - same
        values |= layer_values
        ranks |= dict.fromkeys(layer_values, rank)
        origins |= dict.fromkeys(layer_values, layer)
    notes = []
    for couple in COUPLES:
        if not all(flag in values for flag in couple.flags) or not couple.clashes(values):
            continue
        if couple.if_changed and not changed.issuperset(couple.flags):
            continue
        rank = min(ranks[flag] for flag in couple.flags)
        changes = {
            name: value
            for name, value in couple.yields(values).items()
            if name in values and ranks[name] < rank and values[name] != value
        }
        for name, value in changes.items():
            del values[name], ranks[name], origins[name]
            if value is not DEFAULT:
                values[name], ranks[name] = value, rank
                origins[name] = origins[couple.flags[0]]
        if changes:
            kept = " and ".join(f"{flag} {_show(values[flag])}" for flag in couple.flags)
            others = ", ".join(f"{name} {_show(value)}" for name, value in changes.items())
            notes.append(f"{kept} ({origins[couple.flags[0]]}) changes defaults that depend on it: {others}")
    return values, origins, notes


def _show(value: Any) -> str:
    if value is DEFAULT:
        return "left out"
    value = getattr(value, "value", value)
    return str(value).lower() if isinstance(value, bool) else str(value)
