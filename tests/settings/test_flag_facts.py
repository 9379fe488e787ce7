"""The table of facts about flags has a row for each setting, and no other row."""

from itertools import pairwise

import pytest

from dpokit.settings.flag_facts import FLAG_FACTS, Fact, flags_with, is_public
from dpokit.settings.flags import KINDS, FlagParser
from dpokit.settings.load import load_settings


@pytest.fixture
def recorded(tiny_gpt2, tmp_path) -> set[str]:
    """Every setting that run.json records, also those of TRL that no flag sets."""
    defaults = {"model_name_or_path": str(tiny_gpt2), "dataset_name": "rows.jsonl", "output_dir": str(tmp_path)}
    return {name for kind in KINDS for name in load_settings("test", {**defaults, "kind": kind}, []).values()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_has_a_row(kind):
    missing = [f"{name}: add its row to settings/flag_facts.py" for name in FlagParser(kind).names()]
    assert [line for line in missing if line.partition(":")[0] not in FLAG_FACTS] == []


def test_every_recorded_setting_has_a_row(recorded):
    missing = [f"{name}: add its row to settings/flag_facts.py" for name in sorted(recorded - FLAG_FACTS.keys())]
    assert missing == []


@pytest.mark.pinned("transformers")  # an older one has fewer settings
def test_every_row_is_a_setting(recorded):
    surplus = [f"{name}: delete its row in settings/flag_facts.py" for name in sorted(FLAG_FACTS.keys() - recorded)]
    assert surplus == []


def test_rows_are_in_alphabetical_order():
    assert [f"{later} belongs above {name}" for name, later in pairwise(FLAG_FACTS) if later < name] == []


@pytest.mark.parametrize("fact", [fact for fact in Fact if fact])
def test_every_fact_holds_for_a_setting(fact):
    assert flags_with(fact)


@pytest.mark.parametrize(("name", "public"), [("beta", True), ("hub_token", False), ("packing", False), ("new", False)])
def test_a_card_shows_only_public_settings(name, public):
    assert is_public(name) is public
