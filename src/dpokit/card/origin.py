"""Finds a model's base, data and results, and writes them as the card's front matter. No torch."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from dpokit.card.escape import last_name
from dpokit.card.front_matter import is_hub_id, is_on_disk
from dpokit.errors import SettingsError
from dpokit.metrics import list_results
from dpokit.report.read import Run, finite, mapping, read_object
from dpokit.rundir import RunDir
from dpokit.settings.mixture import HUB_FILE, READERS

Weights = Literal["model", "adapter", "both"]


@dataclass(frozen=True)
class Source:
    """A model or a dataset: its name without a local path, and whether it is on the Hub."""

    name: str
    on_hub: bool


@dataclass(frozen=True)
class Lineage:
    """The origin of a model.

    Attributes:
        weights: the published weights: a whole model, an adapter, or both.
        base: the whole model from which training started; None if it is unknown.
        continued: the adapter from which training started; None without one.
        datasets: the training data.
        measured_on: the sources of the held-out pairs; empty without an evaluation.
        measured_split: the split of a single such source; None for pairs that were held out, and of several sources.
    """

    weights: Weights
    base: Source | None
    continued: Source | None
    datasets: list[Source]
    measured_on: list[Source]
    measured_split: str | None

    @property
    def is_adapter(self) -> bool:
        return self.weights == "adapter"


def is_supervised(run: Run) -> bool:
    """Whether the run was supervised fine-tuning on the chosen answers."""
    return bool(run.setting("kind") == "sft")


def find_lineage(folder: RunDir, run: Run, *, weights: Weights | None, base_model: str | None) -> Lineage:
    """Returns the origin of a run's model, from the run folder alone.

    Args:
        weights: the published weights; None for the whole model if there is one.
        base_model: Hub id that replaces the base's name in the run; None to keep it.

    Raises:
        SettingsError: the folder does not hold these weights.
        RunFolderError: adapter_config.json is damaged.
    """
    weights = _find_weights(folder, run) if weights is None else _check_weights(folder, weights)
    model = run.setting("model_name_or_path")
    do = "restore it from a copy of the folder"
    adapter_base = (read_object(folder.adapter / "adapter_config.json", do=do) or {}).get("base_model_name_or_path")
    base = continued = None
    if adapter_base and model and adapter_base != model:
        continued = _find_source(run, "model_name_or_path", model)
        base = _as_source(adapter_base, on_disk=is_on_disk(adapter_base))
    elif model or adapter_base:
        base = _find_source(run, "model_name_or_path", str(model or adapter_base))
    measured_on, measured_split = _find_measured(run)
    return Lineage(
        weights=weights,
        base=Source(base_model, True) if base_model else base,
        continued=continued,
        datasets=list(dict.fromkeys(_find_datasets(run).values())),
        measured_on=measured_on,
        measured_split=measured_split,
    )


def build_front_matter(
    run: Run, lineage: Lineage, *, model_name: str, language: Iterable[str], licence: Mapping[str, str | None]
) -> str:
    """Returns the YAML between the card's two lines of `---`.

    Args:
        model_name: the model's name in the model-index.
        licence: `license`, `license_name` and `license_link`.
    """
    base = lineage.base.name if lineage.base is not None and lineage.base.on_hub else None
    data = ModelCardData(
        language=list(language) or None,
        license=licence["license"],
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        library_name="peft" if lineage.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=None if base is None else ("adapter" if lineage.is_adapter else "finetune"),
        datasets=[source.name for source in lineage.datasets if source.on_hub] or None,
        tags=[*(["sft"] if is_supervised(run) else ["dpo", "preference-optimization"]), "trl", "dpokit"]
        + (["lora"] if run.setting("use_peft") else []),
        model_name=re.sub(r"[^\w.-]+", "-", model_name).strip("-") or "model",
        eval_results=_list_results(run, lineage) or None,
    )
    if data.eval_results is None:  # without results huggingface_hub would write the name as a separate key
        data.pop("model_name")
    return data.to_yaml()


def _find_weights(folder: RunDir, run: Run) -> Weights:
    if folder.find_whole() is not None:
        return "model"
    return "adapter" if folder.adapter.is_dir() or run.setting("use_peft") else "model"


def _check_weights(folder: RunDir, weights: Weights) -> Weights:
    if weights != "model" and not folder.adapter.is_dir():
        raise SettingsError(
            f"--weights {weights}: {folder.path} has no adapter/",
            expected="a run that trained an adapter",
            do="--weights model",
        )
    if weights != "adapter" and folder.find_whole() is None:
        raise SettingsError(
            f"--weights {weights}: {folder.path} has neither model/ nor an up-to-date merged/",
            expected="a whole model",
            do=f"dpokit merge {folder.path}, or --weights adapter",
        )
    return weights


def _find_source(run: Run, flag: str, name: str) -> Source:
    """The model or dataset of a setting. run.json records whether it was local; for older runs the disk is checked."""
    local = run.record.get("local")
    return _as_source(name, on_disk=flag in local if isinstance(local, list) else is_on_disk(name))


def _find_datasets(run: Run) -> dict[str, Source]:
    """The sources of the run's pairs, by their titles. Of a mixture, run.json has the places of the local ones."""
    datasets = {}
    for source in run.data_sources():
        flag = "dataset_name" if source.place == run.setting("dataset_name") else source.place
        path = source.place if source.path in READERS else source.path.removeprefix(HUB_FILE)
        dataset = _find_source(run, flag, path)
        # Several files have one place, but each has a name.
        datasets[source.title] = (
            dataset if dataset.on_hub else Source(", ".join(map(last_name, source.locations)), False)
        )
    return datasets


def _as_source(name: str, *, on_disk: bool) -> Source:
    on_hub = not on_disk and is_hub_id(name)
    return Source(name if on_hub else last_name(name), on_hub)


def _find_measured(run: Run) -> tuple[list[Source], str | None]:
    """The sources of the held-out pairs; and their split if they are of a single source."""
    data = mapping((run.pairs or {}).get("data"))
    full_name = data.get("name")
    if not isinstance(full_name, str):
        return [], None
    datasets = _find_datasets(run)
    name, comma, split = full_name.rpartition(", split ")
    names = [name] if comma else full_name.split(" + ")
    if not comma and data.get("own", True) and not datasets.keys() >= {*names}:
        names = list(datasets)  # a share of the training pairs
    sources = [datasets.get(name) or _as_source(name, on_disk=is_on_disk(name)) for name in names]
    return list(dict.fromkeys(sources)), split if comma else None


def _list_results(run: Run, lineage: Lineage) -> list[EvalResult]:
    tuned = mapping((run.pairs or {}).get("tuned"))
    if not lineage.measured_on:
        return []
    source = lineage.measured_on[0]
    on_hub = len(lineage.measured_on) == 1 and source.on_hub
    is_local = not any(each.on_hub for each in lineage.measured_on)
    results = []
    for key, (kind, name) in list_results().items():
        result: dict[str, Any] = mapping(tuned.get(key))
        value, low, high = (finite(result.get(part)) for part in ("value", "low", "high"))
        if value is None:
            continue
        interval = "" if low is None or high is None else f" (95 % interval {low:.4g} to {high:.4g})"
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Preference between two answers",
                dataset_type=source.name if on_hub else "custom",
                dataset_name=source.name
                if on_hub
                else f"held-out pairs, {'not on the Hub' if is_local else 'of several datasets'}",
                dataset_split=lineage.measured_split or "held-out",
                metric_type=kind,
                metric_name=name + interval,
                metric_value=value,
            )
        )
    return results
