"""Which of a run's evaluations its report and card show, and that they say so."""

import json

import pytest
from run_folders import add_evaluation, make_run

from dpokit.card.card import write_card
from dpokit.errors import RunFolderError, SettingsError
from dpokit.report.page import write_report
from dpokit.report.read import load_run
from dpokit.report.tables import describe_choice
from dpokit.rundir import RunDir
from dpokit.serve.markup import show_facts

OWN, OTHER = {"own": True}, {"own": False, "name": "harmless.jsonl, split train"}
# Of each evaluation: its folder, its data, its other fields. "" is the layout of older versions, without `own`.
CASES = {
    "the largest": ([("a", OWN | {"pairs": 20}, {}), ("b", OWN | {"pairs": 2}, {})], "eval/a"),
    "of equals the newest": (
        [("b", OWN | {"pairs": 20}, {"made": "2026-11-29T09"}), ("a", OWN | {"pairs": 20}, {"made": "2026-11-29T10"})],
        "eval/a",
    ),
    "own pairs before more other pairs": ([("a", OTHER, {}), ("b", OWN | {"pairs": 2}, {})], "eval/b"),
    "other pairs if there are no own": ([("a", OTHER | {"pairs": 5}, {}), ("b", OTHER | {"pairs": 9}, {})], "eval/b"),
    "an old one is of own pairs": ([("", {"pairs": 20}, {}), ("b", OWN | {"pairs": 2}, {}), ("c", OTHER, {})], "eval"),
    "an old one and a larger new one": ([("", {"pairs": 20}, {}), ("b", OWN | {"pairs": 200}, {})], "eval/b"),
    "as trained before another beta": (
        [("a", OWN | {"pairs": 200}, {"changed": ["beta"]}), ("b", OWN | {"pairs": 20}, {"changed": []})],
        "eval/b",
    ),
    "own pairs with another base before other pairs": (
        [("a", OWN | {"pairs": 2}, {"changed": ["base"]}), ("b", OTHER, {})],
        "eval/a",
    ),
    "not one of an unknown format": ([("a", OWN, {"format": 9}), ("b", OWN | {"pairs": 2}, {})], "eval/b"),
    "not one of earlier weights": ([("a", OWN, {"end": "t-earlier"}), ("b", OWN | {"pairs": 2}, {})], "eval/b"),
    "odd values rank last": ([("a", OWN | {"pairs": "many"}, {"changed": 3}), ("b", OWN | {"pairs": 1}, {})], "eval/b"),
}


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run", [])  # without steps, so that no figure takes time


@pytest.mark.parametrize("case", CASES)
def test_the_largest_evaluation_of_own_pairs_is_shown(case, folder):
    evaluations, shown = CASES[case]
    for name, data, changes in evaluations:
        add_evaluation(folder, name=name, data=data, answers=None, **changes)
    run = load_run(folder, name="run")
    assert run.evaluation is not None
    assert run.evaluation.name == shown
    if len(run.evaluations) > 1:
        assert f"This is {shown}, the largest" in describe_choice(run)


def test_report_card_and_page_say_which_one_they_show(folder):
    add_evaluation(folder, name="large", data=OWN | {"pairs": 20, "available": 200})
    add_evaluation(folder, name="small", data=OWN | {"pairs": 2}, verdict={"text": "Small is worse.", "better": False})
    (folder / "model").mkdir()
    sentence = (
        "20 of 200 pairs of Anthropic/hh-rlhf, split test, with 95 % intervals. This is eval/large, the largest of "
    )
    sentence += "the run's own held-out pairs among 2 evaluations."
    page = write_report([folder]).report.read_text()
    for text in (page, write_card(RunDir(folder), license="mit").read_text(), show_facts(RunDir(folder), {})):
        assert sentence in text.replace("&#39;", "'")
        assert "Small is worse." not in text
    assert "Evaluations by dpokit evaluate" in page
    named = write_report([folder], evaluation="small")
    assert named.verdict == "Small is worse."
    assert "This is eval/small, chosen among 2 evaluations." in named.report.read_text()
    card = write_card(RunDir(folder), license="mit", evaluation=str(folder / "eval" / "small")).read_text()
    assert "**Small is worse.**" in card


def test_one_evaluation_needs_no_choice(folder):
    add_evaluation(folder, name="only", data=OWN)
    page = write_report([folder]).report.read_text()
    assert "This is eval/only" not in page
    assert "Evaluations by dpokit evaluate" not in page


@pytest.mark.parametrize(
    ("first", "second", "answers"),
    [((20, None), (2, 3), 3), ((20, 5), (200, None), 5), ((20, 5), (200, 8), 8), ((20, 5), (200, 2), 5)],
)
def test_the_most_sampled_answers_are_shown(first, second, answers, folder):
    for name, (pairs, number) in zip("ab", (first, second), strict=True):
        add_evaluation(folder, name=name, data=OWN | {"pairs": pairs}, answers=number)
    run = load_run(folder, name="run")
    assert run.answered is not None
    assert len(run.answers) == answers == run.answered.answer_numbers["settings"]["prompts"]
    is_elsewhere = run.answered is not run.evaluation
    assert (
        f"From {run.answered.name}, of Anthropic/hh-rlhf, split test." in write_report([folder]).report.read_text()
    ) is is_elsewhere


def test_a_named_evaluation_without_answers_shows_none(folder):
    add_evaluation(folder, name="a", answers=5)
    add_evaluation(folder, name="b", answers=None)
    assert load_run(folder, name="run", evaluation="b").answers == []
    assert len(load_run(folder, name="run").answers) == 5


def test_an_unknown_or_outdated_evaluation_is_refused(folder):
    with pytest.raises(SettingsError, match=r"(?s)no evaluation 'a' of its present weights.*dpokit evaluate"):
        write_report([folder], evaluation="a")
    add_evaluation(folder, name="a", end="t-earlier")
    add_evaluation(folder, name="b")
    with pytest.raises(SettingsError, match="no evaluation 'eval/a' of its present weights\n  expected:  eval/b"):
        write_report([folder], evaluation="eval/a")
    with pytest.raises(SettingsError, match="names an evaluation of one run, and there are 2 runs"):
        write_report([folder, make_run(folder.parent / "other", [])], evaluation="b")


def test_changed_flags_of_the_shown_one_are_a_note(folder):
    add_evaluation(folder, name="a", changed=["base", "beta"])
    assert "another value than the run&#39;s of base, beta" in write_report([folder]).report.read_text()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"changed": ["base"]}, "eval/b/answers.jsonl was sampled with another value than the run's of base"),
        ({"data": OTHER}, "eval/b/answers.jsonl was sampled on other pairs than the run holds out: harmless.jsonl"),
        ({}, ""),
    ],
)
def test_answers_of_another_base_or_data_are_a_note(changes, note, folder):
    add_evaluation(folder, name="a", data=OWN, answers=None)
    add_evaluation(folder, name="b", answers=3, **{"data": OWN | {"pairs": 2}} | changes)
    run = load_run(folder, name="run")
    assert (run.evaluation.name, run.answered.name) == ("eval/a", "eval/b")
    assert note in " ".join(run.notes)
    assert len(run.notes) == bool(note)


def test_a_damaged_evaluation_is_an_error_with_a_remedy(folder):
    add_evaluation(folder, name="a")
    (folder / "eval" / "b").mkdir()
    (folder / "eval" / "b" / "pairs.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"eval/b/pairs.json is damaged") as error:
        write_report([folder])
    assert error.value.do.startswith("delete it;")


def test_an_interrupted_evaluation_is_not_shown(folder):
    """An empty folder, and answers of earlier weights that were being sampled when the evaluation was killed."""
    (folder / "eval" / "empty").mkdir(parents=True)
    killed = add_evaluation(folder, name="killed", end="t-earlier")
    (killed / "answers.json").unlink()
    (folder / "eval" / "notes.txt").write_text("mine")
    run = load_run(folder, name="run")
    assert (run.evaluations, run.pairs, run.answers) == ([], None, [])


def test_many_outdated_evaluations_are_one_note(folder):
    for number in range(6):
        add_evaluation(folder, name=f"e{number}", end="t-earlier", answers=None)
    (note,) = load_run(folder, name="run").notes
    assert "eval/e0/pairs.json, eval/e1/pairs.json, eval/e2/pairs.json and 3 more" in note


def test_a_verdict_is_read_from_old_run_folders(folder):
    add_evaluation(folder)
    verdict = json.loads((folder / "eval" / "pairs.json").read_text())["verdict"]["text"]
    assert write_report([folder]).verdict == verdict
    assert write_report([folder], evaluation="eval").verdict == verdict
