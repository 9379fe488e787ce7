"""The weights that a push sends, and its refusals: an old merge, an unfinished run, a card of other weights."""

import json

import pytest
from pushing import REPO, make_run

from dpokit.card.card import write_card
from dpokit.errors import HubError
from dpokit.push.bundle import build_bundle
from dpokit.push.hub import PushTarget
from dpokit.push.push import push_run


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


@pytest.mark.parametrize("weights", [None, "merged", "both"])
@pytest.mark.parametrize("licence", [None, "mit"])
def test_an_outdated_merge_is_not_sent(run, weights, licence):
    train_on(run)
    with pytest.raises(HubError, match="merged is out of date") as error:
        list_bundle(run, weights=weights, license=licence)
    assert error.value.do == f"delete {run.merged} and run dpokit merge {run.path}; or --what adapter"
    assert {folder.name for folder in list_bundle(run, weights="adapter").folders} == {"adapter"}


def test_a_card_describes_the_adapter_if_the_merge_is_outdated(run):
    run.card.unlink()
    assert "library_name: transformers" in write_card(run, license="mit").read_text()
    train_on(run)
    card = write_card(run, license="mit").read_text()
    assert "library_name: peft" in card
    assert f'"{run.path.name}/adapter"' in card


@pytest.mark.parametrize("state", ["running", "failed", "preempted"])
def test_an_unfinished_run_sends_no_older_weights(run, state):
    run.write_run(state=state)
    with pytest.raises(HubError, match=f"is {state}: adapter/ is older than this training"):
        list_bundle(run)


def test_a_merged_checkpoint_of_a_failed_run_is_sent(run):
    run.adapter.rename(run.path / "away")
    run.write_run(state="failed")
    assert list_bundle(run).weights == "merged"


@pytest.mark.parametrize(
    ("written", "pushed", "repo_id"),
    [("adapter", "merged", REPO), ("merged", "adapter", REPO), ("merged", "merged", "tester/other")],
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
