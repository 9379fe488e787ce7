"""The flags there are: TRL's and ours, under one parser for every layer of settings."""

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
    """TRL's dataset flags and ours: which rows, and how much of them."""

    eval_fraction: float | None = dataclasses.field(
        default=None,
        metadata={"help": "Hold out this share of the training prompts for evaluation, instead of a test split."},
    )
    max_train_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Use only the first N rows of the training split."}
    )
    max_eval_samples: int | None = dataclasses.field(
        default=None, metadata={"help": "Use only the first N rows of the evaluation split."}
    )
    max_prompt_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Keep at most this many tokens of a prompt: its end."}
    )
    max_completion_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Keep at most this many tokens of an answer: its start."}
    )
    shared_prefix: bool = dataclasses.field(
        default=True, metadata={"help": "Compute a prompt once for both of its answers, where the model allows it."}
    )
    eval_answers: int = dataclasses.field(
        default=8,
        metadata={"help": "Held-out prompts answered at each evaluation, to hear of answers that fall apart."},
    )
    gates: Literal["stop", "warn"] = dataclasses.field(
        default="stop", metadata={"help": "What a check that a run cannot be right does: stop it, or warn and go on."}
    )
    run_group: str | None = dataclasses.field(
        default=None, metadata={"help": "Group of this run in the tracker: the trials of a sweep, say."}
    )
    run_tags: list[str] | None = dataclasses.field(default=None, metadata={"help": "Tags of this run in the tracker."})
    accept_changes: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Settings that may differ from those a resumed run was begun with, separated by commas."},
    )
    trust_checkpoint: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Load ZeRO and FSDP2 shards that another user or machine wrote: unpickling them is like running "
            "a program of theirs."
        },
    )
    preempt_signal: str | None = dataclasses.field(
        default=None, metadata={"help": "The signal that means: save and end. Without it, SIGTERM and SIGUSR1."}
    )
    save_before_seconds: float | None = dataclasses.field(
        default=None, metadata={"help": "Save and end this long before the Slurm job's time limit."}
    )
    merge_after_training: bool = dataclasses.field(
        default=False, metadata={"help": "At the end, as `dpokit merge`: one whole model of base and adapter."}
    )
    hub_license: str | None = dataclasses.field(
        default=None, metadata={"help": "With --push_to_hub: the model's licence, by the Hub's name for it."}
    )
    overwrite_run: bool = dataclasses.field(
        default=False, metadata={"help": "Delete the run that output_dir holds and begin a new one there."}
    )


# What a recipe's `kind` makes of the training flags.
KINDS: dict[str, type[Any]] = {"dpo": DPOConfig, "sft": SFTConfig}

# Names the field still writes in its configs, and what they are called today.
RETIRED = {
    "warmup_ratio": "warmup_steps (a number below 1 is a share of all steps)",
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "overwrite_output_dir": "overwrite_run",
    "use_flash_attention_2": "attn_implementation: flash_attention_2",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "group_by_length": "nothing: pairs are met in a seeded random order",
    "logging_dir": "nothing: logs stand in output_dir; for TensorBoard set TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "nothing: weights are always safetensors",
    "push_to_hub_model_id": "hub_model_id",
    "max_target_length": "max_completion_length",
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1.0, alpha]",
    "precompute_ref_eval_batch_size": "precompute_ref_batch_size",
    "dataset_mixer": "dataset_name",
    "dataset_splits": "dataset_train_split and dataset_test_split",
    "model_name": "model_name_or_path",
    "is_encoder_decoder": "nothing: only causal language models are trained",
    "generate_during_eval": "eval_answers (held-out prompts answered at each evaluation)",
}


def split_kind(defaults: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A recipe's `kind` (`dpo` where it names none) and its settings. Raises: SettingsError for an unknown kind."""
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
    """TRL's parser without abbreviations, without exits, and with words a user can act on.

    Args:
        kind: of the recipe; it says which training flags there are.
        kwargs: argparse's.
    """

    def __init__(self, kind: str = "dpo", **kwargs: Any) -> None:
        super().__init__((DataArguments, KINDS[kind], ModelConfig), allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="Settings in YAML; the command line overrides them.")
        self.layer = "the command line"
        for action in self._actions:
            if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
                action.nargs, action.const = "?", True  # --bf16 alone means true, as it does for every other switch
            if action.dest == "report_to":
                action.nargs = "+"  # transformers takes several trackers, but its parser is told of one

    def error(self, message: str) -> Never:
        raise SettingsError(
            f"{self.layer}: {message}",
            expected="values of the type that --help shows",
            do="correct the value and run the same command again",
        )

    def _may_be_none(self, name: str) -> bool:
        # Not `field.type`: building the parser strips the None from it.
        hints = [get_type_hints(one).get(name) for one in self.dataclass_types]
        return any(type(None) in get_args(hint) for hint in hints)

    def _takes_several(self, name: str) -> bool:
        return any(action.dest == name and action.nargs in ("+", "*") for action in self._actions)

    def names(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest not in ("help", "config")]

    def parse_layer(self, words: Sequence[str], layer: str) -> dict[str, Any]:
        """Only what the words set, typed. Raises: SettingsError on unknown keys and wrong types."""
        self.layer = layer
        for action in self._actions:
            action.default = argparse.SUPPRESS
        given, unknown = self.parse_known_args(list(words))
        for word in unknown:
            raise self._unknown(word, layer)
        return vars(given)

    def parse_mapping(self, values: Mapping[str, Any], layer: str) -> dict[str, Any]:
        """A recipe's or a YAML file's mapping, through the same parser as the command line."""
        self.layer = layer
        words: list[str] = []
        nothing: dict[str, Any] = {}
        for name, value in values.items():
            if name not in self.names():
                raise self._unknown(f"--{name}", layer, written=str(name))
            if value is None:
                if not self._may_be_none(name):
                    self.error(f"{name} is empty")
                nothing[name] = None
            elif isinstance(value, (list, tuple)):
                if not self._takes_several(name):
                    self.error(f"{name} is a list")
                words += [f"--{name}", *(str(item) for item in value)]
            else:  # in one word: a value may begin with a dash
                words.append(f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
        return self.parse_layer(words, layer) | nothing

    def _unknown(self, word: str, layer: str, written: str = "") -> SettingsError:
        if not word.startswith("-"):
            return SettingsError(
                f"{layer}: {word!r} belongs to no flag", expected="--flag value", do="remove it, or quote the value"
            )
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        if name in RETIRED:
            remedy = f"today's name is {RETIRED[name]}"
        else:
            near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.6)
            near = near or [known for known in self.names() if known.startswith(name)][:3]
            remedy = "did you mean " + " or ".join(near) + "?" if near else "see --help for every setting"
        return SettingsError(
            f"{layer}: there is no setting {(written or name)!r}",
            expected="full names of TRL's and dpokit's flags",
            do=remedy,
        )
