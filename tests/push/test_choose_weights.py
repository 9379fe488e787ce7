"""What of a run goes up, and when nothing does: an old merge, a run that goes on, a card of something else."""

import json

import pytest
from pushing import REPO, make_run

from dpokit.card.card import write_card
from dpokit.errors import HubError
from dpokit.push.bundle import build_parcel
from dpokit.push.hub import Target
from dpokit.push.push import push_run


@pytest.fixture
def run(tmp_path, tiny_gpt2):
    """An adapter with the merged model beside it."""
    return make_run(tmp_path / "run", tiny_gpt2, adapter=True, merged=True)


def look(run, repo_id=REPO, **options):
    return push_run(run.path, Target(repo_id), dry_run=True, **options).parcel


def train_on(run):
    """A later start ends with another adapter."""
    run.take_possession(0)
    run.write_run(state="finished")
    run.token = ""


@pytest.mark.parametrize("what", [None, "merged", "both"])
@pytest.mark.parametrize("licence", [None, "mit"])
def test_a_merge_of_an_earlier_end_is_not_sent(run, what, licence):
    train_on(run)
    with pytest.raises(HubError, match="merged is of an earlier end") as error:
        look(run, what=what, license=licence)
    assert error.value.do == f"delete {run.merged} and run dpokit merge {run.path}; or --what adapter"
    assert {folder.name for folder in look(run, what="adapter").folders} == {"adapter"}


def test_a_card_tells_of_the_adapter_where_the_merge_is_of_an_earlier_end(run):
    run.card.unlink()
    assert "library_name: transformers" in write_card(run, license="mit").read_text()
    train_on(run)
    card = write_card(run, license="mit").read_text()
    assert "library_name: peft" in card
    assert f'"{run.path.name}/adapter"' in card


@pytest.mark.parametrize("state", ["running", "failed", "preempted"])
def test_a_run_that_is_not_finished_sends_no_weights_of_an_earlier_end(run, state):
    run.write_run(state=state)
    with pytest.raises(HubError, match=f"is {state}: adapter/ is of an earlier end"):
        look(run)


def test_a_merged_checkpoint_of_a_run_without_an_end_goes(run):
    run.adapter.rename(run.path / "away")
    run.write_run(state="failed")
    assert look(run).what == "merged"


@pytest.mark.parametrize(
    ("written", "pushed", "repo_id"),
    [("adapter", "merged", REPO), ("merged", "adapter", REPO), ("merged", "merged", "tester/other")],
)
def test_a_card_of_ours_goes_only_with_what_it_tells_of(run, written, pushed, repo_id):
    run.card.unlink()
    look(run, what=written, license="mit")
    assert look(run, what=written).files
    with pytest.raises(HubError, match=f"tells of a.* in {REPO}; a.* would go to {repo_id}"):
        look(run, repo_id, what=pushed)
    assert look(run, repo_id, what=pushed, license="mit").files


def test_the_licence_beside_the_card_goes_too(run):
    run.card.unlink()
    write_card(run, license="other", license_name="mine", license_link="LICENSE", repo_id=REPO)
    with pytest.raises(HubError, match="names LICENSE, and there is no"):
        look(run)
    (run.path / "LICENSE").write_text("Do as you like.\n")
    assert "LICENSE" in {file.path for file in look(run).files}


def test_code_of_a_models_own_goes_with_it_and_is_missed_where_it_is_not_there(run):
    config = run.merged / "config.json"
    own = {"AutoModelForCausalLM": "own.Model", "AutoConfig": "org/base--theirs.C", "AutoTokenizer": ["own.T", None]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": own}))
    with pytest.raises(HubError, match=r"has no own\.py"):
        build_parcel(run)
    for name in ("own.py", "own_parts.py"):
        (run.merged / name).write_text("class Model: ...\n")
    assert {"own.py", "own_parts.py"} <= {file.path for file in build_parcel(run).files}
