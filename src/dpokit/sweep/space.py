"""Reads SPACE.yaml, which names the recipe, the parameters and the kind of search, and checks it before any start."""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Never, TypeGuard

from transformers.hf_argparser import string_to_bool

from dpokit.credentials import SECRET_SETTING, find_secrets
from dpokit.errors import SettingsError
from dpokit.metrics import EVAL, find_needs
from dpokit.settings.flag_facts import Fact, flags_of_pairs, flags_with
from dpokit.settings.flags import FlagParser, split_kind
from dpokit.settings.layers import find_recipe, read_defaults, read_yaml

SEARCHES = ("grid", "listed", "random", "tpe")
KEYS = {
    "recipe": "the recipe's file",
    "settings": "settings of every trial, which override the recipe's",
    "search": ", ".join(SEARCHES),
    "parameters": "the parameters to vary: {name: [values]}, or {name: {low, high, log, step}}",
    "configurations": "for search: listed, a list of {name: value}",
    "trials": "the number of trials, for random and tpe",
    "seeds": "the number of runs of each configuration, each with its own seed",
    "metric": "the metric that ranks trials, at its best evaluation: eval_loss, or the accuracy if the loss varies",
    "prune": "whether to end a trial early that is worse than the median of the others",
    "config_file": "the placement, as for accelerate launch",
    "sampler_seed": "the seed of the search itself, for random and tpe",
}
RANGE_KEYS = {"low", "high", "log", "step"}
PRECOMPUTE = "precompute_ref_log_probs"
SET_BY_SWEEP = frozenset(flags_with(Fact.BY_SWEEP))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; whole numbers if both ends are."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Space:
    """The description of a search.

    Attributes:
        path: SPACE.yaml.
        recipe: the recipe's file.
        defaults: the recipe's `DEFAULTS`.
        settings: the settings of every trial; they override those of the YAML file that `config` names.
        search: one of SEARCHES.
        parameters: the parameters to vary, as lists of values or ranges.
        configurations: the configurations of `listed` and `grid`.
        trials: the number of trials.
        seeds: the number of runs of each trial.
        metric: the metric that ranks trials.
        prune: whether trials that are worse than the median are ended early.
        config_file: a placement; None for accelerate's own default.
        sampler_seed: the seed of random and TPE.
    """

    path: Path
    recipe: Path
    defaults: dict[str, Any]
    settings: dict[str, Any]
    search: str
    parameters: dict[str, list[Any] | Range]
    configurations: list[dict[str, Any]]
    trials: int
    seeds: int
    metric: str
    prune: bool
    config_file: Path | None
    sampler_seed: int

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of every trial, from the space or else from the recipe."""
        return self.settings.get(name, self.defaults.get(name, default))

    def identity(self) -> dict[str, Any]:
        """The values that must not change when a search continues, as JSON; the number of trials may change."""
        names = [str(name) for name in self.parameters]
        identity = {
            "recipe": self.recipe.name,
            # The sweep sets it according to the number of trials; it does not change the runs.
            "settings": {name: value for name, value in self.settings.items() if name != PRECOMPUTE},
            "search": self.search,
            "parameters": {name: _describe(self.parameters[name]) for name in names},
            "configurations": self.configurations,
            "seeds": self.seeds,
            "sampler_seed": self.sampler_seed,
        }
        return dict(json.loads(json.dumps(identity, default=str)))

    def find_varied(self) -> list[str]:
        """The settings that differ between trials."""
        choices = {name: values for name, values in self.parameters.items() if not isinstance(values, Range)}
        names = dict.fromkeys(name for configuration in self.configurations for name in configuration)
        choices |= {name: [configuration.get(name) for configuration in self.configurations] for name in names}
        ranges = [name for name, values in self.parameters.items() if isinstance(values, Range)]
        return ranges + [
            name for name, values in choices.items() if len({json.dumps(v, default=str) for v in values}) > 1
        ]

    def find_obstacles(self) -> list[str]:
        """The varied settings because of which trials cannot be compared by the metric.

        As in a report: losses need the same pairs, loss and beta, rewards the same pairs and beta.
        """
        needs = find_needs(self.metric)
        flags = set(flags_with(Fact.LOSS)) if needs == "loss" else {"beta"} if needs == "beta" else set()
        varied = self.find_varied()
        is_of_training = not self.metric.startswith(EVAL) or "eval_fraction" in varied
        is_of_training |= self.setting("eval_fraction") is not None
        flags |= set(flags_of_pairs(with_training_rows=is_of_training)) if needs else set()
        return [name for name in varied if name in flags]

    def check_trial(self, number: int, settings: Mapping[str, Any]) -> None:
        """Raises SettingsError for settings in the study that this space cannot have drawn."""
        if self.search in ("grid", "listed"):
            is_drawn = json.dumps(settings, sort_keys=True) in {
                json.dumps(configuration, sort_keys=True, default=str) for configuration in self.configurations
            }
        else:
            is_drawn = settings.keys() == self.parameters.keys() and all(
                values.low <= settings[name] <= values.high if isinstance(values, Range) else settings[name] in values
                for name, values in self.parameters.items()
            )
        if not is_drawn:
            _refuse(
                self.path,
                f"trial {number} of the study has settings of another space",
                "trials that this space draws",
                "start a search in another --output-dir",
            )


def load_space(path: Path) -> Space:
    """Reads and checks a space. Raises: SettingsError, which names the wrong key."""
    content = read_yaml(str(path), "the space")
    for name in content:
        if name not in KEYS:
            _refuse(path, f"there is no key {name!r}", ", ".join(KEYS), "correct or remove it")
    if not isinstance(content.get("recipe"), str):
        _refuse(path, "it names no recipe", "recipe: recipes/dpo_gpt2.py", "add this key")
    recipe = find_recipe(content["recipe"])
    defaults = read_defaults(recipe)
    parameters = _read_parameters(path, content.get("parameters") or {})
    configurations = content.get("configurations") or []
    search = content.get("search") or ("listed" if configurations else "grid")
    if search not in SEARCHES:
        _refuse(path, f"search is {search!r}", ", ".join(SEARCHES), "correct the value")
    _check_search(path, search, parameters, configurations, content.get("trials"))
    if search == "grid":
        configurations = list(_cross(parameters))
    config_file = None if content.get("config_file") is None else Path(str(content["config_file"]))
    if config_file is not None and not config_file.is_file():
        _refuse(path, f"config_file {config_file} is no file", "a placement of accelerate_configs/", "correct the path")
    is_fixed = search in ("grid", "listed")
    space = Space(
        path=path,
        recipe=recipe,
        defaults=defaults,
        settings=_read_settings(path, content.get("settings") or {}),
        search=search,
        parameters=parameters,
        configurations=configurations,
        trials=len(configurations) if is_fixed else _read_number(path, content, "trials", None),
        seeds=_read_number(path, content, "seeds", 1),
        metric=str(content.get("metric") or "eval_loss"),
        prune=_read_switch(path, "prune", content.get("prune")),
        config_file=config_file,
        sampler_seed=_read_number(path, content, "sampler_seed", 0, least=0),
    )
    _check_flags(space)
    if content.get("metric") is None and space.find_obstacles() and split_kind(defaults)[0] == "dpo":
        space = replace(space, metric="eval_rewards/accuracies")
    if space.find_obstacles():
        space = replace(space, prune=False)  # it would compare trials that cannot be compared
    if _can_share_reference(space):
        space.settings[PRECOMPUTE] = True
    return space


def _refuse(path: Path, problem: str, expected: str, do: str) -> Never:
    raise SettingsError(f"{path}: {problem}", expected=expected, do=do)


def _read_number(path: Path, content: Mapping[str, Any], name: str, default: int | None, *, least: int = 1) -> int:
    number = content.get(name, default)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        _refuse(path, f"{name} is {number}", f"a whole number of at least {least}", f"{name}: 20")
    return int(number)


def _read_switch(path: Path, name: str, value: Any) -> bool:
    try:
        return value is not None and bool(string_to_bool(value))
    except (argparse.ArgumentTypeError, AttributeError):
        _refuse(path, f"{name} is {value!r}", "true or false", f"{name}: true")


def _read_settings(path: Path, settings: Any) -> dict[str, Any]:
    """The settings of the space, over those of the file that `config` names."""
    if not isinstance(settings, dict):
        _refuse(path, "settings is not a mapping", KEYS["settings"], "write lines of name: value below it")
    config = settings.get("config")
    config_settings = {} if config is None else read_yaml(str(config), f"{path}: settings: config:")
    config_settings = {name: value for name, value in config_settings.items() if name not in SET_BY_SWEEP}
    return {**config_settings, **{name: value for name, value in settings.items() if name != "config"}}


def _read_parameters(path: Path, parameters: Any) -> dict[str, list[Any] | Range]:
    if not isinstance(parameters, dict):
        _refuse(path, "parameters is not a mapping", KEYS["parameters"], "write lines of name: [values] below it")
    result: dict[str, list[Any] | Range] = {}
    for name, values in parameters.items():
        if isinstance(values, dict):
            result[name] = _read_range(path, name, values)
        elif isinstance(values, list) and values:
            result[name] = values
        else:
            _refuse(path, f"{name} has no values to choose from: {values!r}", KEYS["parameters"], "list its values")
    return result


def _read_range(path: Path, name: str, values: Mapping[str, Any]) -> Range:
    low, high, step = values.get("low"), values.get("high"), values.get("step")
    log = _read_switch(path, f"log of {name}", values.get("log"))
    if (
        _is_number(low)
        and _is_number(high)
        and low < high
        and values.keys() <= RANGE_KEYS
        and not (log and (low <= 0 or step))
        and (step is None or (_is_number(step) and 0 < step <= high - low))
    ):
        return Range(low, high, log, step)
    _refuse(
        path,
        f"the range of {name} is {dict(values)}",
        "low below high, and optionally log (with low above 0) or step (above 0, within the range)",
        f"{name}: {{low: 1.0e-6, high: 1.0e-4, log: true}}",
    )


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _settle_range(path: Path, parser: FlagParser, name: str, values: Range) -> Range:
    """The range in the type of its flag: `low: 0, high: 1` stays whole for max_steps, but not for weight_decay."""
    try:
        parser.parse_mapping({name: values.low + 0.5}, name)
    except SettingsError:
        if values.step is not None and values.step != int(values.step):
            _refuse(path, f"{name} is a whole number, but its step is {values.step}", "a whole step", "step: 1")
        return values
    return replace(values, low=float(values.low), high=float(values.high))


def _check_search(path: Path, search: str, parameters: Mapping[str, Any], configurations: Any, trials: Any) -> None:
    if not isinstance(configurations, list) or not all(
        isinstance(configuration, dict) and configuration for configuration in configurations
    ):
        _refuse(path, "configurations is not a list of settings", KEYS["configurations"], "- {learning_rate: 1.0e-5}")
    if search == "listed" and not configurations:
        _refuse(path, "the space is empty: it lists no configuration", KEYS["configurations"], "list at least one")
    if search != "listed" and configurations:
        _refuse(path, f"configurations are listed, but search is {search}", "search: listed", "remove either")
    if search != "listed" and not parameters:
        _refuse(path, "the space is empty: no parameter varies", KEYS["parameters"], "name a parameter and its values")
    if search == "listed" and parameters:
        _refuse(path, "both configurations and parameters are set", "one of the two", "remove either")
    if trials is not None and search in ("grid", "listed"):
        _refuse(path, f"trials is {trials}, but search is {search}", "trials for random and tpe only", "remove trials")
    if search == "grid" and any(isinstance(values, Range) for values in parameters.values()):
        _refuse(path, "a range in a grid", "lists of values", "list the values, or set search to random or tpe")


def _can_share_reference(space: Space) -> bool:
    """Whether all trials can read the reference log-probabilities of the first one, and no setting says otherwise."""
    if split_kind(space.defaults)[0] != "dpo":
        return False
    named = {
        *space.settings,
        *space.defaults,
        *space.parameters,
        *(name for configuration in space.configurations for name in configuration),
    }
    placement = {} if space.config_file is None else read_yaml(str(space.config_file), "config_file")
    is_possible = placement.get("distributed_type", "NO") in ("NO", "MULTI_GPU")
    is_possible = is_possible and space.setting("disable_dropout", True) and space.trials * space.seeds > 1
    # With max_steps, the trials together may use fewer pairs than the data set has.
    return is_possible and not {PRECOMPUTE, "sync_ref_model", "dataset_streaming", "max_steps"} & named


def _check_flags(space: Space) -> None:
    """Checks every name and value with the recipe's parser. Raises: SettingsError."""
    kind, defaults = split_kind(space.defaults)
    parser = FlagParser(kind, prog=space.recipe.name)
    parser.parse_mapping(defaults, f"recipe {space.recipe.stem}")
    parser.parse_mapping(space.settings, f"{space.path}, settings")
    for configuration in space.configurations:
        parser.parse_mapping(configuration, f"{space.path}, a configuration")
    for name, values in space.parameters.items():
        choices = [values.low, values.high] if isinstance(values, Range) else values
        for value in choices:
            parser.parse_mapping({name: value}, f"{space.path}, parameters")
        if isinstance(values, Range):
            space.parameters[name] = _settle_range(space.path, parser, name, values)
    named = {
        *space.settings,
        *space.parameters,
        *(name for configuration in space.configurations for name in configuration),
    }
    values = [space.settings, space.configurations, *map(_describe, space.parameters.values())]
    secrets = [name for name in sorted(named) if name.endswith(SECRET_SETTING)]
    secrets += find_secrets(json.dumps(values, default=str))
    if secrets:
        _refuse(
            space.path,
            f"it holds a secret ({secrets[0]}), and a sweep writes its settings to files",
            "settings without secrets",
            "export HF_TOKEN or WANDB_API_KEY before dpokit sweep, or log in with `hf auth login`",
        )
    if named & SET_BY_SWEEP:
        _refuse(
            space.path,
            f"it sets {', '.join(sorted(named & SET_BY_SWEEP))}",
            "no setting that the sweep sets itself",
            "remove it",
        )
    conflict = named & {"seed"} if space.seeds > 1 and "seed" not in space.settings else set()
    if conflict:
        _refuse(space.path, "seed varies, and seeds is above 1", "one of the two", "remove either")
    strategy = space.setting("eval_strategy", "no")
    if strategy == "no" and space.metric.startswith("eval_"):
        _refuse(
            space.path, f"{space.metric} is never measured: eval_strategy is no", "evaluations", "set eval_strategy"
        )


def _cross(parameters: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*parameters.values()):
        yield dict(zip(parameters, values, strict=True))


def _describe(values: list[Any] | Range) -> Any:
    return vars(values) if isinstance(values, Range) else values
