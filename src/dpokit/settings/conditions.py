"""The table of settings that have an effect only together with others. No torch.

A setting that would do nothing is refused, or reported in one line, with the flags that give it its effect. Flags that
never have an effect are in `flag_facts`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from trl import ModelConfig

from dpokit.credentials import HIDDEN, SECRET_SETTING
from dpokit.errors import SettingsError
from dpokit.settings.flag_facts import ORDER, WORKER_OPTIONS, Fact, flags_with
from dpokit.settings.flags import KINDS, DataArguments
from dpokit.settings.mixture import FLAGS, NAMES, SHARES, parse_sources

Values = Mapping[str, Any]

# Facts about TRL's losses, transformers' schedules and its optimizers; tests compare each with the libraries.
SMOOTHED_LOSSES = ("exo_pair", "robust", "aot", "aot_unpaired")
DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
SORTING_LOSSES = ("aot", "aot_unpaired")
SCHEDULES_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
SCHEDULES_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# By the beginnings of their names.
OPTIMIZERS_WITHOUT_BETAS = (
    *("adafactor", "sgd", "adagrad", "rmsprop", "galore", "lomo", "adalomo", "grokadamw"),
    "schedule_free_sgd",
)
OPTIMIZERS_WITHOUT_EPSILON = (*OPTIMIZERS_WITHOUT_BETAS, "lion", "paged_lion")
OPTIMIZERS_WITH_ARGS = (
    *("sgd", "adagrad", "rmsprop", "ademamix", "paged_ademamix", "galore", "apollo", "grokadamw"),
    *("adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "schedule_free", "stable_adamw"),
)
OPTIMIZERS_WITH_TARGETS = ("galore", "apollo")
OPTIMIZERS_WITH_WARMUP = ("schedule_free_adamw", "schedule_free_sgd")  # whole names

LEAST_NORMALISED_BETA = 1.0


@dataclass(frozen=True)
class Condition:
    """A condition under which settings have the effect that their names promise.

    Attributes:
        flags: the settings.
        depends_on: the settings that decide; empty if the values of `flags` contradict each other.
        holds: whether the condition is met, by the values of all settings.
        remedy: what to set instead.
        why: the consequence of an unmet condition; empty: the flag has no effect with the values of `depends_on`.
            `{name}` stands for the value of a setting.
        refuses: an unmet condition is an error; if not, it is one line of the log.
        if_set: the condition counts only if some layer sets all of `depends_on`; else the run decides them later.
    """

    flags: tuple[str, ...]
    depends_on: tuple[str, ...]
    holds: Callable[[Values], bool]
    remedy: str
    why: str = ""
    refuses: bool = True
    if_set: bool = False


def _choices(values: Values, flag: str) -> list[str]:
    """The names in a setting that is one choice or a list of them."""
    value = values[flag]
    items = value if isinstance(value, list | tuple) else [value]
    return [str(getattr(item, "value", item)) for item in items]


def _is_on(flag: str) -> Callable[[Values], bool]:
    return lambda values: bool(values[flag])


def _is_off(flag: str) -> Callable[[Values], bool]:
    return lambda values: not values[flag]


def _has(flag: str, *choices: str) -> Callable[[Values], bool]:
    return lambda values: not set(choices).isdisjoint(_choices(values, flag))


def _has_other_than(flag: str, *choices: str) -> Callable[[Values], bool]:
    return lambda values: not set(choices).issuperset(_choices(values, flag))


def _begins_with(flag: str, *beginnings: str) -> Callable[[Values], bool]:
    return lambda values: _choices(values, flag)[0].startswith(beginnings)


def _begins_otherwise(flag: str, *beginnings: str) -> Callable[[Values], bool]:
    return lambda values: not _choices(values, flag)[0].startswith(beginnings)


def _recomputes(values: Values) -> bool:
    """Whether activations are recomputed: `activation_checkpointing` wins over its name before transformers 5.23."""
    new = values.get("activation_checkpointing")
    return bool(values["gradient_checkpointing"] if new is None else new)


def _has_divergence(values: Values) -> bool:
    losses = set(_choices(values, "loss_type"))
    fits = losses <= {*DIVERGENCE_LOSSES, "sft"} and not losses.isdisjoint(DIVERGENCE_LOSSES)
    return values["f_divergence_type"] == "reverse_kl" or fits


def _chooses_best(values: Values) -> bool:
    """Whether some choice depends on the best evaluation: of weights, checkpoints or learning rate."""
    kept = values["load_best_model_at_end"] or values["save_total_limit"] or _has("save_strategy", "best")(values)
    return bool(kept) or _has("lr_scheduler_type", *SCHEDULES_BY_METRIC)(values)


def _uses_logging_steps(values: Values) -> bool:
    sets_evaluations = not values["eval_steps"] and _has("eval_strategy", "steps")(values)
    return sets_evaluations or _has("logging_strategy", "steps")(values)


def _fits_max_length(flag: str) -> Callable[[Values], bool]:
    return lambda values: values["max_length"] is None or values[flag] is None or values[flag] <= values["max_length"]


def _is_file(*parts: str) -> bool:
    """Whether a file has this path; False for a text that cannot be a path."""
    try:
        return Path(*parts).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False


def _has_revision(values: Values) -> bool:
    """Whether the model may have revisions; of the folder of an adapter, the revision is its base's."""
    name = str(values["model_name_or_path"])
    is_whole_model = _is_file(name, "config.json") and not _is_file(name, "adapter_config.json")
    return values["model_revision"] == "main" or not (is_whole_model or _is_file(name))


def _has_configurations(values: Values) -> bool:
    """Whether the dataset may have configurations: neither a file nor a folder of `save_to_disk` has."""
    name = str(values["dataset_name"])
    return not (_is_file(name) or _is_file(name, "dataset_dict.json") or _is_file(name, "state.json"))


def _has_source_without(key: str) -> Callable[[Values], bool]:
    """Whether the flag of this key holds for a source; only the sources that name a test split are evaluated on."""

    def holds(values: Values) -> bool:
        has_key = [getattr(source, key) is not None for source in parse_sources(values)]
        return values["datasets"] is None or not (any(has_key) if key == "test_split" else all(has_key))

    return holds


def _has_shares(values: Values) -> bool:
    return any(getattr(source, share) is not None for source in parse_sources(values) for share in SHARES)


def _is_mixture_random(values: Values) -> bool:
    is_part = values["balance_sources"] or values["max_pairs_per_source"] or _has_shares(values)
    return bool(is_part or (values["dataset_streaming"] and len(parse_sources(values)) > 1))


def _moves_in_time(values: Values) -> bool:
    """Whether the reference moves before the run ends, as far as that is known before the pairs are read."""
    return not 0 < values["max_steps"] < values["ref_model_sync_steps"]


def _leaves_batches_alone(values: Values) -> bool:
    """Whether `accelerator_config` has none of the options that dpokit decides itself."""
    config = values["accelerator_config"]
    try:
        if isinstance(config, str):
            config = json.loads(Path(config).read_text() if _is_file(config) else config)
        accumulation = config.get("gradient_accumulation_kwargs") or {} if config else {}
        decided = {"split_batches", "dispatch_batches", "even_batches"}
        return decided.isdisjoint(config or {}) and "num_steps" not in accumulation
    except (OSError, ValueError, AttributeError):
        return True  # building TRL's arguments reports it


_STEPS = "set eval_strategy to steps or epoch"

CONDITIONS = (
    # The loss.
    Condition(
        ("label_smoothing",),
        ("loss_type",),
        _has("loss_type", *SMOOTHED_LOSSES),
        f"set loss_type to {', '.join(SMOOTHED_LOSSES)}",
    ),
    Condition(("discopop_tau",), ("loss_type",), _has("loss_type", "discopop"), "set loss_type to discopop"),
    Condition(
        ("f_divergence_type",), ("loss_type",), _has_divergence, f"use the losses {', '.join(DIVERGENCE_LOSSES)}"
    ),
    Condition(
        ("f_alpha_divergence_coef",),
        ("f_divergence_type",),
        _has("f_divergence_type", "alpha_divergence"),
        "set f_divergence_type to alpha_divergence",
    ),
    Condition(("ld_alpha",), ("loss_type",), _has_other_than("loss_type", "sft"), "add a loss that compares answers"),
    Condition(
        ("beta",),
        ("loss_type",),
        _has_other_than("loss_type", "sft"),
        "add a loss that compares answers",
        why="the loss {loss_type} has no beta; it only scales the logged rewards",
        refuses=False,
    ),
    Condition(
        ("f_divergence_type", "f_alpha_divergence_coef"),
        (),
        lambda values: (
            not _has("f_divergence_type", "alpha_divergence")(values) or values["f_alpha_divergence_coef"] != 1
        ),
        "choose another f_alpha_divergence_coef, such as 0.5",
        why="alpha_divergence with the coefficient 1 equals reverse_kl",
        refuses=False,
    ),
    Condition(
        ("loss_type", "label_smoothing"),
        (),
        lambda values: not _has("loss_type", "exo_pair")(values) or values["label_smoothing"] > 0,
        "set label_smoothing, such as 1e-3",
        why="exo_pair divides by label_smoothing, which is {label_smoothing}",
    ),
    Condition(
        ("loss_type", "label_smoothing"),
        (),
        lambda values: not _has("loss_type", "robust")(values) or values["label_smoothing"] > 0,
        "set label_smoothing to the share of wrong labels, such as 0.1",
        why="robust without label_smoothing equals sigmoid",
        refuses=False,
    ),
    Condition(
        ("loss_type", "beta"),
        (),
        lambda values: not _has("loss_type", "sigmoid_norm")(values) or values["beta"] >= LEAST_NORMALISED_BETA,
        "set beta to 2 to 10, as published runs do",
        why="sigmoid_norm compares log-probs per token, which beta {beta} scales to almost nothing",
        refuses=False,
    ),
    Condition(
        ("loss_type", "per_device_train_batch_size"),
        (),
        lambda values: not _has("loss_type", *SORTING_LOSSES)(values) or values["per_device_train_batch_size"] > 1,
        "raise per_device_train_batch_size",
        why="loss_type {loss_type} sorts the pairs of a batch, and each batch has a single pair",
        refuses=False,
    ),
    Condition(
        ("use_weighting", "loss_type"),
        (),
        lambda values: not _has("loss_type", *SORTING_LOSSES, "sft")(values) or not values["use_weighting"],
        f"leave use_weighting out, or remove {', '.join(SORTING_LOSSES)} and sft from loss_type",
        why="TRL cannot weigh the pairs of loss_type {loss_type}",
    ),
    # The reference.
    Condition(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        ("sync_ref_model",),
        _is_on("sync_ref_model"),
        "add --sync_ref_model",
    ),
    Condition(
        ("sync_ref_model",),
        ("ref_model_sync_steps", "max_steps"),
        _moves_in_time,
        "set ref_model_sync_steps to fewer steps than the run has",
    ),
    Condition(
        ("sync_ref_model", "use_peft"),
        (),
        lambda values: not (values["use_peft"] and values.get("sync_ref_model")),
        "leave out sync_ref_model or use_peft",
        why="the reference of an adapter is the model without it, which does not move",
    ),
    Condition(
        ("precompute_ref_batch_size",),
        ("precompute_ref_log_probs",),
        _is_on("precompute_ref_log_probs"),
        "add --precompute_ref_log_probs",
        if_set=True,
    ),
    # Supervised training.
    Condition(
        ("label_smoothing_factor",),
        ("kind", "loss_type"),
        lambda values: values["kind"] == "sft" and values["loss_type"] == "nll",
        "for preference pairs set label_smoothing; for supervised training, loss_type nll",
    ),
    Condition(
        ("shared_prefix", "group_by_prompt"),
        ("kind",),
        _has("kind", "dpo"),
        "train preference pairs, which share a prompt",
    ),
    # Length of the run, schedule, optimizer.
    Condition(
        ("num_train_epochs",),
        ("max_steps",),
        lambda values: values["max_steps"] <= 0,
        "set only one of the two",
        refuses=False,
    ),
    Condition(
        ("lr_scheduler_kwargs",),
        ("lr_scheduler_type",),
        _has_other_than("lr_scheduler_type", *SCHEDULES_WITHOUT_OPTIONS),
        "choose a schedule with options, such as cosine_with_min_lr",
    ),
    Condition(
        ("warmup_steps",),
        ("lr_scheduler_type", "optim"),
        lambda values: (
            _has_other_than("lr_scheduler_type", *SCHEDULES_WITHOUT_WARMUP)(values)
            or _has("optim", *OPTIMIZERS_WITH_WARMUP)(values)
        ),
        "choose a schedule with a warm-up, such as constant_with_warmup or linear",
    ),
    Condition(
        ("adam_beta1", "adam_beta2"),
        ("optim",),
        _begins_otherwise("optim", *OPTIMIZERS_WITHOUT_BETAS),
        "choose an optimizer of the Adam family",
    ),
    Condition(
        ("adam_epsilon",),
        ("optim",),
        _begins_otherwise("optim", *OPTIMIZERS_WITHOUT_EPSILON),
        "choose an optimizer of the Adam family",
    ),
    Condition(
        ("optim_args",),
        ("optim",),
        _begins_with("optim", *OPTIMIZERS_WITH_ARGS),
        "choose an optimizer with options of its own, such as sgd; AdamW's are adam_beta1, adam_beta2, adam_epsilon",
    ),
    Condition(
        ("optim_target_modules",),
        ("optim",),
        _begins_with("optim", *OPTIMIZERS_WITH_TARGETS),
        "choose an optimizer of GaLore or APOLLO",
    ),
    # Evaluation, saving, logging.
    Condition(("eval_steps",), ("eval_strategy",), _has("eval_strategy", "steps"), "set eval_strategy to steps"),
    Condition(
        ("eval_on_start", "eval_strategy"),
        (),
        lambda values: not values["eval_on_start"] or _has_other_than("eval_strategy", "no")(values),
        _STEPS,
        why="with eval_strategy {eval_strategy}, no held-out pairs are loaded",
    ),
    Condition(
        ("eval_delay", "eval_answers"),
        ("eval_strategy",),
        _has_other_than("eval_strategy", "no"),
        _STEPS,
    ),
    Condition(
        ("metric_for_best_model",),
        ("eval_strategy", "load_best_model_at_end"),
        lambda values: _chooses_best(values) and _has_other_than("eval_strategy", "no")(values),
        "evaluate, and add --load_best_model_at_end or set save_strategy to best",
    ),
    Condition(
        ("greater_is_better",),
        ("eval_strategy", "metric_for_best_model"),
        lambda values: _chooses_best(values) and _has_other_than("eval_strategy", "no")(values),
        "evaluate, and set metric_for_best_model and load_best_model_at_end",
    ),
    Condition(("save_steps",), ("save_strategy",), _has("save_strategy", "steps"), "set save_strategy to steps"),
    Condition(
        ("save_strategy",),
        ("eval_strategy",),
        lambda values: not _has("save_strategy", "best")(values) or _has_other_than("eval_strategy", "no")(values),
        _STEPS,
    ),
    Condition(
        ("save_total_limit", "save_only_model"),
        ("save_strategy",),
        _has_other_than("save_strategy", "no"),
        "set save_strategy to steps or epoch",
    ),
    Condition(("logging_steps",), ("logging_strategy",), _uses_logging_steps, "set logging_strategy to steps"),
    # PEFT and quantisation.
    Condition(flags_with(Fact.LORA), ("use_peft",), _is_on("use_peft"), "add --use_peft"),
    Condition(  # supervised training has no such flag, and keeps every dropout
        ("lora_dropout",),
        ("disable_dropout",),
        lambda values: not values.get("disable_dropout"),
        "set disable_dropout to false",
    ),
    Condition(
        flags_with(Fact.FOUR_BIT), ("load_in_4bit",), _is_on("load_in_4bit"), "add --load_in_4bit and --use_peft"
    ),
    Condition(
        ("lora_task_type",),
        (),
        _has("lora_task_type", "CAUSAL_LM"),
        "leave lora_task_type out",
        why="only causal language models are trained",
    ),
    # The model and its execution.
    Condition(
        ("model_revision",), ("model_name_or_path",), _has_revision, "name a model on the Hub, or the folder you want"
    ),
    Condition(
        ("gradient_checkpointing",),
        ("activation_checkpointing",),
        lambda values: values["activation_checkpointing"] in (None, values["gradient_checkpointing"]),
        "set activation_checkpointing alone",
        if_set=True,
    ),
    Condition(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ("gradient_checkpointing",),
        _recomputes,
        "add --gradient_checkpointing true",
    ),
    Condition(("liger_kernel_config",), ("use_liger_kernel",), _is_on("use_liger_kernel"), "add --use_liger_kernel"),
    Condition(("fsdp_config",), ("fsdp",), _is_on("fsdp"), "add --fsdp, or use accelerate_configs/fsdp2.yaml"),
    Condition(
        ("average_tokens_across_devices",),
        (),
        _is_on("average_tokens_across_devices"),
        "leave average_tokens_across_devices out",
        why="a step's loss is the mean over the tokens or pairs of all processes",
    ),
    # Data.
    Condition(
        ("max_prompt_length",),
        ("max_length",),
        _fits_max_length("max_prompt_length"),
        "set max_length to more tokens",
    ),
    Condition(
        ("max_completion_length",),
        ("max_length",),
        _fits_max_length("max_completion_length"),
        "set max_length to more tokens",
    ),
    Condition(
        ("dataset_test_split",),
        ("eval_fraction",),
        lambda values: values["eval_fraction"] is None,
        "choose one: a split of the data, or a share of the training pairs",
    ),
    Condition(
        ("eval_fraction", "datasets"),
        (),
        lambda values: values["eval_fraction"] is None or not any(each.test_split for each in parse_sources(values)),
        "leave eval_fraction out, or test_split of all sources",
        why="either a share of the training pairs is held out, or the test split of a source",
    ),
    Condition(
        NAMES,
        (),
        lambda values: sum(values[name] is not None for name in NAMES) <= 1,
        "name the pairs by one of the three",
        why="one of them alone says which pairs are read",
    ),
    *(
        Condition((flag,), ("datasets",), _has_source_without(key), f"leave {key} out of a source")
        for key, flag in FLAGS.items()
    ),
    Condition(
        ("balance_sources",),
        ("dataset_name",),
        lambda values: len(parse_sources(values)) > 1,
        "name several sources",
    ),
    Condition(
        ("balance_sources", *NAMES),
        (),
        lambda values: not (values["balance_sources"] and _has_shares(values)),
        "leave balance_sources out, or fraction, weight and count of all sources",
        why="balance_sources decides how many pairs each source gives, and so do these shares",
    ),
    Condition(
        ("mixture_seed",),
        ("max_pairs_per_source",),
        _is_mixture_random,
        "take only a part of a source: fraction, weight, count, --balance_sources or --max_pairs_per_source",
    ),
    Condition(
        ("dataset_config",),
        ("dataset_name",),
        _has_configurations,
        "name a dataset of the Hub, or a folder with a README",
    ),
    Condition(
        ("dataset_num_proc", "group_by_prompt"),
        ("dataset_streaming",),
        _is_off("dataset_streaming"),
        "do not stream the dataset",
    ),
    Condition(
        (*WORKER_OPTIONS, "dataloader_num_workers"),
        (),
        lambda values: values["dataloader_num_workers"] or not any(values[name] for name in WORKER_OPTIONS),
        "set dataloader_num_workers to 1 or more",
        why="there are no worker processes",
    ),
    Condition(("dataloader_in_order",), (), _is_on("dataloader_in_order"), "leave dataloader_in_order out", why=ORDER),
    Condition(
        ("remove_unused_columns",),
        (),
        _is_on("remove_unused_columns"),
        "leave remove_unused_columns out",
        why="rows are tokenised and have no other columns",
    ),
    Condition(
        ("accelerator_config",),
        (),
        _leaves_batches_alone,
        "remove split_batches, dispatch_batches, even_batches and num_steps from accelerator_config",
        why="dpokit deals the batches to the processes itself; gradient_accumulation_steps sets the micro-batches",
    ),
    Condition(
        ("eval_do_concat_batches",),
        (),
        _is_on("eval_do_concat_batches"),
        "leave eval_do_concat_batches out",
        why="an evaluation adds up its metrics and keeps no predictions",
    ),
    # Trackers and the Hub.
    Condition(
        ("run_tags", "project"),
        ("report_to",),
        _has_other_than("report_to", "none"),
        "name a tracker with report_to",
        refuses=False,
        if_set=True,
    ),
    Condition(
        ("trackio_space_id", "trackio_bucket_id"),
        ("report_to",),
        _has("report_to", "trackio", "all"),
        "set report_to to trackio",
    ),
    Condition(
        ("hub_model_id", "hub_revision", "hub_license"),
        ("push_to_hub",),
        _is_on("push_to_hub"),
        "add --push_to_hub",
    ),
    Condition(("hub_token",), ("push_to_hub",), _is_on("push_to_hub"), "add --push_to_hub", refuses=False),
    Condition(
        ("hub_private_repo",),
        ("push_to_hub", "report_to"),
        lambda values: values["push_to_hub"] or _has("report_to", "trackio", "all")(values),
        "add --push_to_hub",
    ),
)


def check_conditions(
    kind: str, values: Values, origins: Mapping[str, str], layers: Sequence[tuple[str, Values]]
) -> list[str]:
    """Checks that each setting has an effect. A default that a stronger layer makes pointless is left as it is.

    Args:
        kind: the recipe's kind.
        values: the settings of all layers, merged.
        origins: the layer that set each of them.
        layers: the layers, the weakest first; the first one is the recipe.

    Returns: one line for each setting that is only reported.

    Raises: SettingsError for a setting without an effect, and for one that dpokit decides itself; a recipe's own
        default without an effect is only reported.
    """
    complete = {**_find_defaults(kind), **values, "kind": kind}
    ranks = {layer: rank for rank, (layer, _) in enumerate(layers)}
    notes = []
    for condition in CONDITIONS:
        decided_by = [name for name in condition.depends_on if name in values]
        if condition.if_set and len(decided_by) < len(condition.depends_on):
            continue
        deciding = max((ranks.get(origins[name], 0) for name in decided_by), default=0)
        flags = [
            name
            for name in condition.flags
            if name in values
            and ranks.get(origins[name], -1) >= deciding
            and (not condition.depends_on or values[name] not in (None, False, "", [], {}))
        ]
        if not flags or condition.holds(complete):
            continue
        from_user = [name for name in flags if ranks[origins[name]] > 0]
        flags = from_user or flags
        problem = _describe(condition, flags, complete, origins[flags[0]])
        if condition.refuses and (from_user or not condition.depends_on):
            expected, leave_out = "settings that fit each other", ""
            if condition.depends_on:
                expected, leave_out = "settings that have an effect", f", or leave out {' and '.join(flags)}"
            raise SettingsError(problem, expected=expected, do=f"{condition.remedy}{leave_out}")
        notes.append(f"{problem}; {condition.remedy}")
    return notes


def _find_defaults(kind: str) -> dict[str, Any]:
    """The default of every setting of this kind of recipe."""
    defaults: dict[str, Any] = {}
    for group in (DataArguments, KINDS[kind], ModelConfig):
        for field in fields(group):
            defaults[field.name] = field.default if field.default_factory is MISSING else field.default_factory()
    return defaults


def _describe(condition: Condition, flags: Sequence[str], values: Values, origin: str) -> str:
    shown = {name: _show(values, name) for name in (*condition.flags, *condition.depends_on) if name in values}
    named = " and ".join(f"{name} {shown[name]}" for name in flags)
    if condition.why:
        return f"{origin} sets {named}: {condition.why.format(**shown)}"
    deciding = " and ".join(f"{name} {shown[name]}" for name in condition.depends_on)
    return f"{origin} sets {named}, which has no effect with {deciding}"


def _show(values: Values, name: str) -> str:
    """A setting's value as a user writes it; secrets are masked."""
    if name.endswith(SECRET_SETTING):
        return HIDDEN
    value = values[name]
    return str(value).lower() if isinstance(value, bool) else " ".join(_choices(values, name)) or str(value)
