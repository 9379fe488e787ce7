"""Reads recipes and YAML files of settings. No torch."""

import re
import runpy
from pathlib import Path
from typing import Any

import yaml

from dpokit.errors import SettingsError
from dpokit.run_names import suggest

YAML_BOOL = "tag:yaml.org,2002:bool"


def find_recipe(recipe: str) -> Path:
    """The recipe's file. Raises: SettingsError if it does not exist; the message lists the recipes that do."""
    for path in (Path(recipe), Path("recipes") / f"{recipe}.py"):
        if path.is_file() and path.suffix == ".py":
            return path
    recipes = sorted(p.stem for p in Path("recipes").glob("*.py"))
    raise SettingsError(
        f"there is no recipe {recipe!r}",
        expected=f"a recipe's file, or the name of one ({', '.join(recipes) or 'no recipe in ./recipes'})",
        do=suggest(Path(recipe).stem, recipes)
        or "dpokit plan recipes/dpo_gpt2.py [--gpus 8x80] [flags]: the recipe comes first",
    )


def read_defaults(path: Path) -> dict[str, Any]:
    """A recipe's `DEFAULTS`; the code under its main guard does not run. Raises: SettingsError if it has none."""
    try:
        defaults = runpy.run_path(str(path)).get("DEFAULTS")
        trouble = "" if isinstance(defaults, dict) else "it has no DEFAULTS"
    except Exception as error:
        defaults, trouble = None, f"{type(error).__name__}: {error}"
    if not isinstance(defaults, dict):
        raise SettingsError(
            f"{path} is no recipe: {trouble}",
            expected="a script with a dict DEFAULTS",
            do="name one of recipes/, or write one like them",
        )
    return defaults


class _YamlLoader(yaml.SafeLoader):
    """Reads numbers and strings as YAML 1.2: `5e-5` is a float even without a dot, `eval_strategy: no` a string.

    Flags that are true or false still accept yes and no. A name that is set twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is set twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_YamlLoader.yaml_implicit_resolvers |= {
    letter: [(tag, pattern) for tag, pattern in _YamlLoader.yaml_implicit_resolvers[letter] if tag != YAML_BOOL]
    for letter in "yYnN"
}


def parse_yaml(text: str) -> Any:
    """A YAML text's value. Raises: yaml.YAMLError."""
    return yaml.load(text, _YamlLoader)


def read_yaml(path: str, flag: str) -> dict[str, Any]:
    """A YAML file's mapping. Raises: SettingsError if the file cannot be read or holds no mapping."""
    try:
        values = parse_yaml(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"{flag} {path}: {error}", expected="a YAML file of settings", do="correct the path or the file"
        ) from error
    if not isinstance(values, dict):
        raise SettingsError(f"{flag} {path} holds no settings", expected="lines of name: value", do="fill the file")
    return values
