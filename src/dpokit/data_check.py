"""`dpokit data check`: flags as in training, the model's tokenizer, and the check."""

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from datasets.utils.logging import disable_progress_bar, enable_progress_bar
from trl import ModelConfig

from dpokit.console import has_bars, quiet_dependencies, track_progress
from dpokit.data.doctor.check import check_data
from dpokit.errors import SettingsError
from dpokit.model.load import load_tokenizer
from dpokit.rundir import find_model
from dpokit.settings.bounds import check_bounds, check_date
from dpokit.settings.flags import DataArguments
from dpokit.settings.load import read_layers
from dpokit.settings.mixture import NAMES


def check_sources(sources: Sequence[str], argv: Sequence[str]) -> dict[str, Any]:
    """Returns the content of data-check.json.

    Args:
        sources: Hub ids, files or folders; [] for those that the flags name.
        argv: training flags. Those of the data, of the model's tokenizer and of the lengths count; the others may stay,
            so that a run's flags or its YAML file can be given as they are.

    Raises: SettingsError for flags that no run would take, DataError and ModelError as in training.
    """
    quiet_dependencies()
    (enable_progress_bar if has_bars() else disable_progress_bar)()
    layers = _read_layers(argv)
    values = {name: value for _, layer in layers for name, value in layer.items()}
    origins = {name: layer for layer, settings in layers for name in settings}
    check_bounds(values, origins)
    check_date(values)
    beside = [name for name in NAMES if (layers[-1][1] if sources else values).get(name) is not None]
    if len(beside) + bool(sources) > 1:
        names = [f"--{name}" for name in beside]
        raise SettingsError(
            f"{', '.join([*names, *sources])}: the pairs are named {len(beside) + bool(sources)} times",
            expected="sources in one place",
            do=f"leave {names[-1]} out",
        )
    data = _pick(DataArguments, values)
    if not sources and not data.sources():
        raise SettingsError(
            "no source was named", expected="a Hub id, a file or a folder", do="dpokit data check SOURCE"
        )
    tokenizer = None
    if values.get("model_name_or_path"):
        values["model_name_or_path"] = find_model(values["model_name_or_path"])
        tokenizer = load_tokenizer(
            _pick(ModelConfig, values), trust_remote_code=bool(values.get("trust_remote_code", False))
        )
    with track_progress(desc="checking", unit="pair") as bar:
        return check_data(
            sources,
            data,
            tokenizer=tokenizer,
            max_length=values.get("max_length"),
            has_test_flag="dataset_test_split" in values,
            on_progress=bar.update,
        )


def _read_layers(argv: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the layers of the flags, which may be those of a run on pairs or of one on chosen answers."""
    try:
        return read_layers("data check", {}, argv)[1]
    except SettingsError:
        with suppress(SettingsError):
            return read_layers("data check", {"kind": "sft"}, argv)[1]
        raise


def _pick(group: type[Any], values: Mapping[str, Any]) -> Any:
    """Builds one of TRL's groups of flags from the values that it has."""
    names = {field.name for field in dataclasses.fields(group) if field.init}
    return group(**{name: value for name, value in values.items() if name in names})
