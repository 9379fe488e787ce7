"""The ranges of pyproject.toml agree with the tested versions: constraints.txt and constraints-oldest.txt."""

import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OF_USERS = [*PROJECT["dependencies"], *(text for extra in EXTRAS if extra != "dev" for text in EXTRAS[extra])]
OF_DEVELOPERS = [text for text in EXTRAS["dev"] if not text.startswith("dpokit")]


def read_pins(name: str) -> dict[str, str]:
    """The versions in a file of constraints, by the packages' names as the file spells them."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


PINNED, OLDEST = read_pins("constraints.txt"), read_pins("constraints-oldest.txt")


@pytest.mark.parametrize("text", [text for text in OF_USERS if ">=" in text])
def test_a_range_begins_with_the_oldest_tested_version(text):
    requirement = Requirement(text)
    (lowest,) = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    tested = {canonicalize_name(name): version for name, version in (PINNED | OLDEST).items()}
    assert Version(lowest) == Version(tested[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("text", [*OF_USERS, *OF_DEVELOPERS])
def test_a_pinned_version_is_in_its_range(text):
    requirement = Requirement(text)
    tested = {canonicalize_name(name): version for name, version in PINNED.items()}
    assert tested[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("name", OLDEST)
def test_an_oldest_version_is_older_than_the_pinned_one(name):
    assert Version(OLDEST[name]) < Version(PINNED[name])  # launch/setup.sh compares the names letter by letter
