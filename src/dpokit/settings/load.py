"""Merges the layers of settings: TRL's defaults -> recipe -> YAML file -> command line -> this machine.

Flags are TRL's (`ScriptArguments`, `ModelConfig`, and `DPOConfig` or `SFTConfig` by the recipe's `kind`); dpokit's own
flags are in `flags.DataArguments`. One parser reads every layer, so each of them reports a misspelt name or a value of
the wrong type, and the origin of every value is recorded.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, ModelConfig, SFTConfig

from dpokit.credentials import HIDDEN, SECRET_SETTING
from dpokit.distributed.coordination import peer_errors
from dpokit.distributed.placement import check_placement
from dpokit.distributed.processes import check_devices, join_world
from dpokit.errors import DpokitError, MachineError, SettingsError
from dpokit.rundir import find_model
from dpokit.settings.bounds import check_bounds, check_date
from dpokit.settings.checks import (
    check_adapter,
    check_agreement,
    check_honoured,
    check_secrets,
    check_together,
    show_choices,
)
from dpokit.settings.conditions import check_conditions
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.flags import KINDS, DataArguments, FlagParser, split_kind
from dpokit.settings.layers import read_yaml
from dpokit.settings.yielding import yield_defaults
from dpokit.torch_build_locks import remove_dead_locks

# Settings that a verb takes from a run folder, which may be a stranger's: they describe model, pairs and loss. None of
# them grants trust, starts a process, sets an output path, or fetches more than a model and its data; flags that do
# count only on the verb's own command line.
FROM_RUN = frozenset(flags_with(Fact.FROM_RUN))
CALL = "call"  # the origin of a setting that a call from Python gave
PLAIN_NAME = re.compile(r"\w+")  # an attention's name; a name with a slash would load code from the Hub


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one run, as they were requested; nothing outside this module assigns to them.

    A decision that the run takes itself makes new settings, by `with_training`.

    Attributes:
        recipe: the recipe's name, e.g. `dpo_gpt2`.
        kind: the recipe's kind, `dpo` or `sft`.
        data, training, model: TRL's dataclasses with all values.
        origins: the layer that set each value that is not TRL's default.
        notes: a sentence for each default that a stronger layer changed, and for each setting without an effect.
    """

    recipe: str
    data: DataArguments
    training: DPOConfig | SFTConfig = dataclasses.field(repr=False)  # its repr shows hub_token
    model: ModelConfig
    origins: dict[str, str]
    kind: str = "dpo"
    notes: Sequence[str] = ()

    def record(self) -> dict[str, dict[str, Any]]:
        """`{name: {value, origin}}` for run.json, with JSON values only and with secrets masked."""
        values = dataclasses.asdict(self.data) | self.training.to_dict() | dataclasses.asdict(self.model)
        values |= {"kind": self.kind}
        return {
            name: {
                "value": HIDDEN if value and name.endswith(SECRET_SETTING) else _as_json(value),
                "origin": self.origins.get(name, "default"),
            }
            for name, value in sorted(values.items())
        }

    def values(self) -> dict[str, Any]:
        """`{name: value}` of `record`."""
        return {name: entry["value"] for name, entry in self.record().items()}

    def with_data(self, origin: str, **values: Any) -> "Settings":
        """New settings whose `data` has these values, recorded with this origin."""
        data = dataclasses.replace(self.data, **values)
        return dataclasses.replace(self, data=data, origins=self.origins | dict.fromkeys(values, origin))

    def with_training(self, origin: str, **values: Any) -> "Settings":
        """New settings whose `training` has these values, recorded with this origin; the old ones stay as they are."""
        training = copy.copy(self.training)  # dataclasses.replace would run TRL's and transformers' checks again
        for name, value in values.items():
            setattr(training, name, value)
        return dataclasses.replace(self, training=training, origins=self.origins | dict.fromkeys(values, origin))


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def load_settings(recipe: str, defaults: Mapping[str, Any], argv: Sequence[str] | Mapping[str, Any]) -> Settings:
    """Merges the layers and builds TRL's dataclasses; building them starts accelerate's process group.

    Args:
        recipe: the recipe's file or name.
        defaults: the recipe's `DEFAULTS`.
        argv: the command line without the program's name; or, for a call from Python, settings by name.

    Raises:
        SettingsError: an unknown, retired, contradicting or wrongly typed setting in any layer.
        MachineError: this machine lacks the precision or the GPUs, or other processes cannot be joined.
        RunFolderError: the model is a run folder without a trained model.
    """
    name = Path(recipe).stem
    kind, layers = read_layers(name, defaults, argv)
    values, origins, notes = yield_defaults(layers)
    origins |= {} if kind == "dpo" else {"kind": f"recipe {name}"}
    check_secrets(values, origins)
    check_bounds(values, origins)
    check_date(values)
    if values.get("model_name_or_path"):
        values["model_name_or_path"] = find_model(values["model_name_or_path"])
    machine = find_machine_settings(values)
    values |= machine
    origins |= dict.fromkeys(machine, "this machine")

    check_honoured(values, origins)
    notes += check_conditions(kind, values, origins, layers)
    check_together(values)
    timeout_seconds = values.get("ddp_timeout", DPOConfig.ddp_timeout)
    with peer_errors(timeout_seconds):
        if not values.get("use_cpu"):
            check_devices()
        remove_dead_locks()
        join_world(timeout_seconds, on_cpu=bool(values.get("use_cpu")))
        data, training, model = (_build(group, values) for group in (DataArguments, KINDS[kind], ModelConfig))
    if training.n_gpu > 1:
        # A process that sees several GPUs uses one; transformers would split each batch over all (DataParallel).
        training._n_gpu = 1
    check_agreement(data, training)
    check_adapter(model)
    check_placement(training, model)
    return Settings(name, data, training, model, origins, kind, notes)


def read_layers(
    recipe: str, defaults: Mapping[str, Any], argv: Sequence[str] | Mapping[str, Any]
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The recipe's kind, and each layer's name and values, the weakest first: recipe, YAML file, command line or call.

    Raises: SettingsError for an unknown name or a value of the wrong type in any layer.
    """
    kind, defaults = split_kind(defaults)
    parser = FlagParser(kind, prog=f"{recipe}.py", description=f"Every setting of recipes/{recipe}.py")
    layers = [(f"recipe {recipe}", parser.parse_mapping(defaults, f"recipe {recipe}"))]
    if isinstance(argv, Mapping):
        return kind, [*layers, (CALL, parser.parse_mapping(argv, "the call's settings"))]
    command_line = parser.parse_layer(argv, "the command line")
    config_file = command_line.pop("config", None)
    if config_file is not None:
        layers.append((Path(config_file).name, parser.parse_mapping(read_yaml(config_file, "--config"), config_file)))
    return kind, [*layers, ("command line", command_line)]


def read_run_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that describe its model, pairs and loss, as defaults for a verb that trains nothing.

    The record may be a stranger's, so it grants no trust. The result also sets this machine's device, and no tracker.

    Args:
        record: the result of `RunDir.read_run`; {} without a run.
    """
    settings = {
        name: entry.get("value")
        for name, entry in record.get("settings", {}).items()
        if name in FROM_RUN and entry.get("origin") not in ("default", "this machine")
    }
    if not PLAIN_NAME.fullmatch(str(settings.get("attn_implementation"))):
        del settings["attn_implementation"]
    return settings | {"output_dir": "unused", "report_to": "none", "use_cpu": not torch.accelerator.is_available()}


def _build(group: type[Any], values: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(group) if field.init}
    try:
        return group(**{name: value for name, value in values.items() if name in names})
    except DpokitError:
        raise
    except Exception as error:  # transformers and TRL raise errors of any type from these constructors
        raise SettingsError(
            f"the settings do not fit together: {show_choices(' '.join(str(error).split()))[:500]}",
            expected="settings that do not contradict each other",
            do="change one of the settings that the first line names",
        ) from error


def find_machine_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Machine-dependent defaults: `use_cpu` without a GPU, and bf16 on GPUs that support it, else fp32.

    Raises: MachineError if the settings ask for a precision that the machine lacks.
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
    return has_bf16_processor()


def has_bf16_processor() -> bool:
    """Whether this machine's processor has one of the two features by which oneDNN computes bf16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
