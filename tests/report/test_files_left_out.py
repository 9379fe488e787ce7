"""Files that a report leaves out or refuses: of other weights, of other data, or with invalid values."""

import json

import pytest
from run_folders import add_evaluation, make_run, make_steps

from dpokit.errors import RunFolderError
from dpokit.report.page import write_report
from dpokit.report.read import load_run


def test_an_outdated_evaluation_gives_no_verdict(tmp_path):
    folder = make_run(tmp_path / "run", make_steps(20, every=5))
    add_evaluation(folder)
    verdict = write_report([folder]).verdict
    assert verdict.startswith("The tuned model is better")
    assert load_run(folder, name="run").notes == []
    record = json.loads((folder / "run.json").read_text())
    record["generations"].append(record["generations"][-1] | {"token": "t1"})
    (folder / "run.json").write_text(json.dumps(record))
    written = write_report([folder])
    assert "evaluation loss" in written.verdict
    page = written.report.read_text()
    assert verdict not in page
    assert "out of date, because the run was trained further, and left out: eval/pairs.json, eval/answers.json" in page
    run = load_run(folder, name="run")
    assert (run.pairs, run.answers, run.answer_numbers) == (None, [], None)


@pytest.mark.parametrize("is_own", [True, False])
def test_pairs_other_than_the_held_out_ones_are_named(is_own, tmp_path):
    folder = make_run(tmp_path / "run", make_steps(3, every=0))
    add_evaluation(folder)
    file = folder / "eval" / "pairs.json"
    record = json.loads(file.read_text())
    record["data"] |= {"own": is_own, "name": "harmless.jsonl, split train"}
    file.write_text(json.dumps(record))
    note = "measured on other pairs than the run holds out: harmless.jsonl, split train"
    assert (note in write_report([folder]).report.read_text()) is not is_own


def test_kl_is_shown_with_its_number_of_pairs(tmp_path):
    folder = make_run(tmp_path / "run", make_steps(3, every=0))
    add_evaluation(folder)
    file = folder / "eval" / "pairs.json"
    record = json.loads(file.read_text())
    record["tuned"]["kl_per_token"] = {"value": 0.25, "pairs": 7}
    file.write_text(json.dumps(record))
    assert "0.2500, of 7 pairs" in write_report([folder]).report.read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("eval/pairs.json", {"format": 1, "tuned": {"loss": 1}, "groups": {"source": None}}),
        ("data.json", {"train": {"rows": "12", "kept": 3}}),
        ("run.json", {"state": "finished", "settings": {"loss_type": {"value": 3}}}),
        ("run.json", {"state": "finished", "generations": 5}),
        ("run.json", {"state": "finished", "generations": [{}, {"resumed_step": "5"}]}),
    ],
)
def test_values_of_wrong_types_are_one_message(name, content, tmp_path):
    folder = make_run(tmp_path / "run", make_steps(3, every=0))
    (folder / "eval").mkdir()
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(RunFolderError, match=f"a file in {folder} holds a value that no version of dpokit writes"):
        write_report([folder])
