"""Which runs a report ranks, and what it says of runs whose values cannot be compared."""

import json

import pytest
from run_folders import DATA, make_run, make_steps

from dpokit.metrics import find_needs
from dpokit.report.comparison import build_comparison, find_obstacles
from dpokit.report.page import write_report
from dpokit.report.read import load_runs
from dpokit.settings.flag_facts import Fact, flags_with

MARGIN, ACCURACY = "eval_rewards/margins", "eval_rewards/accuracies"
METRICS = ("eval_loss", MARGIN, ACCURACY, "loss", "tokens_per_second")
LOSS, ALL_BUT_SPEED = {"eval_loss", "loss"}, {"eval_loss", MARGIN, ACCURACY, "loss"}


def split(fingerprint, **more) -> dict:
    return {"source": "split test", "kept": 300, "fingerprint": fingerprint} | more


# Of the second run: its settings and its data.json; then the metrics that cannot be compared with the first run's.
CASES = {
    "equal": ({}, {}, set()),
    "another rate and seed": ({"learning_rate": 1e-3, "seed": 7}, {}, set()),
    "beta": ({"beta": 0.3}, {}, LOSS | {MARGIN}),
    "loss type": ({"loss_type": ["hinge"]}, {}, LOSS),
    "label smoothing": ({"label_smoothing": 0.2}, {}, LOSS),
    "weights that are the default": ({"loss_weights": [1.0]}, {}, set()),
    "weights of the loss": ({"loss_weights": [0.5]}, {}, LOSS),
    "another kind": ({"kind": "sft"}, {}, LOSS),
    "other held-out pairs": ({}, {"eval": split("e2")}, {"eval_loss", MARGIN, ACCURACY}),
    "other training pairs": ({}, {"train": split("t2")}, {"loss"}),
    "other names of the same pairs": ({"dataset_name": "/copy", "dataset_test_split": "x"}, {}, set()),
    "another base with the same tokens": ({"model_name_or_path": "gpt2-medium"}, {}, set()),
}
OLD_CASES = {
    "equal": ({}, {}, set()),
    "one fingerprint of all": ({"max_length": 128}, {"fingerprint": "all"}, set()),
    "a length limit": ({"max_length": 128}, {}, ALL_BUT_SPEED),
    "another data set": ({"dataset_name": "mine"}, {}, ALL_BUT_SPEED),
    "more training rows": ({"max_train_samples": 9}, {}, {"loss"}),
    "more training rows, held out of them": ({"max_train_samples": 9, "eval_fraction": 0.1}, {}, ALL_BUT_SPEED),
    "other pairs by the same flags": ({}, {"fingerprint": "other"}, ALL_BUT_SPEED),
    "other training rows in the fingerprint": ({"max_train_samples": 9}, {"fingerprint": "other"}, {"loss"}),
    "another number of pairs": ({}, {"eval": DATA["eval"] | {"kept": 299}}, {"eval_loss", MARGIN, ACCURACY}),
}
FIRST = {"kind": "dpo", "loss_weights": None, "label_smoothing": 0.0, "max_length": 64, "eval_fraction": None}
FIRST |= {"max_train_samples": 5}


def make_two(folder, settings, data, shared_data):
    folders = [make_run(folder / name, make_steps(2, every=1), settings=FIRST) for name in "ab"]
    folders[1] = make_run(folder / "b", make_steps(2, every=1, seed=1), settings=FIRST | settings)
    both = {"fingerprint": "all"} if "fingerprint" in data else {}
    for path, more in zip(folders, (both, data), strict=True):
        (path / "data.json").write_text(json.dumps(DATA | shared_data | more))
    return folders


@pytest.mark.parametrize("case", CASES)
def test_only_comparable_values_are_ranked(case, tmp_path):
    settings, data, expected = CASES[case]
    both = {"train": split("t1"), "eval": split("e1"), "fingerprint": "of both"}
    runs = load_runs(make_two(tmp_path, settings, data | ({"fingerprint": "other"} if data else {}), both))
    assert {metric for metric in METRICS if find_obstacles(runs, metric)} == expected
    assert {metric for metric in METRICS if find_obstacles(runs[::-1], metric)} == expected


@pytest.mark.parametrize("case", OLD_CASES)
def test_runs_of_older_versions_are_compared_by_settings(case, tmp_path):
    settings, data, expected = OLD_CASES[case]
    runs = load_runs(make_two(tmp_path, settings, data, {}))
    assert {metric for metric in METRICS if find_obstacles(runs, metric)} == expected


def test_a_fingerprint_without_held_out_pairs_does_not_differ(tmp_path):
    """Of a run that does not evaluate, it is that of the training pairs alone."""
    folders = make_two(tmp_path, {}, {"fingerprint": "other", "eval": None}, {})
    assert find_obstacles(load_runs(folders), "loss") == []


def test_a_setting_that_an_older_run_lacks_does_not_differ(tmp_path):
    folders = make_two(tmp_path, {"ld_alpha": 0.5, "beta": 0.1}, {}, {})
    assert find_obstacles(load_runs(folders), "eval_loss") == []


def test_a_sentence_says_what_differs_and_nothing_is_ranked(tmp_path):
    folders = make_two(tmp_path, {"beta": 0.3, "loss_type": ["hinge"]}, {}, {})
    written = write_report(folders[::-1], output=tmp_path / "page.html")
    assert written.verdict == (
        "Not ranked, because eval_loss of these runs cannot be compared: they differ in beta (A: 0.3; B: 0.1) and in "
        'loss_type (A: ["hinge"]; B: ["sigmoid"]). '
        "Their eval_rewards/accuracies can be: "
        "--metric eval_rewards/accuracies."
    )
    page = written.report.read_text()
    assert "In the order of the command." in page
    assert "Sorted by" not in page
    assert 'class="marked"' not in page
    accuracy = write_report(folders, output=tmp_path / "page.html", metric=ACCURACY)
    assert accuracy.verdict.startswith("A (")
    assert "Sorted by eval_rewards/accuracies." in accuracy.report.read_text()


def test_many_groups_and_several_obstacles_are_listed(tmp_path):
    folders = [make_run(tmp_path / str(n), make_steps(1, every=1), settings={"beta": n / 10}) for n in range(1, 8)]
    for number, folder in enumerate(folders):
        (folder / "data.json").write_text(json.dumps(DATA | {"eval": split(f"e{number // 6}", kept=300 + number // 6)}))
    runs = load_runs(folders)
    text = build_comparison(runs, "eval_loss", find_obstacles(runs, "eval_loss"))
    assert "the held-out pairs (A, B, C, D, E, F: 300 pairs of split test, e0; G: 301 pairs of split test, e1)" in text
    assert "and in beta (A: 0.1; B: 0.2; C: 0.3; D: 0.4; and 3 more)." in text
    assert "can be: --metric" not in text  # accuracies are of different pairs, too


def test_equal_best_values_have_no_winner(tmp_path):
    runs = load_runs([make_run(tmp_path / name, make_steps(2, every=1)) for name in "ab"])
    assert build_comparison(runs, "eval_loss", []).startswith("2 of 2 runs share the lowest eval_loss")


def test_runs_of_different_bases_are_ranked_with_a_remark(tmp_path):
    runs = load_runs(make_two(tmp_path, {"model_name_or_path": "m"}, {}, {"eval": split("e1")}))
    assert "Each is measured against its own base." in build_comparison(runs, "eval_loss", [])
    assert "own base" not in build_comparison(runs, "grad_norm", [])


def test_the_table_of_metrics_and_flags_says_what_a_loss_needs():
    assert {find_needs(name) for name in ("eval_loss", "loss", "a number of another library")} == {"loss"}
    assert {"beta", "loss_type", "loss_weights", "kind"} <= set(flags_with(Fact.LOSS))
