"""Where a model comes from and what it reached, as the Hub's front matter tells it. No torch."""

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

Weights = Literal["model", "adapter", "both"]


@dataclass(frozen=True)
class Source:
    """A model or a dataset: its name as it may be shown, and whether that is one on the Hub."""

    name: str
    on_hub: bool


@dataclass(frozen=True)
class Lineage:
    """What a card says of the model's origin.

    Attributes:
        weights: what is published: a whole model, an adapter, or both, the model first.
        base: the whole model it was tuned from; None where nobody knows.
        continued: the adapter that was trained further, where there was one.
        datasets: that it was trained on.
        measured_on: the held-out pairs' source and split; None where it was not evaluated.
    """

    weights: Weights
    base: Source | None
    continued: Source | None
    datasets: list[Source]
    measured_on: tuple[Source, str | None] | None

    @property
    def is_adapter(self) -> bool:
        return self.weights == "adapter"


def is_supervised(run: Run) -> bool:
    """Whether the run was a supervised warm start, on chosen answers alone."""
    return bool(run.setting("kind") == "sft")


def find_lineage(folder: RunDir, run: Run, *, weights: Weights | None, base_model: str | None) -> Lineage:
    """The lineage, from the folder alone.

    Args:
        weights: what is published; None for the whole model where there is one.
        base_model: of the Hub, instead of the run's own.

    Raises:
        SettingsError: weights that the folder does not hold.
        RunFolderError: a damaged adapter_config.json.
    """
    weights = _find_weights(folder, run) if weights is None else _check_weights(folder, weights)
    named = run.setting("model_name_or_path")
    do = "bring it back from a copy of the folder"
    of_adapter = (read_object(folder.adapter / "adapter_config.json", do=do) or {}).get("base_model_name_or_path")
    base = continued = None
    if of_adapter and named and of_adapter != named:
        continued = _find_source(run, "model_name_or_path", named)
        base = _as_source(of_adapter, on_disk=is_on_disk(of_adapter))
    elif named or of_adapter:
        base = _find_source(run, "model_name_or_path", str(named or of_adapter))
    data = run.setting("dataset_name")
    return Lineage(
        weights=weights,
        base=Source(base_model, True) if base_model else base,
        continued=continued,
        datasets=[_find_source(run, "dataset_name", data)] if data else [],
        measured_on=_find_measured(run),
    )


def build_front_matter(
    run: Run, lineage: Lineage, *, model_name: str, language: Iterable[str], licence: Mapping[str, str | None]
) -> str:
    """The YAML between the card's two lines of `---`.

    Args:
        model_name: in the model-index.
        licence: `license`, `license_name`, `license_link`.
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
    if data.eval_results is None:  # without results the library would write the name as a key of its own
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
            expected="a run that trained one",
            do="--weights model",
        )
    if weights != "adapter" and folder.find_whole() is None:
        raise SettingsError(
            f"--weights {weights}: {folder.path} has neither model/ nor a merged/ as new as its adapter",
            expected="a whole model",
            do=f"dpokit merge {folder.path}, or --weights adapter",
        )
    return weights


def _find_source(run: Run, flag: str, name: str) -> Source:
    """A model or dataset that a run was given: run.json knows whether it was a file then; older ones do not."""
    local = run.record.get("local")
    return _as_source(name, on_disk=flag in local if isinstance(local, list) else is_on_disk(name))


def _as_source(name: str, *, on_disk: bool) -> Source:
    on_hub = not on_disk and is_hub_id(name)
    return Source(name if on_hub else last_name(name), on_hub)


def _find_measured(run: Run) -> tuple[Source, str | None] | None:
    told = mapping((run.pairs or {}).get("data")).get("name")
    if not isinstance(told, str):
        return None
    name, comma, split = told.rpartition(", split ")
    if not comma:  # a share of the training prompts, held out
        name = str(run.setting("dataset_name") or "")
    known = name == run.setting("dataset_name")
    source = _find_source(run, "dataset_name", name) if known else _as_source(name, on_disk=is_on_disk(name))
    return source, split if comma else None


def _list_results(run: Run, lineage: Lineage) -> list[EvalResult]:
    tuned = mapping((run.pairs or {}).get("tuned"))
    if lineage.measured_on is None:
        return []
    source, split = lineage.measured_on
    results = []
    for key, (kind, name) in list_results().items():
        found: dict[str, Any] = mapping(tuned.get(key))
        value, low, high = (finite(found.get(part)) for part in ("value", "low", "high"))
        if value is None:
            continue
        told = "" if low is None or high is None else f" (95 % interval {low:.4g} to {high:.4g})"
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Preference between two answers",
                dataset_type=source.name if source.on_hub else "custom",
                dataset_name=source.name if source.on_hub else "held-out pairs, not on the Hub",
                dataset_split=split or "held-out",
                metric_type=kind,
                metric_name=name + told,
                metric_value=value,
            )
        )
    return results
