"""Rejects unsupported and conflicting settings, and secrets in settings."""

import re
from collections.abc import Mapping
from typing import Any, Never

from trl import DPOConfig, ModelConfig, SFTConfig

from dpokit.credentials import SECRET_SETTING, find_secrets
from dpokit.errors import SettingsError
from dpokit.settings.flag_facts import REFUSED
from dpokit.settings.flags import DataArguments

# How Python writes a choice of transformers' enumerations.
OF_CHOICE = re.compile(r"<?\b[A-Z][A-Za-z]+(?:Strategy|Type|Names|Option|Mode)\.([A-Z][A-Z_0-9]*)\b(?:: '[^']*'>)?")
# TRL checks these values only when it computes the first loss.
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


def check_honoured(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raises SettingsError for a flag that TRL's parser accepts and dpokit does not support."""
    for name, reason in REFUSED.items():
        if values.get(name):
            raise SettingsError(
                f"{origins[name]} sets {name}, which is not supported",
                expected="supported settings",
                do=f"remove it: {reason}",
            )


def check_secrets(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raises SettingsError for a secret in a setting whose value run.json, trackers and the model card show."""
    for name, value in values.items():
        if name.endswith(SECRET_SETTING):
            continue
        for kind in find_secrets(str(value)):
            raise SettingsError(
                f"{origins[name]} sets {name}, whose value holds {kind}",
                expected="settings without secrets: they are written to run.json and shown",
                do="pass the secret by an environment variable (HF_TOKEN, WANDB_API_KEY) or `hf auth login`; download "
                "a file that needs a login first",
            )


def check_together(values: Mapping[str, Any]) -> None:
    """Raises SettingsError for settings of one layer whose conflict TRL and transformers report in their own terms."""
    kinds, weights = values.get("loss_type") or ["sigmoid"], values.get("loss_weights")
    if isinstance(kinds, list | tuple) and weights is not None and len(weights) != len(kinds):
        raise SettingsError(
            f"loss_weights has {len(weights)} {'number' if len(weights) == 1 else 'numbers'} "
            f"({' '.join(f'{weight:g}' for weight in weights)}), and loss_type names "
            f"{len(kinds)} {'loss' if len(kinds) == 1 else 'losses'} ({' '.join(kinds)})",
            expected="one weight for each loss",
            do="set both: --loss_type sigmoid sft --loss_weights 1 0.1; or leave out loss_weights",
        )
    evaluated, saved = (
        str(getattr(value, "value", value))
        for value in (values.get("eval_strategy", "no"), values.get("save_strategy", "steps"))
    )
    if not values.get("load_best_model_at_end") or saved == "best":
        return
    if evaluated == "no":
        raise SettingsError(
            "load_best_model_at_end is set, but eval_strategy is no: no evaluation shows which checkpoint is the best",
            expected="evaluations on held-out pairs",
            do="--eval_strategy steps, or --load_best_model_at_end false",
        )
    if evaluated != saved:
        raise SettingsError(
            f"load_best_model_at_end is set, but eval_strategy is {evaluated} and save_strategy is {saved}",
            expected="a checkpoint for each evaluation",
            do=f"--save_strategy {evaluated}, or --load_best_model_at_end false",
        )


def show_choices(text: str) -> str:
    """The text of a library's error with its choices as they are typed: `no`, not `IntervalStrategy.NO`."""
    return OF_CHOICE.sub(lambda match: match[1].lower(), text)


def check_agreement(data: DataArguments, training: DPOConfig | SFTConfig) -> None:
    """Raises SettingsError for unknown values and for settings that contradict each other."""

    def refuse(problem: str, expected: str, do: str) -> Never:
        raise SettingsError(problem, expected=expected, do=do)

    of_pairs = isinstance(training, DPOConfig)
    unknown = sorted(set(training.loss_type) - set(LOSS_TYPES)) if of_pairs else []
    if unknown:
        refuse(f"loss_type {', '.join(unknown)} is unknown", ", ".join(LOSS_TYPES), "correct --loss_type")
    if of_pairs and training.f_divergence_type not in DIVERGENCES:
        refuse(
            f"f_divergence_type is {training.f_divergence_type}", ", ".join(DIVERGENCES), "correct --f_divergence_type"
        )
    if data.dataset_streaming and training.max_steps <= 0:
        refuse("a streamed dataset has no known length", "max_steps", "--max_steps 1000")
    if data.dataset_streaming and data.eval_fraction is not None:
        refuse(
            "eval_fraction cannot be taken from a stream, whose length is unknown",
            "a test split, or no streaming",
            "--dataset_test_split NAME --max_eval_samples 1000, or --dataset_streaming false",
        )
    if data.dataset_streaming and training.eval_strategy != "no" and data.max_eval_samples is None:
        refuse("a streamed evaluation split has no known end", "max_eval_samples", "--max_eval_samples 1000")
    if data.dataset_streaming and of_pairs and training.precompute_ref_log_probs:
        refuse(
            "precompute_ref_log_probs cannot read a streamed dataset ahead of the run",
            "one of the two flags",
            "drop either flag",
        )
    if training.dataloader_num_workers and data.dataset_streaming:
        refuse("a stream is read once, in order, by one worker", "0 workers", "--dataloader_num_workers 0")


def check_adapter(model: ModelConfig) -> None:
    """Raises SettingsError for a wrong pattern of target modules, and for quantisation without `use_peft`."""
    for name in (model.lora_target_modules or []) if model.use_peft else []:
        try:
            re.compile(name)
        except re.error as error:
            raise SettingsError(
                f"lora_target_modules has {name}, which is no regular expression ({error})",
                expected="names of layers, or a regular expression of them",
                do="correct --lora_target_modules",
            ) from error
    if not model.use_peft and (model.load_in_4bit or model.load_in_8bit):
        raise SettingsError(
            "a quantised model cannot be trained as a whole",
            expected="--use_peft with --load_in_4bit or --load_in_8bit",
            do="add --use_peft, or load the model in 16 or 32 bit",
        )
