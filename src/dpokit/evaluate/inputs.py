"""What is evaluated: a run folder or a model, with its base, and the held-out pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpokit.data.prepare import HeldOut, prepare_held_out
from dpokit.distributed.coordination import build_on_each_machine_first
from dpokit.errors import DataError, SettingsError
from dpokit.model.base_and_tuned import Sides, find_run, load_sides, read_defaults
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import Settings, load_settings


@dataclass
class Subject(Sides):
    """Two models and the pairs that they are compared on.

    Attributes:
        held_out: the pairs.
        own_data: they are those that the run itself holds out.
    """

    held_out: HeldOut
    own_data: bool


def load_subject(what: str, *, base: str | None, data: str | None, split: str | None, argv: Sequence[str]) -> Subject:
    """Loads both models and the held-out pairs. Collective.

    Args:
        what: a run folder, or a model: a folder or a Hub id, of a whole model or an adapter.
        base: what it is compared with; None for the run's own, or the adapter's.
        data, split: held-out pairs; None for the run's own.
        argv: more training flags, over the run's settings.

    Raises: DpokitError: what the user can mend.
    """
    run, record = find_run(what)
    given = _flags(base=base, data=data, split=split) + list(argv)
    asked = read_defaults(record, what)
    defaults = dict(asked)
    if data is not None or split is not None:
        defaults |= dict.fromkeys(("eval_fraction", "max_eval_samples"))  # which say what the run itself holds out
    if data is not None:
        defaults["dataset_config"] = None  # of the run's own data
    settings = load_settings("evaluate", {name: value for name, value in defaults.items() if value is not None}, given)
    _check_data(settings)
    names = {name: asked.get(name, getattr(DataArguments, name)) for name in flags_with(Fact.HELD_OUT)}
    own_data = run is not None and all(getattr(settings.data, name) == value for name, value in names.items())
    sides = load_sides(settings, run, what, base)
    held_out = build_on_each_machine_first(
        lambda: _prepare(settings, sides), timeout_seconds=settings.training.ddp_timeout
    )
    return Subject(**vars(sides), held_out=held_out, own_data=own_data)


def _prepare(settings: Settings, sides: Sides) -> HeldOut:
    try:
        return prepare_held_out(
            settings.data, sides.tokenizer, max_length=sides.longest, processes=settings.training.dataset_num_proc
        )
    except DataError as error:
        if error.expected != "--dataset_test_split":
            raise
        raise DataError(error.seen, expected="a split that is there", do="--split with one of them") from None


def _flags(*, base: str | None, data: str | None, split: str | None) -> list[str]:
    flags = [] if base is None else ["--model_name_or_path", base]
    if data is not None:  # a split of its own, not a part of what the run was trained on
        only = "train" if Path(data).expanduser().is_file() else "test"  # a file is one split, which has this name
        flags += ["--dataset_name", data, "--dataset_test_split", split or only]
    elif split is not None:
        flags += ["--dataset_test_split", split]
    return flags


def _check_data(settings: Settings) -> None:
    """Raises SettingsError where nobody named held-out pairs."""
    if not settings.data.dataset_name:
        raise SettingsError("no data was named", expected="held-out pairs", do="--data ID|FILE|FOLDER [--split NAME]")
