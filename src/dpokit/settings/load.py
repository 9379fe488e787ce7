"""Settings: TRL's defaults -> recipe -> YAML file -> command line -> what this machine decides.

Every flag is TRL's own (`ScriptArguments`, `DPOConfig` or, by the recipe's `kind`, `SFTConfig`, `ModelConfig`); the few
of ours stand in `flags.DataArguments`.
Each layer goes through the same parser, so a misspelt key or a value of the wrong type is caught alike in all of them,
and for every value it is known where it came from.
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
from dpokit.settings.bounds import check_bounds
from dpokit.settings.checks import check_adapter, check_agreement, check_honoured, check_secrets
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.settings.flags import KINDS, DataArguments, FlagParser, split_kind
from dpokit.settings.layers import read_yaml
from dpokit.settings.yielding import yield_defaults
from dpokit.torch_build_locks import pass_dead_locks

# What a verb takes from a run folder, which a stranger may have made: how model, pairs and loss are described. Nothing
# here grants trust, starts a process, sets a place to write to or asks the network for more than a model and its data;
# such flags count only where this command line has them.
FROM_RUN = frozenset(flags_with(Fact.FROM_RUN))
CALL = "call"  # the origin of a setting that a call from Python gave
PLAIN_NAME = re.compile(r"\w+")  # of an attention; one with a slash is a program on the Hub


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of one run, as they were requested; nothing outside this module assigns to them.

    A decision that the run takes itself makes new settings, by `with_training`.

    Attributes:
        recipe: the recipe's name, e.g. `dpo_gpt2`.
        kind: of the recipe: `dpo`, or `sft`.
        data, training, model: TRL's own dataclasses, filled.
        origins: where each value that is not TRL's default was set.
        notes: a sentence for each default that yielded to a stronger setting.
    """

    recipe: str
    data: DataArguments
    training: DPOConfig | SFTConfig = dataclasses.field(repr=False)  # its repr shows hub_token
    model: ModelConfig
    origins: dict[str, str]
    kind: str = "dpo"
    notes: Sequence[str] = ()

    def record(self) -> dict[str, dict[str, Any]]:
        """`{name: {value, origin}}` for run.json, JSON values only, secrets masked."""
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
        SettingsError: an unknown, retired, contradicting or wrongly typed setting, in whichever layer.
        MachineError: a precision or GPUs that this machine does not have, or other processes that cannot be joined.
        RunFolderError: the model is a run folder without a trained model.
    """
    name = Path(recipe).stem
    kind, layers = read_layers(name, defaults, argv)
    values, origins, notes = yield_defaults(layers)
    origins |= {} if kind == "dpo" else {"kind": f"recipe {name}"}
    check_secrets(values, origins)
    check_bounds(values, origins)
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
    return Settings(name, data, training, model, origins, kind, notes)


def read_layers(
    recipe: str, defaults: Mapping[str, Any], argv: Sequence[str] | Mapping[str, Any]
) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The recipe's kind, and each layer's name and values, the weakest first: recipe, YAML file, command line or call.

    Raises: SettingsError for a name or a value that no parser knows, in whichever layer.
    """
    kind, defaults = split_kind(defaults)
    parser = FlagParser(kind, prog=f"{recipe}.py", description=f"Every setting of recipes/{recipe}.py")
    layers = [(f"recipe {recipe}", parser.parse_mapping(defaults, f"recipe {recipe}"))]
    if isinstance(argv, Mapping):
        return kind, [*layers, (CALL, parser.parse_mapping(argv, "the call's settings"))]
    given = parser.parse_layer(argv, "the command line")
    config_file = given.pop("config", None)
    if config_file is not None:
        layers.append((Path(config_file).name, parser.parse_mapping(read_yaml(config_file, "--config"), config_file)))
    return kind, [*layers, ("command line", given)]


def read_asked(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that describe its model, pairs and loss, as defaults for a verb that trains nothing.

    The record is a stranger's: it grants no trust. With them, this machine's device and no tracker.

    Args:
        record: `RunDir.read_run`; {} where there is no run.
    """
    asked = {
        name: entry.get("value")
        for name, entry in record.get("settings", {}).items()
        if name in FROM_RUN and entry.get("origin") not in ("default", "this machine")
    }
    if not PLAIN_NAME.fullmatch(str(asked.get("attn_implementation"))):
        del asked["attn_implementation"]
    return asked | {"output_dir": "unused", "report_to": "none", "use_cpu": not torch.accelerator.is_available()}


def _build(kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    try:
        return kind(**{name: value for name, value in values.items() if name in known})
    except DpokitError:
        raise
    except Exception as error:  # transformers and TRL check few of their values before they use them
        raise SettingsError(
            f"the settings do not fit together: {' '.join(str(error).split())[:500]}",
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
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("avx512_bf16") or processor.get("amx_tile"))
