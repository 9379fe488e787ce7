"""Loads the inputs of an evaluation: the model of a run or of a name, its base, and the held-out pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpokit.atomic_files import read_record
from dpokit.console import say
from dpokit.data.columns import fingerprint_ids
from dpokit.data.prepare import HeldOut, find_limits, prepare_held_out
from dpokit.distributed.coordination import build_on_each_machine_first
from dpokit.errors import DataError, SettingsError
from dpokit.model.base_and_tuned import Sides, find_run, load_sides, read_run_defaults
from dpokit.model.load import find_max_length
from dpokit.rundir import RunDir
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import Settings, load_settings
from dpokit.settings.yielding import OF_SOURCES

# Flags besides the base on which loss, margin and log-probs of the same pairs depend.
RESULT_FLAGS = (
    *("beta", *flags_with(Fact.LENGTH), "model_revision", "dtype", "load_in_4bit", "load_in_8bit"),
    *flags_with(Fact.FOUR_BIT),
)


@dataclass
class Subject(Sides):
    """Base and tuned model, and the pairs that they are compared on.

    Attributes:
        held_out: the pairs.
        own_data: the pairs are the run's own held-out split.
        changed: flags on the command line that make the numbers others than those of training, such as `beta`.
    """

    held_out: HeldOut
    own_data: bool
    changed: list[str]


def load_subject(
    run_or_model: str, *, base: str | None, data: str | None, split: str | None, argv: Sequence[str]
) -> Subject:
    """Loads both models and the held-out pairs. Collective.

    Args:
        run_or_model: a run folder, or the folder or Hub id of a whole model or an adapter.
        base: the model or run to compare with; None for the base of the run or the adapter.
        data, split: held-out pairs; None for the run's own.
        argv: training flags that override the run's settings.

    Raises: DpokitError: an error that the user can correct.
    """
    run, record = find_run(run_or_model)
    flags = _build_flags(base=base, data=data, split=split) + list(argv)
    run_defaults = read_run_defaults(record, run_or_model)
    defaults = dict(run_defaults)
    if data is not None or split is not None:
        defaults |= dict.fromkeys(("eval_fraction", "max_eval_samples"))  # they select the run's own held-out split
    if data is not None:
        # They belong to the run's own data.
        defaults |= dict.fromkeys(OF_SOURCES)
    settings = load_settings("evaluate", {name: value for name, value in defaults.items() if value is not None}, flags)
    _check_data(settings)
    sides = load_sides(settings, run, run_or_model, base)
    held_out = _prepare(settings, sides, sides.longest)
    recorded = {name: entry.get("value") for name, entry in record.get("settings", {}).items()}
    overrides = {name for name, origin in settings.origins.items() if origin not in ("recipe evaluate", "this machine")}
    values = settings.values()
    changed = [name for name in RESULT_FLAGS if name in overrides and values[name] != recorded.get(name)]
    if "model_name_or_path" in overrides and sides.base_name != run_defaults.get("model_name_or_path"):
        changed.insert(0, "base")
    own_data = run is not None and _is_own(run, settings, sides, held_out, run_defaults, recorded)
    return Subject(**vars(sides), held_out=held_out, own_data=own_data, changed=changed)


def _is_own(
    run: RunDir,
    settings: Settings,
    sides: Sides,
    held_out: HeldOut,
    run_defaults: dict[str, Any],
    recorded: dict[str, Any],
) -> bool:
    """Whether the run held out these pairs: by their fingerprint in data.json, or without it by the flags. Collective.

    An older version wrote no fingerprint of the held-out pairs, nor does a run that does not evaluate.
    """
    flags = [*flags_with(Fact.HELD_OUT), *(flags_with(Fact.TRAIN_ROWS) if settings.data.eval_fraction else ())]
    own_values = {name: run_defaults.get(name, getattr(DataArguments, name)) for name in flags}
    has_own_flags = all(getattr(settings.data, name) == value for name, value in own_values.items())
    fingerprint = _read_fingerprint(run)
    if fingerprint is None:
        return has_own_flags
    if fingerprint_ids([held_out.pairs]) == fingerprint:
        return True
    # The fingerprint is of the tokens after the cuts of training: other limits, or a shorter base, cut the same pairs
    # to other tokens.
    limits = {name: recorded[name] for name in flags_with(Fact.LENGTH) if name in recorded}
    of_data = {field.name for field in fields(DataArguments)}
    as_trained = settings.with_data("run", **{name: value for name, value in limits.items() if name in of_data})
    as_trained = as_trained.with_training("run", **{k: value for k, value in limits.items() if k not in of_data})
    longest = find_max_length(as_trained, sides.tuned)
    if find_limits(as_trained.data, longest) != find_limits(settings.data, sides.longest):
        whole = _prepare(as_trained, sides, longest)
        if fingerprint_ids([whole.pairs]) == fingerprint:
            return True
    if has_own_flags:
        say(
            "the run's data has changed since training: these pairs are not those that it held out. They do not count "
            "as its own, and some may have been trained on"
        )
    return False


def _read_fingerprint(run: RunDir) -> str | None:
    try:
        fingerprint = read_record(run.data_json)["eval"]["fingerprint"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    return str(fingerprint)


def _prepare(settings: Settings, sides: Sides, longest: int | None) -> HeldOut:
    """Returns the held-out pairs, cut to `longest` tokens. Collective."""
    return build_on_each_machine_first(
        lambda: _prepare_here(settings, sides, longest), timeout_seconds=settings.training.ddp_timeout
    )


def _prepare_here(settings: Settings, sides: Sides, longest: int | None) -> HeldOut:
    try:
        return prepare_held_out(
            settings.data, sides.tokenizer, max_length=longest, processes=settings.training.dataset_num_proc
        )
    except DataError as error:
        if "--dataset_test_split" not in error.do:
            raise
        raise DataError(error.seen, expected="a split of the data", do="--split with one of them") from None


def _build_flags(*, base: str | None, data: str | None, split: str | None) -> list[str]:
    flags = [] if base is None else ["--model_name_or_path", base]
    if data is not None:  # a whole split, not a fraction held out from a training split
        default = "train" if Path(data).expanduser().is_file() else "test"  # a file's only split is named train
        flags += ["--dataset_name", data, "--dataset_test_split", split or default]
    elif split is not None:
        flags += ["--dataset_test_split", split]
    return flags


def _check_data(settings: Settings) -> None:
    """Raises SettingsError if neither the run nor a flag names held-out pairs."""
    if not settings.data.sources():
        raise SettingsError("no data was named", expected="held-out pairs", do="--data ID|FILE|FOLDER [--split NAME]")
