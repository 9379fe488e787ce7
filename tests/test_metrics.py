"""The table of metrics: it has a row for each metric, and all outputs read it."""

import json

import pytest
from run_folders import make_run, make_steps

from dpokit import metrics
from dpokit.metrics import FIGURES, LOGGED, MEASURED, Metric, find_metric, is_lower_better
from dpokit.report.page import write_report
from dpokit.story import main
from dpokit.train.value_checks import check_metric


def test_each_metric_has_one_row():
    names = [metric.name for metric in LOGGED]
    assert len(names) == len(set(names))
    shown = {metric.figure for metric in LOGGED} - {""}
    assert [f"{key}: add its title to FIGURES in metrics.py" for key in sorted(shown - set(FIGURES))] == []
    assert [f"{key}: no row of LOGGED names this figure" for key in sorted(set(FIGURES) - shown)] == []
    assert all(metric.meaning.endswith(".") for metric in LOGGED)
    assert {metric.better for metric in LOGGED} <= {"up", "down", ""}


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_every_number_of_a_run_has_a_row(kind, tiny_gpt2, pairs_file, tmp_path, monkeypatch):
    """The failure names each logged metric without a row."""
    flags = [
        "--model_name_or_path",
        str(tiny_gpt2),
        "--dataset_name",
        str(pairs_file),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    flags += [
        "--eval_fraction",
        "0.2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--max_steps",
        "2",
        "--use_cpu",
    ]
    flags += ["--logging_steps", "1", "--save_steps", "1", "--report_to", "none", "--max_length", "64"]
    monkeypatch.setattr("sys.argv", ["recipe", *flags])
    main("recipe", {"kind": kind})
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {name for record in records for name in record} - {"step", "seconds"}
    missing = [f"{name}: add its row to LOGGED in metrics.py" for name in sorted(logged) if find_metric(name) is None]
    assert missing == []
    evaluated = {name.removeprefix("eval_") for name in logged if name.startswith("eval_")}
    assert evaluated <= set(metrics.list_evaluated(kind)), "check_metric would refuse these"


@pytest.mark.parametrize(
    ("name", "is_lower"),
    [
        ("loss", True),
        ("eval_loss", True),
        ("eval_rewards/margins", False),
        ("grad_norm", True),
        ("eval_runtime", True),
        ("eval_own_loss", True),
        ("own", False),
    ],
)
def test_better_is_known_for_metrics_of_other_libraries(name, is_lower):
    assert is_lower_better(name) is is_lower


def test_a_new_metric_needs_one_row(tmp_path, monkeypatch):
    """The row alone gives it a line in a figure, a column, and makes it a choice for the best checkpoint."""
    own = Metric("own/metric", "A metric of this test.", "down", ("dpo",), "loss", "own line", "own column")
    monkeypatch.setattr(metrics, "LOGGED", [*LOGGED, own])
    steps = [record | {"own/metric": 1.0, "eval_own/metric": 2.0} for record in make_steps(6, every=3)]
    page = write_report([make_run(tmp_path / "run", steps)]).report.read_text()
    assert "own line" in page
    assert "own column" in page
    check_metric("eval_own/metric", "dpo")
    assert is_lower_better("eval_own/metric")


def test_a_measure_is_shown_and_carried_to_the_card():
    assert set(metrics.list_results()) == {"accuracy", "margin", "loss", "kl_per_token"} <= set(MEASURED)
