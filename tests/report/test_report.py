"""The report's content, from hand-made run folders."""

import json
import math
import re

import pytest
from run_folders import add_evaluation, make_run, make_starts, make_steps, v

from dpokit.errors import RunFolderError, SettingsError
from dpokit.quickstart.run import describe_shares
from dpokit.report.comparison import sort_runs
from dpokit.report.page import write_report
from dpokit.report.read import load_run, load_runs
from dpokit.report.tables import compare_runs, interval, list_evaluations, list_restarts
from dpokit.report.verdict import build_verdict
from dpokit.rundir import RunDir


def page_of(folder, **more) -> str:
    return write_report([folder], **more).report.read_text()


def test_one_run_gives_a_page_and_a_png_of_each_figure(tmp_path):
    written = write_report([make_run(tmp_path / "run", make_steps(20, every=5, gpu=True))])
    assert written.report == tmp_path / "run" / "report" / "report.html"
    assert sorted(written.report.parent.iterdir()) == sorted([written.report, *written.pngs])
    keys = {png.stem.removeprefix("report-") for png in written.pngs}
    assert {"loss", "margins", "accuracies", "rewards", "logps", "learning_rate", "grad_norm", "throughput"} <= keys
    assert {"gpu_power", "gpu_memory", "gpu_utilisation"} <= keys
    assert all(f'<figure id="{key}" role="img" aria-label="' in written.report.read_text() for key in keys)


def test_a_run_without_a_gpu_has_no_gpu_figures(tmp_path):
    assert "GPU" not in page_of(make_run(tmp_path, make_steps(5, every=0)))


def test_the_page_has_no_external_references(tmp_path):
    page = page_of(make_run(tmp_path, make_steps(20, every=5)))
    assert not re.search(r"https?:|//[a-z]|<script|<link(?! rel=\"icon\" href=\"data:,\")|@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_the_verdict_is_that_of_the_evaluation(tmp_path):
    folder = make_run(tmp_path, make_steps(20, every=5))
    before = write_report([folder]).verdict
    add_evaluation(folder)
    verdict = json.loads((folder / "eval" / "pairs.json").read_text())["verdict"]["text"]
    assert write_report([folder]).verdict == verdict != before
    assert "0.6300 (0.6100\u00a0to\u00a00.6500)" in page_of(folder)


def test_a_run_that_judged_its_answers_says_so_first(tmp_path):
    judged = describe_shares({"base": {"kind": 0.5, "well_formed": 1}, "tuned": {"kind": 0.99, "well_formed": 1}}, 400)
    assert "400 held-out prompts, 99.0% are kind and 100.0% well-formed; of the base's, 50.0% and 100.0%." in judged
    folder = make_run(tmp_path, make_steps(20, every=5), judged=judged)
    assert build_verdict(load_run(folder, name="run")).startswith(f"{judged} The lowest evaluation loss is")
    assert "99.0% are kind" in page_of(folder)
    RunDir(folder).write_run(judged="")
    assert build_verdict(load_run(folder, name="run")).startswith("The lowest")


def test_without_a_known_start_the_first_evaluation_is_named(tmp_path):
    records = [{"step": step, "seconds": 1, "eval_loss": loss} for step, loss in ((5, 2.5), (10, 2.0))]
    text = build_verdict(load_run(make_run(tmp_path, records, settings={"loss_type": ["sft"]}), name="run"))
    assert "is 2, at step 10, the last one; the first was 2.5, at step 5." in text


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (
            [0.65, 0.6, 0.62],
            ["lowest evaluation loss is 0.6, at step 2", "the last, 0.62 at step 3, is worse", "is below"],
        ),
        ([0.65, 0.6], ["0.6, at step 2, the last one", "below ln 2 = 0.693"]),
        ([0.7, 0.71], ["not below ln 2 = 0.693"]),
        ([None, 0.6], ["The only evaluation loss is 0.6"]),
        ([None], ["eval_loss was not measured"]),
    ],
)
def test_without_an_evaluation_the_verdict_is_from_training(losses, says, tmp_path):
    records = [{"step": step, "seconds": 1, "eval_loss": loss} for step, loss in enumerate(losses, start=1)]
    text = build_verdict(load_run(make_run(tmp_path, records), name="run"))
    assert all(part in text for part in says), text
    assert "interval" in text
    assert f"dpokit evaluate {tmp_path}" in text


def test_ln_2_is_marked_only_for_losses_that_start_there(tmp_path):
    pure = page_of(make_run(tmp_path / "pure", make_steps(5, every=1)))
    mixed = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}
    other = page_of(make_run(tmp_path / "mixed", make_steps(5, every=1), settings=mixed))
    assert "ln 2 = 0.693</text>" in pure
    assert "ln 2 = " not in other
    assert "ln 2 is not marked" in other


def test_evaluations_are_listed_with_the_last_training_loss(tmp_path):
    records = [
        {"step": 2, "loss": 0.7, "seconds": 1},
        {"step": 3, "eval_loss": 0.69, "eval_rewards/margins": 0.1, "seconds": 2},
        {"step": 4, "loss": 0.6, "eval_loss": math.nan, "eval_rewards/margins": 0.2, "seconds": 3},
    ]
    table = list_evaluations(load_run(make_run(tmp_path, records), name="run"))
    assert table is not None
    assert list(table.head) == ["step", "training loss", "validation loss", "rewards/margins"]
    assert table.rows == [["3", "0.7000", "0.6900", "0.1000"], ["4", "0.6000", "NaN", "0.2000"]]
    assert table.marked == 0


def test_many_evaluations_are_thinned_but_keep_best_and_last(tmp_path):
    records = [{"step": s, "seconds": s, "eval_loss": 0.1 if s == 777 else 1.0} for s in range(1, 1001)]
    table = list_evaluations(load_run(make_run(tmp_path, records), name="run"))
    assert table is not None
    assert len(table.rows) <= 202
    assert table.rows[table.marked or 0][0] == "777"
    assert table.rows[-1][0] == "1,000"
    assert "of 1,000" in table.note


def test_restarts_are_listed_and_marked(tmp_path):
    folder = make_run(tmp_path, make_steps(40, every=0), generations=make_starts(10, 20), state="running")
    table = list_restarts(load_run(folder, name="run"))
    assert table is not None
    assert [row[0] for row in table.rows] == ["1", "2", "3"]
    assert [row[4:] for row in table.rows] == [["0", "13", "preempted"], ["10", "23", "lost"], ["20", "40", "running"]]
    assert "Restarts at step 10, 20." in page_of(folder)


@pytest.mark.parametrize("state", ["running", "preempted", "failed"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_run_with_few_or_no_steps_has_a_report(steps, state, tmp_path):
    folder = make_run(tmp_path, make_steps(steps, every=0), state=state, why="no room" if state == "failed" else None)
    page = page_of(folder)
    assert ("There is nothing to draw yet." in page) == (steps == 0)
    assert ("No step has been logged yet." in page) == (steps == 0)
    assert {"running": "running, or killed", "failed": "failed (no room)"}.get(state, state) in page


def test_only_run_json_is_needed(tmp_path):
    (tmp_path / "run.json").write_text('{"state": "running", "generations": []}')
    assert "No step has been logged yet." in page_of(tmp_path)


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
def test_values_that_are_not_finite_are_reported(lost, tmp_path):
    records = make_steps(30, every=10)
    records[4]["loss"] = records[9]["eval_loss"] = records[6]["loss"] = lost
    page = page_of(make_run(tmp_path, records))
    assert "loss was not finite 2 times, first at step 5" in page
    assert "eval_loss was not finite once, first at step 10" in page
    assert "nan" not in page


def test_an_incomplete_last_line_is_left_out(tmp_path):
    folder = make_run(tmp_path, make_steps(3, every=0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert "the last line of metrics.jsonl is incomplete" in page_of(folder)


def damage(folder, name: str, content: bytes):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run.json", b'{"state": ', "run.json is damaged"),
        ("run.json", b"[]", "run.json is damaged: it is not a mapping"),
        ("data.json", b"\xff\xfe", "data.json is damaged"),
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n', "metrics.jsonl, line 2 is damaged"),
        ("metrics.jsonl", b'{"step": 1}\n\n{"step": 3}\n', "metrics.jsonl, line 2 is damaged"),
        ("metrics.jsonl", b'{"step": 1}\n[2]\n', "metrics.jsonl, line 2 is damaged: it is not a mapping"),
        ("metrics.jsonl", b'{"loss": 1}\n', "metrics.jsonl, line 1 is damaged: its step is null"),
        ("metrics.jsonl", b'{"step": 1}\n{"step": "2"}\n', 'line 2 is damaged: its step is "2"'),
        ("metrics.jsonl", b'{"step": 1}\n\xff\xff\n', "metrics.jsonl, line 2 is damaged"),
        ("eval/pairs.json", b"{", "pairs.json is damaged"),
        ("eval/answers.json/x", b"", "answers.json cannot be read: Is a directory"),
        ("eval/answers.jsonl", b"{}\n{\n{}\n", "answers.jsonl, line 2 is damaged"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(name, content, says, tmp_path):
    damage(make_run(tmp_path, make_steps(3, every=0)), name, content)
    with pytest.raises(RunFolderError, match=re.escape(says)):
        write_report([tmp_path])
    assert not (tmp_path / "report").exists()


def test_no_run_and_no_folder_have_different_messages(tmp_path):
    with pytest.raises(RunFolderError, match=r"holds no run\.json"):
        write_report([tmp_path])
    with pytest.raises(RunFolderError, match="there is no folder"):
        write_report([tmp_path / "nowhere"])


def test_an_evaluation_of_an_unknown_format_is_left_out(tmp_path):
    damage(make_run(tmp_path, make_steps(3, every=0)), "eval/pairs.json", b'{"format": 9}')
    assert "eval/pairs.json has format 9" in page_of(tmp_path)


@pytest.mark.parametrize(
    "record", [{}, {"base": {}, "tuned": None, "groups": {}}, {"verdict": None, "difference": None}]
)
def test_an_incomplete_evaluation_gives_a_report(record, tmp_path):
    damage(make_run(tmp_path, make_steps(3, every=0)), "eval/pairs.json", json.dumps({"format": 1, **record}).encode())
    damage(tmp_path, "eval/answers.jsonl", b'{"prompt": [{"role": "user", "content": "hi"}]}\n')
    damage(tmp_path, "eval/answers.json", b"{}")
    page = page_of(tmp_path)
    assert "dpokit evaluate" in page
    assert "hi" in page


def test_a_lone_surrogate_in_a_sample_is_shown_escaped(tmp_path):
    add_evaluation(make_run(tmp_path, make_steps(3, every=0)), text="before \ud800 after")
    assert r"before \ud800 after" in page_of(tmp_path)


def test_samples_are_side_by_side_and_say_if_they_were_cut(tmp_path):
    add_evaluation(make_run(tmp_path, make_steps(3, every=0)), prompt="\n\nHuman: <Why>?")
    page = page_of(tmp_path)
    assert page.count("<p>Human: &lt;Why&gt;?</p>") == 3
    assert [page.count(f'<div class="text {side}">') for side in ("chosen", "base", "tuned")] == [3, 3, 3]
    assert page.count("cut off at the length limit") == 3
    assert "61 wins, 9 ties, 30 losses; win rate 0.6600" in page


def test_settings_have_origins_and_dropped_rows_have_reasons(tmp_path):
    page = page_of(make_run(tmp_path, make_steps(3, every=0)))
    rows = [re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)).strip() for row in re.findall(r"<tr.*?</tr>", page, re.S)]
    assert "learning_ rate 5e-07 command line" in rows
    assert "train different_prompts 4" in rows
    assert "train 1,500 1,495 5 0 538 140 HH transcript; Anthropic/hh-rlhf, split train" in rows
    assert "12 % of the evaluation&#39;s prompts are in the training split, too" in page


def test_an_outdated_picture_is_deleted_and_others_stay(tmp_path):
    folder = make_run(tmp_path / "run", make_steps(20, every=5, gpu=True))
    before = write_report([folder])
    (before.report.parent / "report-mine.png").write_bytes(b"a picture of mine")
    after = write_report([make_run(folder, make_steps(20, every=5))])
    gone = {png.name for png in before.pngs} - {png.name for png in after.pngs}
    assert gone == {"report-gpu_power.png", "report-gpu_memory.png", "report-gpu_utilisation.png"}
    assert {path.name for path in before.report.parent.iterdir()} == {
        "report-mine.png",
        *(path.name for path in (after.report, *after.pngs)),
    }


def test_a_report_is_overwritten_but_no_foreign_file(tmp_path):
    folder = make_run(tmp_path / "run", make_steps(3, every=0))
    first = write_report([folder])
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(RunFolderError, match="dpokit report did not write it"):
        write_report([folder], output=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    first.pngs[0].write_bytes(b"a picture of mine")
    with pytest.raises(RunFolderError, match="dpokit report did not write it"):
        write_report([folder])
    first.pngs[0].unlink()
    assert write_report([folder]).record() == first.record()


def test_a_disk_error_is_one_message(tmp_path):
    folder = make_run(tmp_path / "run", make_steps(3, every=0))
    (folder / "report").write_text("a file of somebody")
    with pytest.raises(RunFolderError, match="--output"):
        write_report([folder])
    assert (folder / "report").read_text() == "a file of somebody"


def make_three(tmp_path) -> list:
    rates = {"a": 1e-6, "b": 5e-7, "c": 2e-6}
    return [
        make_run(tmp_path / name, make_steps(20, every=5, seed=seed), settings={"learning_rate": rate})
        for (name, rate), seed in zip(rates.items(), (2, 0, 1), strict=True)
    ]


def test_several_runs_are_sorted_with_their_differing_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = make_three(tmp_path)
    written = write_report(folders)
    assert str(written.report) == "report.html"
    assert written.verdict.startswith("A (b) has the lowest eval_loss")
    runs = sort_runs(load_runs(folders), "eval_loss")
    table, shared = compare_runs(runs, "eval_loss")
    assert [row[:2] for row in table.rows] == [["A", "b"], ["B", "c"], ["C", "a"]]
    assert table.head[6:] == ["learning_rate"]
    assert [row[6] for row in table.rows] == ["5e-07", "2e-06", "1e-06"]
    assert "learning_rate" not in {row[0] for row in shared.rows}
    assert {"report-loss", "report-eval-loss", "report-rewards-chosen"} <= {png.stem for png in written.pngs}


def test_a_metric_sorts_in_its_own_direction(tmp_path):
    runs = load_runs(make_three(tmp_path))
    values = [run.best("eval_rewards/margins")[0] for run in sort_runs(runs, "eval_rewards/margins")]
    assert values == sorted(values, reverse=True)
    grads = [run.best("grad_norm")[0] for run in sort_runs(runs, "grad_norm")]
    assert grads == sorted(grads)


def test_runs_without_the_metric_are_named_in_the_error(tmp_path):
    folders = [make_run(tmp_path / "a", make_steps(5, every=1)), make_run(tmp_path / "b", make_steps(5, every=0))]
    with pytest.raises(SettingsError, match=r"--metric eval_loss: no value of it in b\n.*grad_norm.*\n.*--metric loss"):
        write_report(folders, output=tmp_path / "out.html")
    write_report(folders, output=tmp_path / "out.html", metric="loss")
    empty = make_run(tmp_path / "c", [])
    with pytest.raises(SettingsError, match="report these runs one by one"):
        write_report([*folders, empty], output=tmp_path / "out.html", metric="loss")
    with pytest.raises(SettingsError, match="no value of it in a"):
        write_report(folders[:1], metric="accuracy")


def test_a_repeated_run_counts_once_and_equal_names_get_paths(tmp_path):
    folders = [make_run(tmp_path / name / "run", make_steps(3, every=1)) for name in "xy"]
    link = tmp_path / "link"
    link.symlink_to(folders[0])
    assert [run.name for run in load_runs([folders[0], link])] == ["run"]
    assert [run.name for run in load_runs(folders)] == [str(folder) for folder in folders]


def test_an_interval_is_written_with_its_ends():
    assert interval(v(0.7)) == "0.7000 (0.6800\u00a0to\u00a00.7200)"
    assert interval(None) == "-"
    assert interval({"value": None}) == "NaN"
    assert interval(v(0.1) | {"p": 0.0004}).endswith("), p = 0.0004")
