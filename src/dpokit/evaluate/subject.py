"""What is evaluated: a run folder or a model, with its base, and the held-out pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpokit.data.prepare import HeldOut, prepare_held_out
from dpokit.errors import SettingsError
from dpokit.model.sides import Sides, find_run, load_sides, read_defaults
from dpokit.peers import build_on_each_machine_first
from dpokit.settings import Settings, load_settings


@dataclass
class Subject(Sides):
    """Two models and the pairs that they are compared on.

    Attributes:
        held_out: the pairs.
    """

    held_out: HeldOut


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
    defaults = read_defaults(record, what)
    if data is not None:
        defaults |= dict.fromkeys(("eval_fraction", "max_eval_samples"))  # which say what to take of the run's own data
    settings = load_settings("evaluate", {name: value for name, value in defaults.items() if value is not None}, given)
    _check_data(settings)
    sides = load_sides(settings, run, what, base)
    held_out = build_on_each_machine_first(
        lambda: prepare_held_out(
            settings.data, sides.tokenizer, max_length=sides.longest, processes=settings.training.dataset_num_proc
        ),
        timeout_seconds=settings.training.ddp_timeout,
    )
    return Subject(**vars(sides), held_out=held_out)


def _flags(*, base: str | None, data: str | None, split: str | None) -> list[str]:
    flags = [] if base is None else ["--model_name_or_path", base]
    if data is not None:  # a split of its own, not a part of what the run was trained on
        flags += ["--dataset_name", data, "--dataset_test_split", split or "test"]
    elif split is not None:
        flags += ["--dataset_test_split", split]
    return flags


def _check_data(settings: Settings) -> None:
    """Raises SettingsError where nobody named held-out pairs."""
    if not settings.data.dataset_name:
        raise SettingsError("no data was named", expected="held-out pairs", do="--data ID|FILE|FOLDER [--split NAME]")
