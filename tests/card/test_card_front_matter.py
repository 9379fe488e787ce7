"""The Hub's rules for a card's front matter, without the Hub."""

import json

import pytest
import yaml
from card_pages import card_of
from huggingface_hub import ModelCard
from run_folders import make_run

from dpokit.card.front_matter import (
    LANGUAGES,
    LICENCES,
    check_front_matter,
    check_languages,
    check_licence,
    is_hub_id,
    is_on_disk,
)
from dpokit.errors import SettingsError

RESULT = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "me/pairs", "name": "pairs"},
    "metrics": [{"type": "accuracy", "value": 0.7}],
}
GOOD = {"license": "mit", "base_model": "gpt2", "base_model_relation": "finetune", "tags": ["dpo"], "datasets": ["a/b"]}


def write(**changes: object) -> str:
    data = {name: value for name, value in (GOOD | changes).items() if value is not None}
    return f"---\n{yaml.safe_dump(data)}---\n\n# Card\n"


def test_a_sound_front_matter_is_returned():
    data = check_front_matter(
        write(language=["en", "gsw", "multilingual"], **{"model-index": [{"name": "m", "results": [RESULT]}]})
    )
    assert data["base_model"] == "gpt2"
    assert data["model-index"][0]["results"] == [RESULT]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"license": None}, "no licence was named"),
        ({"license": "license"}, "none that the Hub knows"),
        ({"license": ["mit"]}, "license is \\['mit'\\], not a text"),
        ({"license": "other"}, "says nothing by itself"),
        ({"base_model": "/data/models/base"}, "no name of a repository"),
        ({"base_model": "runs/old/model"}, "no name of a repository"),
        ({"base_model": ["gpt2", "a--b"]}, "no name of a repository"),
        ({"base_model": 5}, "neither a text nor a list"),
        ({"base_model": None}, "beside a base_model"),
        ({"base_model_relation": "child"}, "base_model_relation is child"),
        ({"datasets": ["pairs.jsonl"]}, "no name of a repository"),
        ({"datasets": "a/b"}, "not a list of texts"),
        ({"datasets": []}, "not a list of texts"),
        ({"tags": "dpo"}, "not a list of texts"),
        ({"tags": ["dpo", 5]}, "not a list of texts"),
        ({"tags": ["/home/me"]}, "a path of one machine"),
        ({"extra": {"deep": ["~/models"]}}, "a path of one machine"),
        ({"extra": "file:///x"}, "a path of one machine"),
        ({"language": ["english"]}, "no code of a language"),
        ({"language": ["EN"]}, "no code of a language"),
        ({"language": ["xx"]}, "no code of a language"),
        ({"language": [False]}, "not a list of texts"),  # what YAML makes of Norwegian
        ({"model-index": []}, "model-index cannot be read"),
        ({"model-index": "none"}, "model-index cannot be read"),
        ({"model-index": [{"name": "m"}]}, "model-index cannot be read"),
        ({"model-index": [{"name": "m", "results": [RESULT | {"task": {}}]}]}, "model-index cannot be read"),
        ({"model-index": [{"name": "m", "results": [RESULT | {"dataset": {"type": "", "name": "x"}}]}]}, "accuracy"),
        (
            {"model-index": [{"name": "m", "results": [RESULT | {"metrics": [{"type": "f", "value": "a"}]}]}]},
            "'a' of 'f'",
        ),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before(changes, says):
    with pytest.raises(SettingsError, match=says):
        check_front_matter(write(**changes))


@pytest.mark.parametrize(
    "text", ["# Card\n", "---\nlicense: mit\n", "---\n- a\n---\n", "---\na: [\n---\n", "\n---\na: b\n---\n"]
)
def test_a_card_without_a_block_of_yaml_is_refused(text):
    with pytest.raises(SettingsError, match="front matter is not what the Hub expects"):
        check_front_matter(text)


@pytest.mark.parametrize(
    ("licence", "near"),
    [
        ("apache2.0", "apache-2.0"),
        ("MIT", "mit"),
        ("llama-3.1", "llama3.1"),
        ("CC BY 4.0", "cc-by-4.0"),
        ("gpl3", "gpl-3.0"),
    ],
)
def test_a_licence_that_is_nearly_right_is_answered_with_the_right_one(licence, near):
    with pytest.raises(SettingsError, match="none that the Hub knows") as error:
        check_licence(licence)
    assert near in error.value.expected


def test_no_licence_and_unknown_are_no_licences():
    for licence in ("", "unknown"):
        with pytest.raises(SettingsError, match="licence"):
            check_licence(licence)
    assert "other" in LICENCES


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "mine"}, "says nothing by itself"),
        ({"link": "LICENSE"}, "says nothing by itself"),
        ({"name": "My Licence", "link": "LICENSE"}, "--license-name My Licence"),
        ({"name": "mine", "link": "/home/me/LICENSE"}, "is no link"),
        ({"name": "mine", "link": "javascript:alert(1)"}, "is no link"),
    ],
)
def test_other_needs_a_name_and_a_link(given, says):
    with pytest.raises(SettingsError, match=says):
        check_licence("other", **given)


def test_a_name_is_for_other_alone():
    check_licence("other", name="mine-1.0", link="https://example.org/mine")
    check_licence("other", name="mine-1.0", link="LICENSE.md")
    with pytest.raises(SettingsError, match="has a name and a text already"):
        check_licence("mit", name="mine", link="LICENSE")


def test_languages_are_those_of_iso_639():
    assert len(LANGUAGES) == 184
    check_languages(["en", "de", "zh", "no", "gsw", "code"])


@pytest.mark.parametrize(
    ("name", "sound"),
    [
        ("gpt2", True), ("openai-community/gpt2", True), ("a/b/c", False), ("/a/b", False), ("./a", False),
        ("~/a", False),
        ("a--b", False), ("a/b.git", False), ("pairs.jsonl", False), ("data/pairs.parquet", False), ("a b", False),
        ("a\n---\nb", False), ("x" * 97, False), ("", False), (None, False),
    ],
)  # fmt: skip
def test_names_on_the_hub_are_known_by_its_rules(name, sound):
    assert is_hub_id(name) == sound


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("gpt2", False),
        ("org/base-1.5", False),
        ("org/base", True),
        ("/data/base", True),
        ("./base", True),
        ("~/base", True),
        ("a/b/c", True),
    ],
)
def test_a_folder_is_told_from_a_hub_id(name, local, tmp_path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_on_disk(name) is local


@pytest.mark.parametrize(
    "name", ["plain", "with space & <b>", "---", "a: b # c", "'quoted\"", "\u202etfel", "%s {{ x }}"]
)
def test_whatever_the_folder_is_called_the_front_matter_is_sound(name, tmp_path):
    text = card_of(make_run(tmp_path / name, []), language=["no", "en"])
    data = check_front_matter(text)
    assert data["language"] == ["no", "en"]
    loaded = ModelCard(text)  # as huggingface_hub reads it
    assert loaded.data.to_dict()["license"] == "mit"
    assert loaded.text.strip().startswith("# ")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"license": ""}, "no licence was named"),
        ({"license": "my-own"}, "none that the Hub knows"),
        ({"language": ["english"]}, "--language english"),
        ({"repo_id": "me/my/model"}, "--repo-id me/my/model"),
        ({"base_model": "/models/base"}, "--base-model /models/base"),
    ],
)
def test_what_the_publisher_says_is_checked_before_anything_is_written(given, says, tmp_path):
    folder = make_run(tmp_path / "run", [])
    before = sorted(folder.iterdir())
    with pytest.raises(SettingsError, match=says):
        card_of(folder, **given)
    assert sorted(folder.iterdir()) == before


def test_numbers_that_are_not_finite_are_no_results(tmp_path):
    folder = make_run(tmp_path / "run", [])
    (folder / "eval").mkdir()
    pairs = {
        "format": 1,
        "data": {"name": "me/pairs, split test", "pairs": 3},
        "base": {},
        "tuned": {"margin": {"value": None}},
    }
    (folder / "eval" / "pairs.json").write_text(json.dumps(pairs))
    assert "model-index" not in check_front_matter(card_of(folder))
