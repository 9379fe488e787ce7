"""tests/benchmarks: every benchmark runs in its quick form, and docs/benchmarks.md is what its records give."""

import dataclasses
import json
import re
import shlex
from datetime import date

import pytest
from benchmarks import benchmark, run
from benchmarks.benchmark import (
    Benchmark,
    build_page,
    build_table,
    compare,
    read_record,
    show,
    take_medians,
    write_record,
)
from chromium import skip_without_chromium
from documentation import list_commands

RECORDED = [name for name in run.NAMES if read_record(name)]


def check_steps(rows):
    losses = {row["case"]: row["numbers"] for row in rows}
    assert all(len(values) == 2 for values in losses.values())
    assert losses["TRL, live reference"][0] == pytest.approx(0.693, abs=1e-3)  # ln 2
    assert all(row["difference"] < (1e-2 if "bf16" in row["case"] else 1e-4) for row in rows[1:])


def check_evaluation(rows):
    assert [row["pairs"] for row in rows] == [12, 12]
    assert rows[1]["difference"] < 1e-4


def check_merge(rows):
    drift = {row["case"]: row.get("mean_drift") for row in rows}
    assert 0 < drift["LoRA, fp32"] < 1e-4
    assert drift["LoRA, bf16, not scored"] is None


def check_serve(rows):
    token, users = rows
    assert 0 < token["median"] == token["worst"]
    assert users["answers"] > 0 and users["errors"] == 0


def check_sweep(rows):
    assert [(row["runs"], row["computed"]) for row in rows] == [(2, 1)]


def check_rounding(rows):
    for row in rows:
        assert row["alarms"] == "0 of 1"
        faults, tried = row["faults"].split(" of ")
        assert int(faults) > 0 and int(tried) >= 14


def check_answers(rows):
    assert [row["tokens"] for row in rows] == sorted(row["tokens"] for row in rows)
    assert all(row["tokens"] > 1 and row["ratio"] > 0 for row in rows)


CHECKS = {
    "answers": check_answers,
    "balance": lambda rows: rows[0]["tokens"] == pytest.approx(rows[1]["tokens"], rel=0.1),
    "preparation": lambda rows: len({row["kept"] for row in rows}) == 1,
    "recover": lambda rows: rows[0]["skip_seconds"] > 0,
    "stall": lambda rows: all(row["gib"] > 0 for row in rows),
    "startup": lambda rows: all(row["seconds"] > 0 for row in rows),
    "threads": lambda rows: all(row["seconds"] > 0 for row in rows),
    "steps": check_steps,
    "evaluate": check_evaluation,
    "merge": check_merge,
    "serve": check_serve,
    "sweep": check_sweep,
    "rounding": check_rounding,
}


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", run.MEASURED)
def test_a_benchmark_runs_in_its_quick_form(name, tmp_path, capsys):
    if name == "serve":
        skip_without_chromium()
    file = tmp_path / "measured.json"
    assert run.main([name, "--quick", "--json", str(file)]) == 0, capsys.readouterr().err
    measurement = json.loads(file.read_text())[name]
    declared = run.load_benchmark(name)
    assert measurement["failed"] == {}
    assert {row["case"] for row in measurement["rows"]} <= set(declared.cases.values())
    assert len(build_table(declared, measurement["rows"]).splitlines()[0].split("|")) >= 3
    assert CHECKS[name](measurement["rows"]) in (None, True)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_a_case_that_fails_is_named_and_others_go_on(tmp_path, capsys):
    file = tmp_path / "measured.json"
    short = ["--steps", "1", "--pairs", "2", "--cases", "live"]
    assert run.main(["steps", "--quick", *short, "--max_length", "-1", "512", "--json", str(file)]) == 1
    measurement = json.loads(file.read_text())["steps"]
    assert [row["max_length"] for row in measurement["rows"]] == [512]
    assert list(measurement["failed"]) == ["dpokit, live reference, tiny, -1"]
    assert "failed: steps: dpokit, live reference, tiny, -1" in capsys.readouterr().err


def measure(*rows, day="2026-01-01"):
    """A measurement of case, size and seconds."""
    numbers = [{"case": case, "size": size, "seconds": seconds} for case, size, seconds in rows]
    return {"date": day, "machine": "no GPU", "command": f"measure on {day}", "versions": {}, "rows": numbers}


DECLARED = Benchmark(
    title="Speed",
    about="",
    columns={"case": ("case", ""), "seconds": ("s", ".1f"), "relative": ("relative", ".1f"), "kept": ("kept", "")},
    cases={"old": "the old way", "new": "the new way"},
    axes={"size": [1, 2]},
    baseline="old",
)


@pytest.mark.parametrize(("speed", "ratio"), [(True, 4.0), (False, 0.25)])
def test_a_case_is_compared_with_the_baseline_of_its_size(speed, ratio):
    rows = measure(("the old way", 1, 2.0), ("the old way", 2, 8.0), ("the new way", 2, 2.0))["rows"]
    rows[1]["numbers"], rows[2]["numbers"] = [0.5, 200.0], [0.5, 201.0]
    compare(dataclasses.replace(DECLARED, speed=speed), rows)
    assert [row["relative"] for row in rows] == [1.0, 1.0, ratio]
    assert rows[2]["difference"] == pytest.approx(1 / 200)


def test_the_median_of_the_rounds_counts():
    rounds = [{"case": "a", "seconds": value, "losses": [value]} for value in (3.0, 1.0, 2.0)]
    assert take_medians(rounds) == {"case": "a", "seconds": 2.0, "losses": [2.0]}


@pytest.mark.parametrize(
    ("value", "style", "cell"),
    [(1e-5, ".0e", "1e-5"), (12.0, "#.2g", "12"), (1.0, "#.2g", "1.0"), (0.79, ".0%", "79 %"), (None, ".1f", "")],
)
def test_a_cell_has_a_plain_number(value, style, cell):
    assert show(value, style) == cell


def test_a_new_measurement_replaces_older_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "RECORDS", tmp_path / "records")
    old = measure(("the old way", 1, 4.0), ("the new way", 1, 3.0)) | {"findings": "The new way is slow."}
    write_record("speed", DECLARED, old)
    write_record("speed", DECLARED, measure(("the new way", 1, 1.5), day="2026-02-02") | {"failed": {}})
    first, second = read_record("speed")
    assert [row["case"] for row in first["rows"]] == ["the old way"]
    assert "findings" not in first and "failed" not in second
    assert "The new way is slow." in capsys.readouterr().err
    page = build_page(
        {"speed": DECLARED, "later": dataclasses.replace(DECLARED, title="Later", command="measure later")}
    )
    assert "| the new way | 1.5 |\n\n2026-02-02, no GPU." in page
    assert "3.0" not in page
    assert page.endswith("## Not measured yet\n\n- Later: `measure later`\n")


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_the_documentation_gets_a_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(benchmark, "KEEP_MEMORY", {})  # so that its processes are warm
    assert run.main(["startup", "--cases", "help", "--rounds", "1", "--write-docs"]) == 0
    (measurement,) = read_record("startup")
    assert measurement["command"] == "python tests/benchmarks/run.py startup --cases help --rounds 1"
    assert measurement["date"] == date.today().isoformat()
    assert f"| `dpokit --help` | {show(measurement['rows'][0]['seconds'], '#.2g')} |" in run.PAGE.read_text()


def test_quick_numbers_are_not_documented(capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(["stall", "--quick", "--write-docs"])
    assert ended.value.code == 2
    assert "omit it, or --write-docs" in capsys.readouterr().err


def test_the_page_is_written_from_the_records():
    page = build_page({name: run.load_benchmark(name) for name in run.NAMES})
    assert page == benchmark.PAGE.read_text(), "run: python tests/benchmarks/run.py page"


@pytest.mark.parametrize("name", RECORDED)
def test_a_record_has_date_machine_command_and_versions(name):
    declared = run.load_benchmark(name)
    for measurement in read_record(name):
        assert date.fromisoformat(measurement["date"])
        assert re.search(r"GPU", measurement["machine"])
        assert "torch" in measurement["versions"]
        assert measurement["command"].startswith(("python tests/", "dpokit ", "bash "))
        assert measurement["rows"]
        titles = {row["case"] for row in measurement["rows"]}
        assert not declared.cases or titles <= set(declared.cases.values())
        keys = {key for row in measurement["rows"] for key in row}
        assert keys - {"case", "numbers"} <= declared.columns.keys()


def test_every_record_belongs_to_a_benchmark():
    assert {path.stem for path in benchmark.RECORDS.glob("*")} <= set(run.NAMES)


@pytest.mark.parametrize("command", list_commands("python tests/benchmarks/run.py"))
def test_a_documented_command_of_a_benchmark_is_valid(command):
    argv = shlex.split(command, comments=True)[2:]
    run.build_parser(argv[0]).parse_args(argv)
