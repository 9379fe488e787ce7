"""Loads base and tuned model of a run or by name, for evaluate, chat and serve."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpokit.atomic_files import read_record
from dpokit.errors import ModelError, RunFolderError
from dpokit.model.load import find_base, find_max_length, load_frozen, load_tokenizer, name_model
from dpokit.rundir import RunDir, find_model
from dpokit.settings.load import Settings, read_run_settings


@dataclass
class Sides:
    """Base and tuned model, which share a tokenizer.

    Attributes:
        settings: of the run, or made for the model.
        run: the run folder; None for a model.
        tuned_name, base_name: folders or Hub ids of the models; no base name for a whole model without a base.
        tuned: the tuned model.
        base: the base model; None if it is `tuned` without its adapter, or if there is no base.
        longest: most tokens of a row that both models accept; None if neither has a known limit.
    """

    settings: Settings
    run: RunDir | None
    tuned_name: str
    base_name: str | None
    tuned: PreTrainedModel | PeftModel
    base: PreTrainedModel | PeftModel | None
    tokenizer: PreTrainedTokenizerBase
    longest: int | None

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        """Yields the base model; if it is `tuned` without its adapter, the adapter is switched off in this context."""
        has_adapter = self.base is None and isinstance(self.tuned, PeftModel)
        with self.tuned.disable_adapter() if has_adapter else nullcontext():
            yield self.tuned if self.base is None else self.base


def find_run(run_or_model: str) -> tuple[RunDir | None, dict[str, Any]]:
    """Returns the run folder and its run.json; None and {} for a model's folder or a Hub id.

    Raises: RunFolderError for a folder without a run or a model, and for a run that stopped before it wrote settings.
    """
    run = RunDir(run_or_model)
    record = run.read_run()
    if record is None:
        folder = Path(run_or_model)
        if folder.is_dir() and not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise RunFolderError(
                f"{run_or_model} holds neither a run (run.json) nor a model (config.json or adapter_config.json)",
                expected="the --output_dir of a run, a model's folder, or a Hub id",
                do="correct the path",
            )
        return None, {}
    run.check_links()
    if not record.get("settings"):
        raise RunFolderError(
            f"{run.run_json} has no settings: the run stopped before it wrote them",
            expected="a run with weights",
            do="train it, or name a model",
        )
    return run, add_prompt_format(run, record)


def add_prompt_format(run: RunDir, record: dict[str, Any]) -> dict[str, Any]:
    """Returns run.json with `prompt_format` raw for a run from before this flag that trained texts as they are.

    Such a run has texts with a prompt, and no chat template.
    """
    if "prompt_format" in record["settings"] or any(run.path.glob("*/chat_template.jinja")):
        return record
    try:
        layout = read_record(run.data_json)["train"]["format"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return record
    if not str(layout).endswith("plain"):
        return record
    raw = {"value": "raw", "origin": "a run from before this flag"}
    return record | {"settings": record["settings"] | {"prompt_format": raw}}


def read_run_defaults(record: dict[str, Any], run_or_model: str) -> dict[str, Any]:
    """Returns the default settings, of a run or for a model, of a command that does not train."""
    return read_run_settings(record) | ({} if record else {"model_name_or_path": run_or_model})


def find_names(settings: Settings, run: RunDir | None, run_or_model: str, base: str | None) -> tuple[str, str | None]:
    """Returns the folders or Hub ids of the tuned model and its base; without `base` a whole model has none.

    Raises: RunFolderError for a run without weights, as `run_or_model` or as `base`.
    """
    if base is not None:
        base = find_model(base)
    tuned = run_or_model if run is None else str(_find_weights(run))
    return tuned, base or (find_base(name_model(settings, tuned)) if run is None else settings.model.model_name_or_path)


def load_sides(settings: Settings, run: RunDir | None, run_or_model: str, base: str | None) -> Sides:
    """Loads both models; an adapter and its own base share one copy of the base.

    Args:
        settings: of the run or model; their `model_name_or_path` is `base` unless that is `None`.
        run: the run folder of `run_or_model`; None for a model.
        run_or_model: a run folder, or the folder or Hub id of a whole model or an adapter.
        base: the model or run folder to compare with; None for the base of the run or the adapter.

    Raises:
        ModelError: a model that cannot be loaded, or a base of another vocabulary.
        RunFolderError: a run without weights.
    """
    tuned_name, base_name = find_names(settings, run, run_or_model, base)
    tuned_config = name_model(settings, tuned_name)
    tokenizer = load_tokenizer(tuned_config, trust_remote_code=settings.training.trust_remote_code)
    tuned = load_frozen(settings, tuned_name, tokenizer)
    base_model = None
    if base_name is not None and base_name != find_base(tuned_config):
        _check_vocabulary(settings, base_name, tokenizer)
        base_model = load_frozen(settings, base_name, tokenizer)
    limits = [find_max_length(settings, model) for model in (tuned, base_model) if model is not None]
    longest = min((length for length in limits if length is not None), default=None)
    return Sides(settings, run, tuned_name, base_name, tuned, base_model, tokenizer, longest)


def _find_weights(run: RunDir) -> Path:
    weights = run.find_weights()
    if weights is None:
        raise RunFolderError(
            f"{run.path} holds no weights: neither {run.adapter.name}/ nor {run.model.name}/",
            expected="a finished run",
            do="let it finish, or name one of its checkpoints as a model, with --base",
        )
    return weights


def _check_vocabulary(settings: Settings, base_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError for a base with another vocabulary: its token ids would stand for other texts."""
    other = load_tokenizer(name_model(settings, base_name), trust_remote_code=settings.training.trust_remote_code)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"the base {base_name} has another vocabulary ({len(other):,} tokens) than the tuned model "
            f"({len(tokenizer):,})",
            expected="the model that the tuned model was trained from",
            do="correct --base",
        )
