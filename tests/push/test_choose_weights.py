"""The weights that a push sends, and its refusals: an old merge, an unfinished run, a card of other weights."""

import json

import pytest
from pushing import REPO, hash_tree, make_run
from typer.testing import CliRunner

from dpokit.atomic_files import write_json
from dpokit.card.card import write_card
from dpokit.errors import HubError, RunFolderError, SettingsError
from dpokit.push.bundle import build_bundle
from dpokit.push.hub import PushTarget
from dpokit.push.push import push_run
from dpokit.report.read import PAIRS_FORMAT
from dpokit.verbs.app import app


@pytest.fixture
def run(tmp_path, tiny_gpt2):
    """A run with an adapter and its merged model."""
    return make_run(tmp_path / "run", tiny_gpt2, adapter=True, merged=True)


def list_bundle(run, repo_id=REPO, **options):
    return push_run(run.path, PushTarget(repo_id), dry_run=True, **options).bundle


def train_on(run):
    """Records a later start of the run, which ends with another adapter."""
    run.take_possession(0)
    run.write_run(state="finished")
    run.token = ""


@pytest.mark.parametrize("weights", [None, "model", "both"])
@pytest.mark.parametrize("licence", [None, "mit"])
def test_an_outdated_merge_is_not_sent(run, weights, licence):
    train_on(run)
    with pytest.raises(HubError, match="merged is out of date") as error:
        list_bundle(run, weights=weights, license=licence)
    assert error.value.do == f"delete {run.merged} and run dpokit merge {run.path}; or --weights adapter"
    assert {folder.name for folder in list_bundle(run, weights="adapter").folders} == {"adapter"}


def test_a_card_describes_the_adapter_if_the_merge_is_outdated(run):
    run.card.unlink()
    assert "library_name: transformers" in write_card(run, license="mit").read_text()
    train_on(run)
    card = write_card(run, license="mit").read_text()
    assert "library_name: peft" in card
    assert f'"{run.path.name}/adapter"' in card


OTHER = {"license": "other", "license_name": "mine", "license_link": "https://a.b/c"}


@pytest.mark.parametrize(
    ("card", "licence", "kept"),
    [
        ({"license": "mit", "language": ["en", "de"]}, "apache-2.0", ["license: apache-2.0", "- en\n- de"]),
        ({"license": "mit", "language": ["en"]}, "mit", ["license: mit", "language:\n- en"]),
        (
            {"license": "mit", "contact": 'M\u00e9 "of" <a@b.c> #1'},
            "mit",
            ['# contact: "M\\u00e9 \\"of\\" <a@b.c> #1"\n', "## Contact"],
        ),
        ({"license": "mit", "base_model": "org/b"}, "mit", ["base_model: org/b\n", "base_model_relation: finetune\n"]),
        ({"license": "mit", "evaluation": "small"}, "mit", ['# evaluation: "small"\n']),
        (OTHER, "other", ["license_name: mine", "license_link: https://a.b/c"]),
        (OTHER, "mit", ["license: mit"]),
    ],
)
def test_a_push_with_a_licence_keeps_the_rest_of_the_card(run, card, licence, kept):
    run.card.unlink()
    for name, pairs in (("large", 9), ("small", 2)):
        scores = {"format": PAIRS_FORMAT, "data": {"pairs": pairs, "own": True}}
        write_json(run.make_evaluation(name).pairs_json, scores)
    first = write_card(run, **card, repo_id=REPO).read_text()
    list_bundle(run, license=licence)
    again = run.card.read_text()
    assert all(text in again for text in kept)
    assert ("license_name" in again) is (licence == "other")
    if licence == card["license"]:
        assert again == first


def test_a_push_with_a_licence_keeps_an_edited_card(run):
    run.card.unlink()
    write_card(run, license="mit", contact="me").write_text(f"{run.card.read_text()}\nmore\n")
    before = run.card.read_bytes()
    with pytest.raises(RunFolderError, match="was edited since"):
        list_bundle(run, license="mit")
    assert run.card.read_bytes() == before


def test_a_new_card_of_a_whole_model_names_the_base_given(run):
    run.card.unlink()
    list_bundle(run, base_model="org/base", license="mit")
    assert "base_model: org/base\n" in run.card.read_text()


@pytest.mark.parametrize(("weights", "base_model"), [("adapter", "/models/base"), ("model", "/models/base")])
def test_an_unusable_base_is_refused_before_a_card_is_written(run, weights, base_model):
    run.card.unlink()
    before = hash_tree(run.path)
    with pytest.raises(SettingsError, match="--base-model"):
        list_bundle(run, weights=weights, base_model=base_model, license="mit")
    assert hash_tree(run.path) == before


def test_the_old_name_of_the_weights_flag_prints_a_line(run):
    shown = [
        CliRunner().invoke(app, ["push", str(run.path), "--repo-id", REPO, *flags, "--dry-run", "--json"])
        for flags in (["--what", "merged"], ["--weights", "model"], ["--what", "adapter", "--weights", "model"])
    ]
    assert shown.pop().exit_code == 2
    assert [json.loads(result.stdout)["weights"] for result in shown] == ["model", "model"]
    assert "--what is now --weights" in shown[0].stderr
    assert "--what" not in shown[1].stderr


@pytest.mark.parametrize("state", ["running", "failed", "preempted"])
def test_an_unfinished_run_sends_no_older_weights(run, state):
    run.write_run(state=state)
    with pytest.raises(HubError, match=f"is {state}: adapter/ is older than this training"):
        list_bundle(run)


def test_a_merged_checkpoint_of_a_failed_run_is_sent(run):
    run.adapter.rename(run.path / "away")
    run.write_run(state="failed")
    assert list_bundle(run).weights == "model"


@pytest.mark.parametrize(
    ("written", "pushed", "repo_id"),
    [("adapter", "model", REPO), ("model", "adapter", REPO), ("model", "model", "tester/other")],
)
def test_a_generated_card_of_other_weights_is_refused(run, written, pushed, repo_id):
    run.card.unlink()
    list_bundle(run, weights=written, license="mit")
    assert list_bundle(run, weights=written).files
    with pytest.raises(HubError, match=f"describes a.* in {REPO}, but a.* would go to {repo_id}"):
        list_bundle(run, repo_id, weights=pushed)
    assert list_bundle(run, repo_id, weights=pushed, license="mit").files


def test_the_licence_file_that_a_card_links_is_sent(run):
    run.card.unlink()
    write_card(run, license="other", license_name="mine", license_link="LICENSE", repo_id=REPO)
    with pytest.raises(HubError, match="names LICENSE, but there is no"):
        list_bundle(run)
    (run.path / "LICENSE").write_text("Do as you like.\n")
    assert "LICENSE" in {file.path for file in list_bundle(run).files}


def test_custom_model_code_is_sent_and_refused_if_missing(run):
    config = run.merged / "config.json"
    auto_map = {
        "AutoModelForCausalLM": "own.Model",
        "AutoConfig": "org/base--theirs.C",
        "AutoTokenizer": ["own.T", None],
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": auto_map}))
    with pytest.raises(HubError, match=r"has no own\.py"):
        build_bundle(run)
    for name in ("own.py", "own_parts.py"):
        (run.merged / name).write_text("class Model: ...\n")
    assert {"own.py", "own_parts.py"} <= {file.path for file in build_bundle(run).files}
