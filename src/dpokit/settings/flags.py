"""All training flags, TRL's and dpokit's, and the one parser for every layer of settings."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Never, get_args, get_type_hints

from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from dpokit.errors import SettingsError


@dataclasses.dataclass
class DataArguments(ScriptArguments):
    """TRL's dataset flags, and all flags that dpokit adds."""

    eval_fraction: float | None = dataclasses.field(
        default=None,
        metadata={"help": "Hold out this share of the training pairs, by prompt, instead of a test split."},
    )
    columns: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Columns of another name: prompt=question+context,chosen=answers.best (prompt, chosen, ...)."
        },
    )
    ignore_columns: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Columns that are left out, separated by commas."}
    )
    skip_bad_rows: bool = dataclasses.field(
        default=False,
        metadata={"help": "Drop rows of JSONL and CSV files that cannot be read, instead of stopping."},
    )
    format: str | None = dataclasses.field(
        default=None,
        metadata={"help": "The layout of the rows, for rows that fit several, such as implicit_plain."},
    )
    ranked: Literal["best_worst", "adjacent", "all", "random"] = dataclasses.field(
        default="best_worst", metadata={"help": "The pairs of a row that has several answers with scores."}
    )
    min_score_gap: float = dataclasses.field(
        default=0.0, metadata={"help": "Leave out pairs of answers whose scores differ by less."}
    )
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Use only the first N rows of the training split."}
    )
    max_eval_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Use only the first N rows of the evaluation split."}
    )
    max_prompt_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Keep at most this many tokens of a prompt: whole turns of its end."}
    )
    max_completion_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Keep at most this many tokens of an answer, from its start."}
    )
    prompt_share: float = dataclasses.field(
        default=0.5,
        metadata={"help": "The share of max_length that a long prompt keeps when long answers are cut."},
    )
    template_date: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Date, as 2026-11-29, for chat templates that write one; by default that of the first start."
        },
    )
    prompt_format: Literal["transcript", "raw"] = dataclasses.field(
        default="transcript",
        metadata={"help": "Without a chat template, join prompt and answer as an HH transcript, or as they are (raw)."},
    )
    shared_prefix: bool = dataclasses.field(
        default=True, metadata={"help": "Compute a prompt once for all of its answers, if the model allows it."}
    )
    group_by_prompt: bool = dataclasses.field(
        default=True, metadata={"help": "Train the pairs of one prompt in the same step, up to 8 of them."}
    )
    eval_answers: int = dataclasses.field(
        default=8,
        metadata={"help": "Held-out prompts answered at each evaluation, to detect degenerate answers."},
    )
    gates: Literal["stop", "warn"] = dataclasses.field(
        default="stop", metadata={"help": "If a check shows that the result will be wrong: stop, or warn and continue."}
    )
    run_group: str | None = dataclasses.field(
        default=None, metadata={"help": "Group of this run in the tracker, for example the trials of a sweep."}
    )
    run_tags: list[str] | None = dataclasses.field(default=None, metadata={"help": "Tags of this run in the tracker."})
    accept_changes: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Settings that a resumed run may change, separated by commas."},
    )
    trust_checkpoint: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Load ZeRO and FSDP2 shards that another user or machine wrote; unpickling them can run any code."
        },
    )
    preempt_signal: str | None = dataclasses.field(
        default=None, metadata={"help": "The signal on which the run saves and ends; by default SIGTERM and SIGUSR1."}
    )
    save_before_seconds: float | None = dataclasses.field(
        default=None, metadata={"help": "Save and end this long before the Slurm job's time limit."}
    )
    merge_after_training: bool = dataclasses.field(
        default=False, metadata={"help": "After training, run `dpokit merge`: base and adapter become one model."}
    )
    hub_license: str | None = dataclasses.field(
        default=None, metadata={"help": "With --push_to_hub: the Hub's identifier of the model's licence."}
    )
    overwrite_run: bool = dataclasses.field(
        default=False, metadata={"help": "Delete the run that output_dir holds and begin a new one there."}
    )

    def __post_init__(self) -> None:
        self.columns = [f"{name}={path}" for name, path in parse_columns(self.columns).items()] or None
        self.ignore_columns = _split_items(",".join(self.ignore_columns or ()), "ignore_columns") or None


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


def json_object(text: str) -> Any:
    """Returns the value of a flag with options; argparse shows this function's name for a text that is no JSON."""
    return json.loads(text)


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
    "dataset_mixer": "dataset_name",
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

    def names(self) -> list[str]:
        names = dict.fromkeys(action.dest for action in self._actions)  # two actions may set one value
        return [name for name in names if name not in ("help", "config")]

    def parse_layer(self, argv: Sequence[str], layer: str) -> dict[str, Any]:
        """The typed settings that these arguments set. Raises: SettingsError for unknown names and wrong types."""
        self.layer = layer
        if sum(argument.partition("=")[0] == "--dataset_name" for argument in argv) > 1:
            raise SettingsError(
                f"{layer}: --dataset_name is given twice",
                expected="one dataset: argparse would take the last one alone",
                do="put the files into one folder, and name the folder",
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
                argv += [f"--{name}", *(str(item) for item in value)]
            else:  # as one argument, because a value may begin with a dash
                argv.append(f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
        return self.parse_layer(argv, layer) | nones

    def _unknown(self, argument: str, layer: str, written: str = "") -> SettingsError:
        if not argument.startswith("-"):
            return SettingsError(
                f"{layer}: {argument!r} belongs to no flag", expected="--flag value", do="remove it, or quote the value"
            )
        name = argument.lstrip("-").split("=")[0].replace("-", "_")
        if name in RETIRED:
            remedy = ("" if RETIRED[name].startswith("remove it") else "today's name is ") + RETIRED[name]
        elif other_kinds := [
            kind
            for kind, group in KINDS.items()
            if name not in self.names() and name in {field.name for field in dataclasses.fields(group)}
        ]:
            remedy = f"leave it out: it is a setting of the recipes {other_kinds[0]}_*, and this one is of another kind"
        else:
            near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.6)
            near = near or [flag for flag in self.names() if flag.startswith(name)][:3]
            remedy = "did you mean " + " or ".join(near) + "?" if near else "see --help for every setting"
        return SettingsError(
            f"{layer}: there is no setting {(written or name)!r}",
            expected="full names of TRL's and dpokit's flags",
            do=remedy,
        )
