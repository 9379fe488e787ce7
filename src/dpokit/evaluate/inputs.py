"""Loads the inputs of an evaluation: the model of a run or of a name, its base, and the held-out pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpokit.data.prepare import HeldOut, prepare_held_out
from dpokit.distributed.coordination import build_on_each_machine_first
from dpokit.errors import DataError, SettingsError
from dpokit.model.base_and_tuned import Sides, find_run, load_sides, read_run_defaults
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import Settings, load_settings
from dpokit.settings.yielding import OF_SOURCES

# Training flags on which loss, margin and log-probs of the same pairs depend.
RESULT_FLAGS = ("beta", *flags_with(Fact.LENGTH))


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
    own_values = {name: run_defaults.get(name, getattr(DataArguments, name)) for name in flags_with(Fact.HELD_OUT)}
    own_data = run is not None and all(getattr(settings.data, name) == value for name, value in own_values.items())
    sides = load_sides(settings, run, run_or_model, base)
    held_out = build_on_each_machine_first(
        lambda: _prepare(settings, sides), timeout_seconds=settings.training.ddp_timeout
    )
    changed = [name for name in RESULT_FLAGS if settings.origins.get(name) == "command line"]
    changed = [name for name in changed if settings.values()[name] != run_defaults.get(name)]
    if base is not None and sides.base_name != run_defaults.get("model_name_or_path"):
        changed.insert(0, "base")
    return Subject(**vars(sides), held_out=held_out, own_data=own_data, changed=changed)


def _prepare(settings: Settings, sides: Sides) -> HeldOut:
    try:
        return prepare_held_out(
            settings.data, sides.tokenizer, max_length=sides.longest, processes=settings.training.dataset_num_proc
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
