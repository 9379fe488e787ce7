"""Who may import whom: downwards only, rooms on one floor do not know each other, light rooms stay light."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

SRC = ROOT / "src" / "dpokit"
FLOORS = [
    {"cli", "quickstart"},
    {"story", "sweep"},
    {"train", "evaluate", "release", "report", "serve", "cluster"},
    {"checkpoint", "model", "data", "figures"},
    {"settings", "rundir", "world", "errors", "screen"},
]
LIGHT = ("report", "cluster", "figures", "data.formats", "data.toy", "rundir", "errors", "cli")
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"}
TRL_INSIDE = {"train/trainer.py", "model/shared_prefix.py", "model/score.py"}
MODULES = sorted(SRC.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


def floor_of(room: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def module_path(name: str) -> Path:
    path = SRC.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_downwards(path):
    room = path.relative_to(SRC).parts[0].removesuffix(".py")
    if room == "__init__":
        assert imports(path) == set()
        return
    for name in imports(path):
        if name.startswith("dpokit."):
            other = name.split(".")[1]
            below = floor_of(other) > floor_of(room) or floor_of(room) == len(FLOORS) - 1
            assert other == room or below, f"{room} imports {other}"


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_import_nothing_heavy(room):
    seen, to_read = set(), [SRC / f"{room.replace('.', '/')}.py", *(SRC / room).glob("*.py")]
    to_read = [path for path in to_read if path.exists()]
    while to_read:
        path = to_read.pop()
        if path in seen:
            continue
        seen.add(path)
        names = imports(path)
        assert not {name.split(".")[0] for name in names} & HEAVY, path
        to_read += [module_path(name) for name in names if name.startswith("dpokit.")]


@pytest.mark.parametrize("path", [*MODULES, *(ROOT / "recipes").glob("*.py")], ids=lambda path: path.name)
def test_inner_names_stay_where_they_are_explained(path):
    names = imports(path)
    assert not any(name.split(".")[0] == "deepspeed" for name in names)
    if str(path.relative_to(ROOT)) not in {f"src/dpokit/{name}" for name in TRL_INSIDE}:
        assert not any(name.startswith("trl.") for name in names)
