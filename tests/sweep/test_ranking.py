"""The result of a search: the interval of a difference, and the sentence that follows from it."""

import json

import pytest
from conftest import ROOT
from run_folders import make_run, make_steps

from dpokit.sweep.ranking import Ranked, compare_best_two, find_interval, rank, write_outcome
from dpokit.sweep.space import load_space
from dpokit.sweep.study import SETTINGS, Search


def make(number: int, *values: float) -> Ranked:
    return Ranked(number, "finished", {"beta": 0.1}, list(values), [], None)


def test_the_interval_equals_welchs_by_hand():
    """Variances 1e-4 and 4e-4 of three values each: standard error 0.01291, 2.94 degrees of freedom, t 4.303."""
    low, high = find_interval([0.61, 0.62, 0.63], [0.64, 0.66, 0.68]) or (0, 0)
    assert (low, high) == pytest.approx((-0.04 - 4.303 * 0.0129099, -0.04 + 4.303 * 0.0129099), abs=1e-5)


@pytest.mark.parametrize(
    ("ranked", "sentence"),
    [
        ([], "No trial has finished."),
        ([make(3, 0.6)], "Trial 3 has the lowest eval_loss, 0.6; no other has finished."),
        ([make(3, 0.6), make(1, 0.7)], "the noise is unknown"),
        ([make(3, 0.61, 0.62, 0.63), make(1, 0.62, 0.63, 0.64)], "within noise"),
        ([make(3, 0.51, 0.52, 0.53), make(1, 0.62, 0.63, 0.64)], "beyond noise"),
        ([make(3, 0.5, 0.5), make(1, 0.6, 0.6)], "equal values, so the noise is unknown"),
        ([make(3, 0.5, 0.5), make(1, 0.6, 0.61)], "beyond noise"),
    ],
)
def test_the_sentence_compares_the_best_two_with_the_noise(ranked, sentence):
    assert sentence in compare_best_two(ranked, "eval_loss")


@pytest.mark.parametrize(
    ("metric", "verdict", "best"),
    [
        ("eval_loss", "Not ranked, because eval_loss of trials with different beta cannot be compared.", None),
        ("eval_rewards/accuracies", "Trial 1 has the highest eval_rewards/accuracies", "trial-1"),
    ],
)
def test_trials_with_different_losses_have_no_best_run(metric, verdict, best, tmp_path):
    path, folder = tmp_path / "space.yaml", tmp_path / "sweep"
    path.write_text(
        f"recipe: {ROOT / 'recipes' / 'dpo_gpt2.py'}\nsearch: random\ntrials: 2\nmetric: {metric}\n"
        "parameters: {beta: [0.1, 0.3]}"
    )
    space = load_space(path)
    search = Search(space, folder, storage=None, name="beta")
    for number, beta in enumerate((0.3, 0.1)):
        records = make_steps(2, every=1)
        for record in records:
            record |= {"eval_rewards/accuracies": 0.6 + number / 10, "eval_loss": 0.6 + number / 10}
        make_run(folder / f"trial-{number}", records, settings={"beta": beta})
        trial = search.study.ask()
        trial.set_user_attr(SETTINGS, {"beta": beta})
        search.study.tell(trial, 0.5)
    (folder / "best").symlink_to("trial-0")  # by an older version
    outcome = write_outcome(space, search)
    assert outcome["verdict"].startswith(verdict)
    assert (outcome["best"] and outcome["best"].rpartition("/")[2]) == best
    assert (folder / "best").is_symlink() is (best is not None)
    assert [trial.number for trial in rank(space, search)] == ([0, 1] if best is None else [1, 0])
    assert json.loads((folder / "sweep.json").read_text())["best"] == outcome["best"]
    page = (folder / "report" / "report.html").read_text()
    assert ("Not ranked, because eval_loss of these runs cannot be compared" in page) is (best is None)
