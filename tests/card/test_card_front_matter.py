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


def test_a_valid_front_matter_is_returned():
    data = check_front_matter(
        write(language=["en", "gsw", "multilingual"], **{"model-index": [{"name": "m", "results": [RESULT]}]})
    )
    assert data["base_model"] == "gpt2"
    assert data["model-index"][0]["results"] == [RESULT]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"license": None}, "no licence is set"),
        ({"license": "license"}, "the Hub does not know --license license"),
        ({"license": ["mit"]}, "license is \\['mit'\\], not a text"),
        ({"license": "other"}, "needs a name and a link"),
        ({"base_model": "/data/models/base"}, "not a valid repository name"),
        ({"base_model": "runs/old/model"}, "not a valid repository name"),
        ({"base_model": ["gpt2", "a--b"]}, "not a valid repository name"),
        ({"base_model": 5}, "neither a text nor a list"),
        ({"base_model": None}, "needs a base_model"),
        ({"base_model_relation": "child"}, "base_model_relation is child"),
        ({"datasets": ["pairs.jsonl"]}, "not a valid repository name"),
        ({"datasets": "a/b"}, "not a list of texts"),
        ({"datasets": []}, "not a list of texts"),
        ({"tags": "dpo"}, "not a list of texts"),
        ({"tags": ["dpo", 5]}, "not a list of texts"),
        ({"tags": ["/home/me"]}, "a local path"),
        ({"extra": {"deep": ["~/models"]}}, "a local path"),
        ({"extra": "file:///x"}, "a local path"),
        ({"language": ["english"]}, "not a language code"),
        ({"language": ["EN"]}, "not a language code"),
        ({"language": ["xx"]}, "not a language code"),
        ({"language": [False]}, "not a list of texts"),  # YAML reads `no`, Norwegian, as false
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
def test_a_front_matter_that_the_hub_refuses_is_refused(changes, says):
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
def test_a_misspelt_licence_gets_the_right_one_suggested(licence, near):
    with pytest.raises(SettingsError, match="the Hub does not know --license") as error:
        check_licence(licence)
    assert near in error.value.expected


def test_an_empty_or_unknown_licence_is_refused():
    for licence in ("", "unknown"):
        with pytest.raises(SettingsError, match="licence"):
            check_licence(licence)
    assert "other" in LICENCES


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "mine"}, "needs a name and a link"),
        ({"link": "LICENSE"}, "needs a name and a link"),
        ({"name": "My Licence", "link": "LICENSE"}, "--license-name My Licence"),
        ({"name": "mine", "link": "/home/me/LICENSE"}, "is not a link"),
        ({"name": "mine", "link": "javascript:alert(1)"}, "is not a link"),
    ],
)
def test_other_needs_a_name_and_a_link(arguments, says):
    with pytest.raises(SettingsError, match=says):
        check_licence("other", **arguments)


def test_name_and_link_are_only_for_other():
    check_licence("other", name="mine-1.0", link="https://example.org/mine")
    check_licence("other", name="mine-1.0", link="LICENSE.md")
    with pytest.raises(SettingsError, match="already has a name and a text"):
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
def test_hub_ids_are_recognised_by_the_hubs_rules(name, sound):
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
def test_a_local_folder_and_a_hub_id_are_distinguished(name, local, tmp_path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_on_disk(name) is local


@pytest.mark.parametrize(
    "name", ["plain", "with space & <b>", "---", "a: b # c", "'quoted\"", "\u202etfel", "%s {{ x }}"]
)
def test_the_front_matter_is_valid_for_any_folder_name(name, tmp_path):
    text = card_of(make_run(tmp_path / name, []), language=["no", "en"])
    data = check_front_matter(text)
    assert data["language"] == ["no", "en"]
    loaded = ModelCard(text)  # as huggingface_hub reads it
    assert loaded.data.to_dict()["license"] == "mit"
    assert loaded.text.strip().startswith("# ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"license": ""}, "no licence is set"),
        ({"license": "my-own"}, "the Hub does not know --license my-own"),
        ({"language": ["english"]}, "--language english"),
        ({"repo_id": "me/my/model"}, "--repo-id me/my/model"),
        ({"base_model": "/models/base"}, "--base-model /models/base"),
    ],
)
def test_invalid_arguments_are_refused_before_any_write(arguments, says, tmp_path):
    folder = make_run(tmp_path / "run", [])
    before = sorted(folder.iterdir())
    with pytest.raises(SettingsError, match=says):
        card_of(folder, **arguments)
    assert sorted(folder.iterdir()) == before


def test_results_that_are_not_finite_are_left_out(tmp_path):
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
