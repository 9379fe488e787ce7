"""Base and tuned side by side, from a run folder or by name: for whoever compares them or talks to them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpokit.errors import ModelError, RunFolderError
from dpokit.model.load import find_base, find_max_length, load_frozen, load_tokenizer, name_model
from dpokit.rundir import RunDir, find_model
from dpokit.settings.load import Settings, read_run_settings


@dataclass
class Sides:
    """Two models of one tokenizer.

    Attributes:
        settings: of the run, or made for the model.
        run: its folder; None where a model was named.
        tuned_name, base_name: what was loaded; no base where only one model was named.
        tuned: the model that is judged.
        base: what it is compared with; None where that is `tuned` without its adapter, or where there is none.
        longest: most tokens of a row that both can take; None where nobody knows.
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
        """The base model."""
        adapted = self.base is None and isinstance(self.tuned, PeftModel)
        with self.tuned.disable_adapter() if adapted else nullcontext():
            yield self.tuned if self.base is None else self.base


def find_run(what: str) -> tuple[RunDir | None, dict[str, Any]]:
    """The run folder and its run.json; None and nothing where `what` is a model's folder or a Hub id.

    Raises: RunFolderError for a folder that holds neither, and for a run that ended before it began.
    """
    run = RunDir(what)
    record = run.read_run()
    if record is None:
        if Path(what).is_dir() and not any(
            (Path(what) / name).exists() for name in ("config.json", "adapter_config.json")
        ):
            raise RunFolderError(
                f"{what} holds neither a run (run.json) nor a model (config.json or adapter_config.json)",
                expected="the --output_dir of a run, a model's folder, or a Hub id",
                do="correct the path",
            )
        return None, {}
    run.check_links()
    if not record.get("settings"):
        raise RunFolderError(
            f"{run.run_json} has no settings: the run ended before it began",
            expected="a run with weights",
            do="train it, or name a model",
        )
    return run, record


def read_defaults(record: dict[str, Any], what: str) -> dict[str, Any]:
    """Settings of a run, or for a model that was named, for a verb that trains nothing."""
    return read_run_settings(record) | ({} if record else {"model_name_or_path": what})


def find_names(settings: Settings, run: RunDir | None, what: str, base: str | None) -> tuple[str, str | None]:
    """What the tuned model and its base are loaded from; no base for a whole model that was named alone.

    Raises: RunFolderError for a run without weights, as `what` or as `base`.
    """
    if base is not None:
        base = find_model(base)
    tuned = what if run is None else str(_find_weights(run))
    return tuned, base or (find_base(name_model(settings, tuned)) if run is None else settings.model.model_name_or_path)


def load_sides(settings: Settings, run: RunDir | None, what: str, base: str | None) -> Sides:
    """Loads both models; of an adapter and the base that it belongs to, one copy of the base.

    Args:
        settings: of the run, with `base` as its model where that was named.
        run: of `what`; None where it is a model.
        what: a run folder, or a model: a folder or a Hub id, of a whole model or an adapter.
        base: what it is compared with, which may be a run folder, too; None for the run's own, or the adapter's.

    Raises:
        ModelError: a model that cannot be loaded, or a base of another vocabulary.
        RunFolderError: a run without weights.
    """
    tuned_name, base_name = find_names(settings, run, what, base)
    asked = name_model(settings, tuned_name)
    tokenizer = load_tokenizer(asked, trust_remote_code=settings.training.trust_remote_code)
    tuned = load_frozen(settings, tuned_name, tokenizer)
    base_model = None
    if base_name is not None and base_name != find_base(asked):
        _check_fit(settings, base_name, tokenizer)
        base_model = load_frozen(settings, base_name, tokenizer)
    known = [find_max_length(settings, model) for model in (tuned, base_model) if model is not None]
    longest = min((length for length in known if length is not None), default=None)
    return Sides(settings, run, tuned_name, base_name, tuned, base_model, tokenizer, longest)


def _find_weights(run: RunDir) -> Path:
    found = run.find_weights()
    if found is None:
        raise RunFolderError(
            f"{run.path} holds no weights: neither {run.adapter.name}/ nor {run.model.name}/",
            expected="a finished run",
            do="let it finish, or name one of its checkpoints as a model, with --base",
        )
    return found


def _check_fit(settings: Settings, base_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError for a base of another vocabulary: its log-probs would be those of other words."""
    other = load_tokenizer(name_model(settings, base_name), trust_remote_code=settings.training.trust_remote_code)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"the base {base_name} has another vocabulary ({len(other):,} tokens) than the tuned model "
            f"({len(tokenizer):,})",
            expected="the model that it was tuned from",
            do="correct --base",
        )
