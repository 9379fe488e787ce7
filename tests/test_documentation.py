"""README and docs/: links, paths, commands, tables and numbers agree with the repository."""

import dataclasses
import json
import re
import shlex
import tomllib

import pytest
import typer
from conftest import ROOT
from documentation import PAGES, README, list_anchors, list_commands, read_section, remove_code
from test_imports import FLOORS, MODULES, SRC
from trl import ScriptArguments

from dpokit.data.layouts import match_layout
from dpokit.settings.flags import DataArguments
from dpokit.verbs.app import app

DOCS = ROOT / "docs"
OTHER_PROGRAMS = {"accelerate", "dpokit", "sbatch", "bash", "vllm", "transformers"}  # other tests check the first four


def test_the_readme_has_at_most_200_lines():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", remove_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT), target
        assert path.exists(), target
        assert not anchor or anchor in list_anchors(path), target


def test_the_readme_links_every_page():
    linked = set(re.findall(r"\]\(docs/(\w[\w.-]*)", README.read_text()))
    assert {page.name for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_a_page_exists(page):
    folders = "src|tests|docs|recipes|launch|accelerate_configs"
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_table_of_changes_has_15_rows_with_files_and_tests():
    rows = [line.split("|") for line in read_section(DOCS / "CONTRIBUTING.md", "To change X, open Y").splitlines()[3:]]
    assert len(rows) >= 15
    for row in rows:
        assert re.search(r"`(src|recipes|tests)/", row[2]), row  # the test above checks that each path exists
        assert "`tests/" in row[3], row


@pytest.mark.parametrize("command", list_commands())
def test_a_command_starts_a_known_program(command):
    argv = shlex.split(command, comments=True)
    if argv[0] == "pip" and "-c" in argv:
        assert (ROOT / argv[argv.index("-c") + 1]).is_file()
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(filter(None, argv[-1].removeprefix(".").strip("[]").split(","))) <= extras.keys()
    elif argv[0] == "pip":
        assert argv[1:] == ["install", "transformers[serving]"]
    elif argv[0] == "python":
        assert (ROOT / argv[1]).is_file()
    elif argv[0] == ".":
        assert argv[1:] == [".venv/bin/activate"]
    elif argv[0] == "python3":
        assert argv[1:3] == ["-m", "venv"]
    elif argv[0] == "accelerate" and "-m" in argv:
        module, verb = argv[argv.index("-m") + 1 :][:2]
        assert module == "dpokit.cli"
        assert verb in typer.main.get_command(app).commands
    else:
        assert argv[0] in OTHER_PROGRAMS


def test_the_rows_of_the_readme_are_pairs_of_one_layout():
    text = re.search(r"```json\n(.*?)```", README.read_text(), re.S)
    assert text is not None
    rows = [json.loads(line) for line in text[1].splitlines()]
    layout = match_layout(rows, "README.md")
    assert layout.name == "explicit, conversational"
    assert len([layout.to_pair(row) for row in rows]) == 3


def test_the_numbers_of_the_readme_are_those_of_the_benchmarks():
    table = [line for line in read_section(README, "Measured against TRL").splitlines() if line.startswith("| ")]
    number = r"(?<![\w.-])\d[\d,]*(?:\.\d+)?"
    published = set(re.findall(number, (DOCS / "benchmarks.md").read_text()))
    assert set(re.findall(number, "\n".join(table))) <= published


def test_every_flag_of_dpokit_is_in_the_settings():
    section = read_section(DOCS / "settings.md", "Flags of dpokit")
    inherited = {field.name for field in dataclasses.fields(ScriptArguments)}
    added = [field.name for field in dataclasses.fields(DataArguments) if field.name not in inherited]
    missing = [f"{name}: add it to docs/settings.md, Flags of dpokit" for name in added if f"`--{name}" not in section]
    assert missing == []


def test_the_floors_are_those_of_the_import_rule():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", read_section(DOCS / "architecture.md", "Floors"), re.M)
    assert [int(number) for number, _ in rows] == list(range(len(FLOORS), 0, -1))
    assert [set(names.split(", ")) for _, names in rows] == FLOORS


def test_the_tree_names_every_module():
    tree = set(re.findall(r"\w+", read_section(DOCS / "architecture.md", "Files")))
    missing = [path.relative_to(SRC) for path in MODULES if path.stem != "__init__" and path.stem not in tree]
    assert [f"{path}: add it to docs/architecture.md, Files" for path in missing] == []
