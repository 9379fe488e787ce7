"""Settings: TRL's defaults -> recipe -> YAML file -> command line -> what this machine decides.

Every flag is TRL's own (`ScriptArguments`, `DPOConfig` or, by the recipe's `kind`, `SFTConfig`, `ModelConfig`); the few
of ours stand in `flags.DataArguments`.
Each layer goes through the same parser, so a misspelt key or a value of the wrong type is caught alike in all of them,
and for every value it is known where it came from.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Never

import torch
import yaml
from trl import DPOConfig, ModelConfig, SFTConfig

from dpokit.errors import MachineError, SettingsError
from dpokit.extensions import pass_dead_locks
from dpokit.flags import KINDS, DataArguments, FlagParser, split_kind
from dpokit.peers import peer_errors
from dpokit.placement import check_placement
from dpokit.rundir import find_model
from dpokit.world import check_devices, join_world

# Flags that TRL or transformers declare but that would have no effect here, or one that is not meant.
NOT_HONOURED = {
    "padding_free": "TRL warns and pads all the same",
    "truncation_mode": "prompts keep their end and answers their start: --max_prompt_length, --max_completion_length",
    "pad_token": "TRL retires it; the tokenizer's own padding token is used, or its EOS",
    "ignore_bias_buffers": "it mends models of 2023 that transformers no longer has",
    **dict.fromkeys(
        ("train_sampling_strategy", "shuffle_dataset"),
        "rows are met in a seeded random order, which a resume can repeat",
    ),
    "auto_find_batch_size": "it changes the global batch in the middle of a run; lower per_device_train_batch_size "
    "and raise gradient_accumulation_steps instead",
    "hub_strategy": "the model goes up once, at the end of the run",
    "hub_always_push": "the model goes up once, at the end of the run",
    "model_init_kwargs": "it would be read for the reference alone; use --dtype, --attn_implementation, "
    "--model_revision",
    "enable_jit_checkpoint": "it saves the wrong random state, and a preempted job looks completed",
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing"), "each answer is a row of its own"),
    "assistant_only_loss": "the chosen answer alone is learnt already; --completion_only_loss false adds its prompt",
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs"), "the chosen answers of preference pairs are trained on"),
    **dict.fromkeys(("chat_template_path", "eos_token"), "the tokenizer's own is used; set it in the model's folder"),
}

# TRL looks at these only when it computes the first loss.
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)

SECRET = ("token", "api_key", "password")
# What a run's settings say of the machine it was trained on, or of training alone.
OF_TRAINING = {"use_cpu", "bf16", "fp16", "tf32", "resume_from_checkpoint", "overwrite_run", "accept_changes"}
OF_TRAINING |= {"precompute_ref_log_probs", "save_before_seconds", "preempt_signal", "output_dir", "report_to"}
OF_TRAINING |= {"dataset_streaming"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one run.

    Attributes:
        recipe: the recipe's name, e.g. `dpo_gpt2`.
        kind: of the recipe: `dpo`, or `sft`.
        data, training, model: TRL's own dataclasses, filled.
        origins: where each value that is not TRL's default was set.
    """

    recipe: str
    data: DataArguments
    training: DPOConfig | SFTConfig = dataclasses.field(repr=False)  # its repr shows hub_token
    model: ModelConfig
    origins: dict[str, str]
    kind: str = "dpo"

    def record(self) -> dict[str, dict[str, Any]]:
        """`{name: {value, origin}}` for run.json, JSON values only, secrets masked."""
        values = dataclasses.asdict(self.data) | self.training.to_dict() | dataclasses.asdict(self.model)
        values |= {"kind": self.kind}
        return {
            name: {
                "value": "***" if value and name.endswith(SECRET) else json.loads(json.dumps(value, default=str)),
                "origin": self.origins.get(name, "default"),
            }
            for name, value in sorted(values.items())
        }

    def values(self) -> dict[str, Any]:
        """`{name: value}` of `record`."""
        return {name: entry["value"] for name, entry in self.record().items()}


def load_settings(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str]) -> Settings:
    """Merges the layers and builds TRL's dataclasses; building them starts accelerate's process group.

    Args:
        recipe: the recipe's file or name.
        defaults: the recipe's `DEFAULTS`.
        argv: the command line without the program's name.

    Raises:
        SettingsError: an unknown, retired, contradicting or wrongly typed setting, in whichever layer.
        MachineError: a precision or GPUs that this machine does not have, or other processes that cannot be joined.
        RunFolderError: the model is a run folder without a trained model.
    """
    name = Path(recipe).stem
    kind, defaults = split_kind(defaults)
    parser = FlagParser(kind, prog=f"{name}.py", description=f"Every setting of recipes/{name}.py")
    layers = [(f"recipe {name}", parser.parse_mapping(defaults, f"recipe {name}"))]
    given = parser.parse_layer(argv, "the command line")
    config_file = given.pop("config", None)
    if config_file is not None:
        layers.append((Path(config_file).name, parser.parse_mapping(read_yaml(config_file, "--config"), config_file)))
    layers.append(("command line", given))

    values: dict[str, Any] = {}
    origins: dict[str, str] = {} if kind == "dpo" else {"kind": f"recipe {name}"}
    for layer, layer_values in layers:
        values |= layer_values
        origins |= dict.fromkeys(layer_values, layer)
    if values.get("model_name_or_path"):
        values["model_name_or_path"] = find_model(values["model_name_or_path"])
    machine = find_machine_settings(values)
    values |= machine
    origins |= dict.fromkeys(machine, "this machine")

    check_honoured(values, origins)
    timeout_seconds = values.get("ddp_timeout", DPOConfig.ddp_timeout)
    with peer_errors(timeout_seconds):
        if not values.get("use_cpu"):
            check_devices()
        pass_dead_locks()
        join_world(timeout_seconds, on_cpu=bool(values.get("use_cpu")))
        data, training, model = (_build(one, values) for one in (DataArguments, KINDS[kind], ModelConfig))
    if training.n_gpu > 1:
        # One process that sees several GPUs takes one: transformers would split each batch over all (DataParallel).
        training._n_gpu = 1
    check_agreement(data, training)
    check_adapter(model, origins)
    check_placement(training, model)
    return Settings(name, data, training, model, origins, kind)


def read_asked(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for in a run, as defaults for what is done with its model on another machine.

    Args:
        record: run.json, with `settings`.
    """
    return {
        name: entry["value"]
        for name, entry in record["settings"].items()
        if entry["origin"] not in ("default", "this machine") and name not in OF_TRAINING and entry["value"] != "***"
    }


def read_asked_here(record: Mapping[str, Any]) -> dict[str, Any]:
    """`read_asked`, as defaults for a verb that trains nothing: on this machine's device, without a tracker."""
    asked = read_asked(record) if record else {}
    return asked | {"output_dir": "unused", "report_to": "none", "use_cpu": not torch.accelerator.is_available()}


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2's floats: 5e-5 is a number also without a dot, and inside a mapping."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str, flag: str) -> dict[str, Any]:
    """A mapping in YAML. Raises: SettingsError where the file cannot be read, or holds none."""
    try:
        values = yaml.load(Path(path).read_text(), _YamlLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"{flag} {path}: {error}", expected="a YAML file of settings", do="correct the path or the file"
        ) from error
    if not isinstance(values, dict):
        raise SettingsError(f"{flag} {path} holds no settings", expected="lines of name: value", do="fill the file")
    return values


def _build(kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    try:
        return kind(**{name: value for name, value in values.items() if name in known})
    except (ValueError, TypeError, ImportError, KeyError, OSError) as error:
        raise SettingsError(
            " ".join(str(error).split()),
            expected="settings that go together",
            do="change one of the settings that the first line names",
        ) from error


def find_machine_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What nobody set and the machine decides: `use_cpu` without a GPU; bf16 on GPUs that have it, else fp32.

    Raises: MachineError where a precision was asked for that the machine lacks.
    """
    on_cpu = bool(values.get("use_cpu")) or not torch.accelerator.is_available()
    if values.get("fp16") and values.get("bf16"):
        raise SettingsError("fp16 and bf16 are both true", expected="one of them", do="--fp16 false or --bf16 false")
    if values.get("fp16") and on_cpu:
        raise MachineError(
            "fp16 is true, but this run is on the CPU, which has no fp16 training",
            expected="fp16 on a GPU",
            do="--fp16 false (the run is then in fp32)",
        )
    if values.get("bf16") and not _has_bf16(on_cpu):
        where = "processor (neither AVX512-BF16 nor AMX)" if on_cpu else "GPU"
        raise MachineError(
            f"bf16 is true, but this {where} has no bf16",
            expected="an Ampere GPU or newer, or a processor with AVX512-BF16 or AMX",
            do="--bf16 false (the run is then in fp32)" + ("" if on_cpu else ", or --bf16 false --fp16 true"),
        )
    decided: dict[str, Any] = {}
    if on_cpu and not values.get("use_cpu"):
        decided["use_cpu"] = True
    if values.get("bf16") is None:
        decided["bf16"] = not on_cpu and not values.get("fp16") and _has_bf16(on_cpu)
    return decided


def _has_bf16(on_cpu: bool) -> bool:
    if not on_cpu:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    # torch reads the processor's flags; oneDNN computes bf16 in hardware with either of the two.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_honoured(values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Raises SettingsError for a flag that parses but would do nothing here, or not what it says."""
    for name in NOT_HONOURED:
        if values.get(name):
            raise SettingsError(
                f"{origins[name]} sets {name}, which has no effect here",
                expected="settings that are honoured",
                do=f"remove it: {NOT_HONOURED[name]}",
            )


def check_agreement(data: DataArguments, training: DPOConfig | SFTConfig) -> None:
    """Raises SettingsError for values that cannot be, or that cannot be together."""

    def refuse(seen: str, expected: str, do: str) -> Never:
        raise SettingsError(seen, expected=expected, do=do)

    if data.eval_answers < 0:
        refuse(f"eval_answers is {data.eval_answers}", "0 (none) or more", "--eval_answers 8")
    for name in ("max_train_samples", "max_eval_samples", "max_prompt_length", "max_completion_length"):
        number = getattr(data, name)
        if number is not None and number < 1:
            refuse(f"{name} is {number}", "a number of at least 1", f"raise --{name}, or leave it out for no limit")
    of_pairs = isinstance(training, DPOConfig)
    unknown = sorted(set(training.loss_type) - set(LOSS_TYPES)) if of_pairs else []
    if unknown:
        refuse(f"loss_type {', '.join(unknown)} is unknown", ", ".join(LOSS_TYPES), "correct --loss_type")
    for name in ("beta", "learning_rate") if of_pairs else ("learning_rate",):
        number = getattr(training, name)
        if not 0 < number < float("inf"):
            refuse(f"{name} is {number}", "a number above 0", f"correct --{name}")
    if training.max_length is not None and training.max_length < 2:
        refuse(
            f"max_length is {training.max_length}, which leaves no room for any answer",
            "at least 2: one token of the prompt and one of the answer",
            "--max_length 512",
        )
    if data.eval_fraction is not None and not 0 < data.eval_fraction < 1:
        refuse(f"eval_fraction is {data.eval_fraction}", "a share between 0 and 1", "--eval_fraction 0.05")
    if data.dataset_streaming and training.max_steps <= 0:
        refuse("a streamed dataset has no known length", "max_steps", "--max_steps 1000")
    if data.dataset_streaming and data.eval_fraction is not None:
        refuse(
            "eval_fraction cannot be taken of a stream, whose length nobody knows",
            "a test split, or no streaming",
            "--dataset_test_split NAME --max_eval_samples 1000, or --dataset_streaming false",
        )
    if data.dataset_streaming and training.eval_strategy != "no" and data.max_eval_samples is None:
        refuse("a streamed evaluation split has no known end", "max_eval_samples", "--max_eval_samples 1000")
    if data.dataset_streaming and of_pairs and training.precompute_ref_log_probs:
        refuse("a streamed dataset cannot be gone through ahead of the run", "one of the two", "drop either flag")
    if training.dataloader_num_workers and data.dataset_streaming:
        refuse("a stream is read once, in order, by one worker", "0 workers", "--dataloader_num_workers 0")


def check_adapter(model: ModelConfig, origins: Mapping[str, str]) -> None:
    """Raises SettingsError where LoRA or quantisation is asked for, but not `use_peft`."""
    if model.use_peft:
        return
    asked = [name for name in origins if name.startswith("lora_") or name in ("use_dora", "use_rslora")]
    if any(origins[name] == "command line" for name in asked):
        raise SettingsError(
            f"{', '.join(asked)} is set, but use_peft is not: the whole model would be trained",
            expected="--use_peft with LoRA's settings",
            do="add --use_peft, or remove the LoRA settings",
        )
    if model.load_in_4bit or model.load_in_8bit:
        raise SettingsError(
            "a quantised model cannot be trained as a whole",
            expected="--use_peft with --load_in_4bit or --load_in_8bit",
            do="add --use_peft, or load the model in 16 or 32 bit",
        )
