"""The import rules: only from lower floors, not within a floor, and no heavy library in light modules.

A floor is a set of packages and top-level modules of dpokit; docs/architecture.md lists them.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SRC = ROOT / "src" / "dpokit"
FLOORS = [
    {"cli"},
    {"verbs", "api"},
    {"sweep"},
    {"quickstart", "plan"},
    {"story"},
    {"run"},
    {"after_training"},
    {"train", "evaluate", "merge", "push", "serve", "cluster", "run_state", "data_check"},
    {"card"},
    {"report"},  # below the model card, which shows its tables and verdict
    {"checkpoint", "model", "data", "figures"},
    {
        "settings",
        "rundir",
        "run_starts",
        "reachable_hub",
        "run_names",
        "distributed",
        "errors",
        "console",
        "metrics",
        "untrained_loss",
        "torch_build_locks",
    }
    | {"apikey", "bounded_http", "credentials", "interpreter", "interrupts", "terminal", "safe_console", "upstream"}
    | {"file_hashes", "starter", "atomic_files", "caches", "intervals", "environment", "start_run", "launcher"},
]
LIGHT = ("report", "card", "cluster", "figures", "data.layouts", "data.transcripts", "quickstart.grammar", "rundir")
LIGHT += ("errors", "atomic_files", "caches", "intervals", "untrained_loss", "apikey", "credentials", "terminal")
LIGHT += ("checkpoint.store", "cli", "starter")
HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"}
TRL_INSIDE = {"train/dpo_trainer.py", "train/scoring.py", "train/sft_trainer.py"}
TRL_INSIDE |= {"model/shared_prefix.py", "model/score.py", "plan/trace.py"}
GROUND = sorted(FLOORS[-1])
MODULES = sorted(SRC.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it; a name imported from a package may be a module.

    Imports for type checkers alone are left out.
    """
    modules = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(str(node.module))
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name for name in names if is_dpokit(name) or name == "trl.trainer"}
    return modules


def is_dpokit(name: str) -> bool:
    return name.split(".")[0] == "dpokit" and module_path(name).is_file()


def floor_of(package: str) -> int:
    return next(level for level, packages in enumerate(FLOORS) if package in packages)


def module_path(name: str) -> Path:
    path = SRC.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"


def files_of(package: str) -> list[Path]:
    """The modules of a package or of a top-level module."""
    files = [SRC / f"{package.replace('.', '/')}.py", *(SRC / package).glob("*.py")]
    return [path for path in files if path.exists()]


def test_imports_go_downwards():
    for path in MODULES:
        package = path.relative_to(SRC).parts[0].removesuffix(".py")
        if package == "__init__":
            assert imports(path) <= {"importlib", "logging", "os", "sys", "typing"}
            continue
        others = {name.split(".")[1] for name in imports(path) if name.startswith("dpokit.")} - {package}
        if floor_of(package) < len(FLOORS) - 1:
            upwards = {other for other in others if floor_of(other) <= floor_of(package)}
            assert not upwards, f"{path.relative_to(SRC)} imports {upwards}"


@pytest.mark.parametrize("package", [name for name in LIGHT if name != "cli"])  # a verb's imports are in its function
def test_light_packages_import_nothing_heavy(package):
    checked, to_read = set(), files_of(package)
    while to_read:
        path = to_read.pop()
        if path in checked:
            continue
        checked.add(path)
        names = imports(path)
        assert not {name.split(".")[0] for name in names} & HEAVY, path
        modules = [name for name in names if is_dpokit(name)]
        # Importing a module runs its packages' __init__ first.
        modules += [name.rpartition(".")[0] for name in modules]
        to_read += [module_path(name) for name in modules]


def test_inner_names_stay_where_they_are_explained():
    for path in [*MODULES, *(ROOT / "recipes").glob("*.py")]:
        names = imports(path)
        assert not any(name.split(".")[0] == "deepspeed" for name in names), path
        if str(path.relative_to(ROOT)) not in {f"src/dpokit/{name}" for name in TRL_INSIDE}:
            assert not any(name.startswith("trl.") for name in names), path


def test_an_import_is_seen_however_it_is_written(tmp_path):
    file = tmp_path / "module.py"
    written = {
        "import dpokit.data.sources": "dpokit.data.sources",
        "from dpokit.data.sources import load_splits": "dpokit.data.sources",
        "from dpokit.data import sources as rows": "dpokit.data.sources",
        "from dpokit import rundir": "dpokit.rundir",
        "def late():\n    from dpokit import data": "dpokit.data",
        "from trl import trainer": "trl.trainer",
        "from trl.trainer.utils import pad": "trl.trainer.utils",
    }
    for text, name in written.items():
        file.write_text(text)
        assert name in imports(file), text


def test_every_module_has_its_floor():
    packages = {path.relative_to(SRC).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert packages <= set().union(*FLOORS)


@pytest.mark.parametrize("path", [*(ROOT / "recipes").glob("*.py")], ids=lambda path: path.name)
def test_a_recipe_imports_no_other_recipe_and_no_heavy_library(path):
    recipes = {other.stem for other in (ROOT / "recipes").glob("*.py")}
    first = {name.split(".")[0] for name in imports(path)}
    assert not first & (recipes | {"recipes"} | HEAVY)


def test_modules_of_the_ground_floor_import_in_no_circle():
    """Checked for single modules, because packages of the ground floor import each other."""
    paths = [path for name in GROUND for path in files_of(name)]
    names = {".".join(path.relative_to(SRC.parent).with_suffix("").parts): path for path in paths}
    needs = {name: imports(path) & names.keys() for name, path in names.items()}
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert needs == {}


@pytest.mark.cold
def test_light_packages_load_nothing_heavy_when_imported():
    """The same as the test on the source, in a real interpreter."""
    files = [path for package in LIGHT for path in files_of(package)]
    names = [".".join(path.relative_to(SRC.parent).with_suffix("").parts) for path in files]
    code = f"import sys, {', '.join(names)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(SRC.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
