"""Votes in a report: only those on this run's model, with a win rate."""

import json

import pytest
from run_folders import make_run, make_steps

from dpokit.report.page import write_report
from dpokit.report.read import load_run
from dpokit.report.tables import list_votes


def add_votes(folder, *votes, run="t0", base="gpt2"):
    with (folder / "votes.jsonl").open("a") as file:
        for vote, blind in votes:
            file.write(json.dumps({"vote": vote, "blind": blind, "run": run, "models": {"base": base}}) + "\n")


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run", make_steps(4, every=2))


def test_blind_and_all_votes_are_counted_with_a_win_rate(folder):
    add_votes(folder, ("tuned", True), ("tuned", True), ("base", True), ("tie", False), ("both_bad", False))
    add_votes(folder, *[("base", True)] * 9, run="an earlier run")
    table = list_votes(load_run(folder, name="run"))
    assert table is not None
    assert table.head == ["votes", "tuned", "base", "tie", "both bad", "win rate"]
    assert [row[:5] for row in table.rows] == [["blind", "2", "1", "0", "0"], ["all", "2", "1", "1", "1"]]
    assert table.rows[0][5] == table.rows[1][5] == "0.6667 (0.2077\u00a0to\u00a00.9385)"
    report = write_report([folder]).report.read_text()
    assert "win rate" in report
    assert "0.6667" in report


def test_a_run_without_votes_has_no_table(folder):
    assert list_votes(load_run(folder, name="run")) is None
    assert "win rate" not in write_report([folder]).report.read_text()


def test_votes_without_a_preference_have_no_win_rate(folder):
    add_votes(folder, ("tie", True))
    table = list_votes(load_run(folder, name="run"))
    assert table is not None
    assert [row[5] for row in table.rows] == ["-", "-"]


def test_votes_against_another_base_are_left_out_with_a_note(folder):
    add_votes(folder, ("tuned", True))
    add_votes(folder, *[("base", True)] * 3, base="another")
    run = load_run(folder, name="run")
    assert [vote["vote"] for vote in run.votes] == ["tuned"]
    assert any("3 votes in votes.jsonl are against another base" in note for note in run.notes)


def test_an_incomplete_last_vote_is_left_out_with_a_note(folder):
    add_votes(folder, ("tuned", True))
    with (folder / "votes.jsonl").open("a") as file:
        file.write('{"vote": "ba')
    run = load_run(folder, name="run")
    assert len(run.votes) == 1
    assert any("votes.jsonl" in note for note in run.notes)
