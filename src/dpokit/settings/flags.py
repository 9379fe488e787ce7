"""All training flags, TRL's and dpokit's, and the one parser for every layer of settings."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Never, get_args, get_type_hints

from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from dpokit.errors import SettingsError
from dpokit.settings.flag_facts import REFUSED
from dpokit.settings.flag_help import LAUNCHER, MEANT, OF_LAUNCHER, own_field
from dpokit.settings.mixture import DataSource, flatten_sources, name_keys, parse_sources, show_json


@dataclasses.dataclass
class DataArguments(ScriptArguments):
    """TRL's dataset flags, and all flags that dpokit adds."""

    datasets: list[dict[str, Any]] | None = own_field("datasets")
    dataset_mixer: dict[str, float] | None = own_field("dataset_mixer")
    mixture_seed: int = own_field("mixture_seed")
    balance_sources: bool = own_field("balance_sources")
    max_pairs_per_source: int | None = own_field("max_pairs_per_source")
    max_length_gap: int | None = own_field("max_length_gap")
    drop_duplicates: bool = own_field("drop_duplicates")
    eval_fraction: float | None = own_field("eval_fraction")
    columns: list[str] | None = own_field("columns")
    ignore_columns: list[str] | None = own_field("ignore_columns")
    skip_bad_rows: bool = own_field("skip_bad_rows")
    format: str | None = own_field("format")
    ranked: Literal["best_worst", "adjacent", "all", "random"] = own_field("ranked")
    min_score_gap: float = own_field("min_score_gap")
    max_train_samples: int | None = own_field("max_train_samples")
    max_eval_samples: int | None = own_field("max_eval_samples")
    max_prompt_length: int | None = own_field("max_prompt_length")
    max_completion_length: int | None = own_field("max_completion_length")
    prompt_share: float = own_field("prompt_share")
    template_date: str | None = own_field("template_date")
    prompt_format: Literal["transcript", "raw"] = own_field("prompt_format")
    shared_prefix: bool = own_field("shared_prefix")
    group_by_prompt: bool = own_field("group_by_prompt")
    eval_answers: int = own_field("eval_answers")
    gates: Literal["stop", "warn"] = own_field("gates")
    run_group: str | None = own_field("run_group")
    run_tags: list[str] | None = own_field("run_tags")
    accept_changes: list[str] | None = own_field("accept_changes")
    trust_checkpoint: bool = own_field("trust_checkpoint")
    preempt_signal: str | None = own_field("preempt_signal")
    save_before_seconds: float | None = own_field("save_before_seconds")
    merge_after_training: bool = own_field("merge_after_training")
    hub_license: str | None = own_field("hub_license")
    overwrite_run: bool = own_field("overwrite_run")

    def __post_init__(self) -> None:
        self.columns = [f"{name}={path}" for name, path in parse_columns(self.columns).items()] or None
        self.datasets = flatten_sources(self.datasets)
        self.sources()
        self.ignore_columns = _split_items(",".join(self.ignore_columns or ()), "ignore_columns") or None

    def sources(self) -> list[DataSource]:
        """Returns the sources of the pairs. Raises: SettingsError as `parse_sources` and `read_columns`."""
        sources = parse_sources(vars(self))
        for source in sources:
            if source.columns is not None:
                try:
                    read_columns(source.columns)
                except SettingsError as error:
                    problem = f"{source.title}: {name_keys(error.seen, source)}"
                    do = name_keys(error.do, source)
                    raise SettingsError(problem, expected=error.expected, do=do) from error
        return sources

    def describe(self) -> str:
        """Returns the names of all sources in one text."""
        return " + ".join(source.title for source in self.sources())


# The names that --columns gives to columns; data/layouts.py reads them.
COLUMN_NAMES = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs")


def parse_columns(values: Sequence[str] | None) -> dict[str, str]:
    """Returns the column, or the dotted path in one, by each name of `--columns`.

    Args:
        values: texts of `name=column`, several in one text if commas separate them; or one JSON object, as a mapping in
            YAML becomes.

    Raises: SettingsError for another form, an unknown name, and a name or a column that is there twice.
    """
    text = ",".join(values or ())
    try:
        pairs = json.loads(text).items() if text.lstrip().startswith("{") else None
    except ValueError:
        pairs = None
    items = [f"{name}={path}" for name, path in pairs] if pairs else _split_items(text, "columns")
    columns: dict[str, str] = {}
    for item in items:
        name, _, path = (part.strip() for part in item.partition("="))
        problem = ""
        if not name or not path or "," in path:
            problem = f"{item!r}, which is not NAME=COLUMN"
        elif name not in COLUMN_NAMES:
            problem = f"the name {name!r}"
        elif name in columns or path in columns.values():
            problem = f"{name if name in columns else path} twice"
        if problem:
            raise SettingsError(
                f"--columns has {problem}",
                expected=f"NAME=COLUMN,NAME=COLUMN; each NAME is one of {', '.join(COLUMN_NAMES)}",
                do="correct --columns, for example --columns prompt=question,chosen=answer.text",
            )
        columns[name] = path
    return columns


def read_columns(value: Mapping[str, str] | Sequence[str]) -> dict[str, str] | list[str]:
    """Returns the columns of a source of a mixture: a column by each name, as `--columns`, or the only columns to read.

    Raises: SettingsError as `parse_columns`.
    """
    if isinstance(value, Mapping):
        return parse_columns([json.dumps(value)])
    items = _split_items(value, "columns") if isinstance(value, str) else list(value)
    return parse_columns(items) if any("=" in item for item in items) else items


def json_object(text: str) -> Any:
    """Returns the value of a flag with options. Raises: ArgumentTypeError for a text that is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as \'{{"name": "value"}}\'') from None


def _split_items(text: str, flag: str) -> list[str]:
    """Returns the items that commas separate. Raises: SettingsError for an empty item."""
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    if not all(items):
        raise SettingsError(
            f"--{flag} {text} has an empty item", expected="items with one comma between them", do=f"correct --{flag}"
        )
    return items


# The class of training flags for each `kind` of recipe.
KINDS: dict[str, type[Any]] = {"dpo": DPOConfig, "sft": SFTConfig}

# Outdated names that configs still use, and today's names; without one, a sentence after `remove it`.
RETIRED = {
    "warmup_ratio": "warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "overwrite_run",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "group_by_length": "remove it: pairs are read in a seeded random order",
    "logging_dir": "remove it: logs are in output_dir; for TensorBoard set TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "remove it: weights are always safetensors",
    "push_to_hub_model_id": "hub_model_id",
    "max_target_length": "max_completion_length",
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1.0, alpha]",
    "precompute_ref_eval_batch_size": "precompute_ref_batch_size",
    "dataset_mixture": "datasets (the list alone), mixture_seed and eval_fraction",
    "streaming": "dataset_streaming",
    "test_split_size": "eval_fraction",
    "dataset_splits": "dataset_train_split and dataset_test_split",
    "model_name": "model_name_or_path",
    "is_encoder_decoder": "remove it: only causal language models are trained",
    "generate_during_eval": "eval_answers (held-out prompts answered at each evaluation)",
}


def split_kind(defaults: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A recipe's `kind` (by default `dpo`) and its settings. Raises: SettingsError for an unknown kind."""
    settings = dict(defaults)
    kind = settings.pop("kind", "dpo")
    if kind not in KINDS:
        raise SettingsError(
            f"the recipe's kind is {kind!r}",
            expected="dpo (preference pairs) or sft (the chosen answers alone)",
            do="correct kind in the recipe's DEFAULTS",
        )
    return kind, settings


class FlagParser(TrlParser):
    """TRL's parser without abbreviations; it raises SettingsError where argparse would exit.

    Args:
        kind: the recipe's kind, which decides the training flags.
        kwargs: arguments of argparse.ArgumentParser.
    """

    def __init__(self, kind: str = "dpo", **kwargs: Any) -> None:
        super().__init__((DataArguments, KINDS[kind], ModelConfig), allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="Settings in YAML; the command line overrides them.")
        self.layer = "the command line"
        for action in self._actions:
            if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
                action.nargs, action.const = "?", True  # --bf16 without a value means true, like every other switch
            if getattr(action.type, "__name__", "") == "dict":
                action.type = json_object  # TRL would call dict on the text
            if action.dest == "report_to":
                action.nargs = "+"  # transformers accepts several trackers, but its parser only one

    def error(self, message: str) -> Never:
        raise SettingsError(
            f"{self.layer}: {message}",
            expected="values of the type that --help shows",
            do="correct the value and run the same command again",
        )

    def _may_be_none(self, name: str) -> bool:
        # Not `field.type`: building the parser strips the None from it.
        hints = [get_type_hints(dataclass).get(name) for dataclass in self.dataclass_types]
        return any(type(None) in get_args(hint) for hint in hints)

    def _takes_several(self, name: str) -> bool:
        return any(action.dest == name and action.nargs in ("+", "*") for action in self._actions)

    def print_all_flags(self) -> None:
        """Prints every flag that dpokit supports, with the text and the default of TRL and transformers."""
        for action in self._actions:
            if action.dest in REFUSED:
                action.help = argparse.SUPPRESS
        self.usage = f"{self.prog} [--config FILE.yaml] [--flag value ...]"
        self.print_help()

    def names(self) -> list[str]:
        names = dict.fromkeys(action.dest for action in self._actions)  # two actions may set one value
        return [name for name in names if name not in ("help", "config")]

    def parse_layer(self, argv: Sequence[str], layer: str) -> dict[str, Any]:
        """The typed settings that these arguments set. Raises: SettingsError for unknown names and wrong types."""
        self.layer = layer
        if sum(argument.partition("=")[0] == "--dataset_name" for argument in argv) > 1:
            raise SettingsError(
                f"{layer}: --dataset_name is given twice",
                expected="one flag: argparse would take the last one alone",
                do="--dataset_name A,B takes several datasets",
            )
        for action in self._actions:
            action.default = argparse.SUPPRESS
        settings, unknown = self.parse_known_args(list(argv))
        for argument in unknown:
            raise self._unknown(argument, layer)
        return vars(settings)

    def parse_mapping(self, values: Mapping[str, Any], layer: str) -> dict[str, Any]:
        """The typed settings of a recipe or a YAML file, parsed as on the command line. Raises: as `parse_layer`."""
        self.layer = layer
        argv: list[str] = []
        nones: dict[str, Any] = {}
        for name, value in values.items():
            if name not in self.names():
                raise self._unknown(f"--{name}", layer, written=str(name))
            if value is None:
                if not self._may_be_none(name):
                    self.error(f"{name} is empty")
                nones[name] = None
            elif isinstance(value, (list, tuple)):
                if not self._takes_several(name):
                    self.error(f"{name} is a list")
                if not value:
                    self.error(f"{name} is empty")
                argv += [f"--{name}", *(show_json(item) if isinstance(item, Mapping) else str(item) for item in value)]
            else:  # as one argument, because a value may begin with a dash
                argv.append(f"--{name}={show_json(value) if isinstance(value, Mapping) else value}")
        return self.parse_layer(argv, layer) | nones

    def _unknown(self, argument: str, layer: str, written: str = "") -> SettingsError:
        if not argument.startswith("-"):
            return SettingsError(
                f"{layer}: {argument!r} belongs to no flag", expected="--flag value", do="remove it, or quote the value"
            )
        name = argument.lstrip("-").split("=")[0].replace("-", "_")
        dashes = "" if written else "--"  # a mapping has names without them
        if name in RETIRED:
            remedy = ("" if RETIRED[name].startswith("remove it") else "today's name is ") + RETIRED[name]
        elif name in OF_LAUNCHER:
            remedy = LAUNCHER
        elif MEANT.get(name) in self.names():
            remedy = f"did you mean {dashes}{MEANT[name]}?"
        elif other_kinds := [
            kind
            for kind, group in KINDS.items()
            if name not in self.names() and name in {field.name for field in dataclasses.fields(group)}
        ]:
            remedy = f"leave it out: it is a setting of the recipes {other_kinds[0]}_*, and this one is of another kind"
        else:
            near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.6)
            near = near or [flag for flag in self.names() if flag.startswith(name)][:3]
            named = " or ".join(f"{dashes}{flag}" for flag in near)
            remedy = f"did you mean {named}?" if near else "see --help for every setting"
        return SettingsError(
            f"{layer}: there is no setting {(written or name)!r}",
            expected="full names of TRL's and dpokit's flags",
            do=remedy,
        )
