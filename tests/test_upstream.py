"""Every internal name of another library that the source uses is listed in `dpokit.upstream` and still exists."""

import ast
import importlib.util
import inspect
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from private_names import KINDS, Tree, Use, find_object

from dpokit.upstream import UPSTREAM_NAMES, UpstreamName

SOURCE = ROOT / "src" / "dpokit"
TABLE = "upstream.py"


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return find_uses(SOURCE)


def find_uses(root: Path) -> list[Use]:
    return [use for use in Tree(root).find_uses() if use.file != TABLE]


# -- checks: each function returns one line for each problem -------------------------------------------------------


def check_names(rows: tuple[UpstreamName, ...]) -> list[str]:
    """Names that their library lacks, or that another file of it defines."""
    lines = []
    for row in rows:
        if not is_there(row.name):
            lines.append(f"{row.name} is gone; {' and '.join(row.used_in)} used it: {row.why}")
        elif not re.search(rf"\b{row.name.rpartition('.')[2]}\b", read_library_file(row.upstream)):
            lines.append(f"{row.name} is not in {row.upstream}; correct the row's `upstream`")
    return lines


def check_uses(uses: list[Use], rows: tuple[UpstreamName, ...]) -> list[str]:
    """Uses without a row, or of a kind that depends on more internals than the kind in the row."""
    lines = []
    for use in uses:
        listed = [row for row in rows if is_use_of(use, row)]
        if not listed:
            lines.append(f"{use.file}:{use.line}: {use.name} ({use.kind}) has no row in src/dpokit/{TABLE}")
        lines += [
            f"{use.file}:{use.line}: {row.name} is of kind {use.kind}, and its row says {row.kind}"
            for row in listed
            if KINDS.index(use.kind) > KINDS.index(row.kind)
        ]
    return lines


def check_rows(uses: list[Use], rows: tuple[UpstreamName, ...], root: Path) -> list[str]:
    """Rows with a file that does not use the name."""
    lines = []
    for row in rows:
        last = row.name.rpartition(".")[2]
        for file in row.used_in:
            is_found = any(use.file == file and is_use_of(use, row) for use in uses)
            path = root / file
            is_public = not last.startswith("_") and path.is_file()
            if not is_found and not (is_public and re.search(rf"\b{last}\b", path.read_text())):
                lines.append(f"{row.name} is not used in {file}; remove the file from the row, or the row")
    return lines


def check_overrides(uses: list[Use]) -> list[str]:
    """Overrides that do not accept the arguments of the overridden method."""
    return [
        f"{use.file}:{use.line}: {use.name} {trouble} of {name_function(upstream)}"
        for use in uses
        if use.method is not None
        for upstream in use.upstream
        for trouble in compare_parameters(use.method.args, inspect.signature(upstream))
    ]


def check_calls(uses: list[Use]) -> list[str]:
    """Calls of a library's methods with arguments that the methods do not accept."""
    lines = []
    for use in uses:
        if use.call is None:
            continue
        positional = [None for argument in use.call.args if not isinstance(argument, ast.Starred)]
        named = {keyword.arg: None for keyword in use.call.keywords if keyword.arg is not None}
        is_whole = len(positional) == len(use.call.args) and len(named) == len(use.call.keywords)
        for upstream in use.upstream:
            signature = inspect.signature(upstream)
            try:
                (signature.bind if is_whole else signature.bind_partial)(None, *positional, **named)
            except TypeError as error:
                lines.append(f"{use.file}:{use.line}: the call does not fit {name_function(upstream)}: {error}")
    return lines


# -- helpers ------------------------------------------------------------------------------------------------------


def is_there(name: str) -> bool:
    """Whether a dotted name exists: in a module or class, on instances of a class, as an argument or a key."""
    owner_name, _, last = name.rpartition(".")
    try:
        find_object(name)
        return True
    except AttributeError:
        pass
    except ModuleNotFoundError:
        return False
    try:
        owner = find_object(owner_name)
    except AttributeError:
        return False
    if isinstance(owner, type):
        is_set = rf'\.{last}\b\s*(:[^=\n]+)?=(?!=)|["\']{last}["\']'
        return any(re.search(is_set, read_code(cls)) for cls in inspect.getmro(owner))
    return re.search(rf"\b{last}\b", read_code(owner)) is not None


@cache
def read_code(thing: Any) -> str:
    """The code of a class or function; empty if it is not written in Python."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def read_library_file(file: str) -> str:
    """The text of a library's file, by its path in the folder of installed packages; empty if it does not exist."""
    spec = importlib.util.find_spec(file.split("/")[0].removesuffix(".py"))
    origin = Path(str(spec.origin)) if spec is not None else Path()
    path = (origin.parent.parent if origin.name == "__init__.py" else origin.parent) / file
    return path.read_text() if path.is_file() else ""


def is_use_of(use: Use, row: UpstreamName) -> bool:
    name = f".{row.name}."
    return use.file in row.used_in and (name.endswith(f".{use.name}.") or name.startswith(f".{use.name}."))


def name_function(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def compare_parameters(override: ast.arguments, overridden: inspect.Signature) -> list[str]:
    """Why an override does not accept the arguments of the method that it overrides; empty if it does."""
    places = [argument.arg for argument in [*override.posonlyargs, *override.args]]
    named = {argument.arg for argument in override.kwonlyargs}
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [parameter for parameter in overridden.parameters.values() if parameter.kind not in several]
    troubles = []
    for place, parameter in enumerate(parameters):
        fits = place < len(places) and places[place] == parameter.name
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            fits = parameter.name in {*places, *named}
        if not (fits or parameter.name in named or override.kwarg or (override.vararg and place >= len(places))):
            troubles.append(f"does not accept the parameter {parameter.name}")
    required = places[: len(places) - len(override.defaults)]
    keywords = zip(override.kwonlyargs, override.kw_defaults, strict=True)
    required += [argument.arg for argument, default in keywords if default is None]
    unknown = set(required) - set(overridden.parameters)
    return troubles + [f"requires the unknown parameter {name}" for name in sorted(unknown)]


def fail_with(lines: list[str]) -> None:
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


# -- the table and the source -------------------------------------------------------------------------------------


def test_every_listed_name_is_in_its_library():
    fail_with(check_names(UPSTREAM_NAMES))


def test_every_private_name_in_the_source_is_listed(uses):
    fail_with(check_uses(uses, UPSTREAM_NAMES))


def test_every_file_of_a_row_uses_its_name(uses):
    fail_with(check_rows(uses, UPSTREAM_NAMES, SOURCE))


def test_every_override_accepts_the_librarys_arguments(uses):
    fail_with(check_overrides(uses))


def test_every_call_passes_what_the_method_takes(uses):
    fail_with(check_calls(uses))


def test_the_table_is_sorted_and_has_each_name_once():
    names = [row.name for row in UPSTREAM_NAMES]
    assert names == sorted(set(names))
    for row in UPSTREAM_NAMES:
        assert row.used_in == tuple(sorted(set(row.used_in))), row.name
        assert row.why.endswith("."), row.name
        assert row.delete_when.endswith("."), row.name


# -- tests of the checks themselves ---------------------------------------------------------------------------------

FIRST = UPSTREAM_NAMES[0]


@pytest.mark.parametrize("gone", ["trl.DPOTrainer._gone", "transformers.Trainer._gone_loss", "trl.trainer.gone._name"])
def test_a_listed_name_that_is_gone_is_one_line(gone):
    row = replace(FIRST, name=gone, used_in=("train/steps.py",), why="It weighs the loss.")
    assert check_names((FIRST, row)) == [f"{gone} is gone; train/steps.py used it: It weighs the loss."]


def test_a_name_in_another_file_of_its_library_is_one_line():
    (line,) = check_names((replace(FIRST, upstream="accelerate/__init__.py"),))
    assert line.startswith(f"{FIRST.name} is not in accelerate/__init__.py")


def test_a_row_whose_name_no_file_uses_is_one_line(uses):
    row = replace(FIRST, name="transformers.Trainer._save_scaler", used_in=("train/saving.py", "train/steps.py"))
    (line,) = check_rows(uses, (row,), SOURCE)
    assert line.startswith("transformers.Trainer._save_scaler is not used in train/steps.py")


MADE_UP = '''
import torch
from peft.utils.other import _get_submodules
from transformers import Trainer, TrainerCallback
from trl.trainer.utils import pad


class Base(Trainer):
    def _save_checkpoint(self, model):
        return super()._save_scaler()

    def log(self, logs, start_time=None):
        """Documented as a hook."""

    def _own(self):
        self._mine = self._tr_loss
        return self._own()


class Callback(TrainerCallback):
    def on_log(self, *arguments, **named):
        pass


def patch(model):
    torch._C = None
    Trainer.training_step = None
    return getattr(model, "_modules"), model.names._inner, model.name.endswith("_end")
'''


@pytest.fixture(scope="module")
def made_up_uses(tmp_path_factory) -> list[Use]:
    root = tmp_path_factory.mktemp("source") / "made_up"
    root.mkdir()
    (root / "module.py").write_text(MADE_UP)
    return find_uses(root)


def test_each_unlisted_name_is_one_line(made_up_uses):
    lines = check_uses(made_up_uses, UPSTREAM_NAMES)
    uses = [line.removesuffix(" has no row in src/dpokit/upstream.py").partition(": ")[2] for line in lines]
    assert uses == [
        "peft.utils.other._get_submodules (call)",
        "trl.trainer.utils.pad (call)",
        "_save_checkpoint (override)",
        "_save_scaler (call)",
        "_tr_loss (read)",
        "_C (set)",
        "training_step (set)",
        "_inner (read)",
        "_modules (read)",
    ]


def test_a_use_of_a_stronger_kind_than_its_row_is_one_line(made_up_uses):
    row = replace(FIRST, name="transformers.Trainer._save_checkpoint", used_in=("module.py",), kind="call")
    (line,) = check_uses([use for use in made_up_uses if use.name == "_save_checkpoint"], (row,))
    assert line.endswith("_save_checkpoint is of kind override, and its row says call")


def test_an_override_that_lacks_a_parameter_is_one_line(made_up_uses):
    (line,) = check_overrides(made_up_uses)
    assert "_save_checkpoint does not accept the parameter trial of transformers.trainer.Trainer." in line


def test_a_call_without_a_needed_argument_is_one_line(made_up_uses):
    (line,) = check_calls(made_up_uses)
    assert "does not fit transformers.trainer.Trainer._save_scaler: missing a required argument" in line
