"""Recipes and YAML files of settings, read. No torch."""

import re
import runpy
from pathlib import Path
from typing import Any

import yaml

from dpokit.errors import SettingsError

YAML_BOOL = "tag:yaml.org,2002:bool"


def find_recipe(recipe: str) -> Path:
    """The recipe's file. Raises: SettingsError where there is none, naming those there are."""
    for path in (Path(recipe), Path("recipes") / f"{recipe}.py"):
        if path.is_file() and path.suffix == ".py":
            return path
    there = ", ".join(sorted(p.stem for p in Path("recipes").glob("*.py"))) or "no recipe in ./recipes"
    raise SettingsError(
        f"there is no recipe {recipe!r}",
        expected=f"a recipe's file, or the name of one ({there})",
        do="dpokit plan recipes/dpo_gpt2.py [--gpus 8x80] [flags]: the recipe comes first",
    )


def read_defaults(path: Path) -> dict[str, Any]:
    """A recipe's `DEFAULTS`; its main guard does not run. Raises: SettingsError where it has none."""
    try:
        found = runpy.run_path(str(path)).get("DEFAULTS")
        trouble = "" if isinstance(found, dict) else "it has no DEFAULTS"
    except Exception as error:
        found, trouble = None, f"{type(error).__name__}: {error}"
    if not isinstance(found, dict):
        raise SettingsError(
            f"{path} is no recipe: {trouble}",
            expected="a script with a dict DEFAULTS",
            do="name one of recipes/, or write one like them",
        )
    return found


class _YamlLoader(yaml.SafeLoader):
    """Numbers and words of YAML 1.2: 5e-5 is a float without a dot, too, and `eval_strategy: no` a word.

    Flags that are true or false take yes and no all the same. A name that stands twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is set twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_YamlLoader.yaml_implicit_resolvers |= {
    letter: [(tag, words) for tag, words in _YamlLoader.yaml_implicit_resolvers[letter] if tag != YAML_BOOL]
    for letter in "yYnN"
}


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
