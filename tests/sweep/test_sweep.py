"""`dpokit sweep` whole, in processes of its own: whatever ends, every trial is trained once and settled."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_pairs
from sweeping import Sweeping

from dpokit.sweep.trial import TrialRun

pytestmark = pytest.mark.slow
GRID = "parameters: {learning_rate: [1e-5, 2e-5, 5e-5, 1e-4]}"


def wait_for(found, seconds: float = 200):
    """What `found` returns once it is true."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return answer


def test_a_grid_is_ranked_reported_and_linked(tmp_path):
    sweeping = Sweeping(tmp_path, "parameters: {learning_rate: [1e-5, 2e-5, 5e-5, 1e-4], weight_decay: [0.0, 0.1]}")
    outcome = sweeping.finish("--jobs", "2")
    sweeping.check_whole(8)
    values = [one["value"] for one in outcome["trials"]]
    assert values == sorted(values)
    assert outcome["trials"][0]["settings"] == {"learning_rate": 2e-5, "weight_decay": 0.0}
    assert (sweeping.folder / "best").resolve().name == "trial-2"
    assert outcome["importances"]["learning_rate"] > outcome["importances"]["weight_decay"]
    page = (sweeping.folder / "report" / "report.html").read_text()
    assert all(f"trial-{number}" in page for number in range(8))
    assert "| 2 | 2e-05 | 0 | 0.2250 | finished |" in (sweeping.folder / "README.md").read_text()
    starts = len(sweeping.starts())
    assert sweeping.finish()["trials"] == outcome["trials"]  # shown once more, nothing is trained
    assert len(sweeping.starts()) == starts


def test_trials_over_the_same_data_tokenise_and_compute_the_reference_once(tiny_gpt2, tmp_path):
    settings = {
        "model_name_or_path": str(tiny_gpt2),
        "dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 40)),
        "eval_fraction": 0.2,
        "max_length": 96,
        "num_train_epochs": 1,
        "report_to": "none",
    }
    text = f"settings: {json.dumps(settings)}\nparameters: {{learning_rate: [1e-5, 1e-4], beta: [0.1, 0.5]}}"
    caches = {"DPOKIT_CACHE": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    sweeping = Sweeping(tmp_path, text, recipe=ROOT / "recipes" / "dpo_gpt2.py", **caches)
    outcome = sweeping.finish("--jobs", "2")
    assert [one["state"] for one in outcome["trials"]] == ["finished"] * 4
    logs = [run.path.with_suffix(".log").read_text() for run in sweeping.runs()]
    assert ["pairs were cached" in log for log in logs] == [False, True, True, True]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2  # training and held-out pairs, a part each
    assert ["tokenising" in log and "rows/s" in log for log in logs] == [True, False, False, False]


@pytest.mark.long
def test_a_crash_a_mistake_and_a_hang_are_recorded_and_the_rest_goes_on(tmp_path):
    tags = ["nan", "crash", "early", "mistake", "hang", "slow", "none"]
    listed = "".join(f"\n  - {{learning_rate: 1e-5, run_tags: [{tag}]}}" for tag in tags)
    sweeping = Sweeping(tmp_path, f"search: listed\nconfigurations:{listed}")
    outcome = sweeping.finish("--jobs", "2", "--trial-timeout", "30")
    trials = {one["settings"]["run_tags"][0]: one for one in outcome["trials"]}
    assert trials["slow"]["state"] == "finished"
    failures = {"nan": "without a finite eval_loss", "crash": "it broke", "early": "it broke"}
    failures |= {"mistake": "this cannot be", "hang": "wrote nothing for 30 s"}
    for tag, words in failures.items():
        assert trials[tag]["state"] == "failed"
        assert words in trials[tag]["why"]
        assert "trial-" in trials[tag]["why"].partition("log: ")[2]
    assert "trial-1" in Path(outcome["report"]).read_text()  # its curve goes as far as it came
    assert not any(TrialRun(0, {}, run).processes() for run in sweeping.runs())


def test_a_search_that_is_killed_goes_on_without_repeating_or_losing_a_trial(tmp_path):
    sweeping = Sweeping(tmp_path, GRID)
    chance = random.Random(3)
    for _ in range(2):
        before = len(sweeping.starts())
        process = sweeping.begin("--jobs", "2")
        wait_for(lambda before=before: len(sweeping.starts()) > before)
        time.sleep(chance.random() * 2)
        process.kill()
        process.communicate()
    sweeping.finish("--jobs", "2")
    sweeping.check_whole(4)
    # The trials of a killed search live on and are watched again: none was begun twice.
    assert sorted(start["run"] for start in sweeping.starts()) == [f"trial-{number}" for number in range(4)]


def test_a_trial_that_is_killed_goes_on_from_its_checkpoint(tmp_path):
    sweeping = Sweeping(tmp_path, f"settings: {{run_tags: [slow], max_steps: 30}}\n{GRID}")
    process = sweeping.begin("--jobs", "2")
    for number in (0, 2):
        run = TrialRun(0, {}, wait_for(lambda number=number: len(sweeping.runs()) > number and sweeping.runs()[number]))
        wait_for(run.run.checkpoints)
        os.kill(run.processes()[0 if number else -1].pid, signal.SIGKILL)  # once the launcher, once what it launched
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr[-3000:]
    sweeping.check_whole(4, steps=30)
    assert len([start for start in sweeping.starts() if start["from"] > 0]) == 2


def test_who_leaves_has_the_trial_saved_and_comes_back_to_it(tmp_path):
    text = "settings: {run_tags: [slow], max_steps: 20}\nparameters: {learning_rate: [1e-5, 2e-5]}"
    sweeping = Sweeping(tmp_path, text)
    process = sweeping.begin()
    wait_for(lambda: sweeping.runs() and sweeping.runs()[0].checkpoints())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 75, stderr[-3000:]
    assert "save and end" in stderr
    assert [run.read_run()["state"] for run in sweeping.runs()] == ["preempted"]
    sweeping.finish()
    sweeping.check_whole(2, steps=20)
    assert sweeping.starts()[1]["from"] > 0


def test_who_leaves_while_a_trial_is_launched_loses_nothing(tmp_path):
    text = "settings: {run_tags: [slow], max_steps: 30}\nparameters: {learning_rate: [1e-5, 2e-5]}"
    sweeping = Sweeping(tmp_path, text)
    process = sweeping.begin()
    wait_for((sweeping.folder / "trial-0.log").is_file)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 75, stderr[-3000:]
    assert all(run.read_run()["state"] != "finished" for run in sweeping.runs() if run.run_json.is_file())
    sweeping.finish()
    sweeping.check_whole(2, steps=30)


def test_two_workers_share_one_storage(tmp_path):
    sweeping = Sweeping(tmp_path, GRID)
    storage = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    both = [sweeping.begin("--storage", storage) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr[-3000:]
    sweeping.check_whole(4)
    assert len(sweeping.starts()) == 4


def test_seeds_tell_noise_and_the_middle_one_is_linked(tmp_path):
    sweeping = Sweeping(tmp_path, "seeds: 3\nparameters: {learning_rate: [2e-5, 1e-4]}")
    outcome = sweeping.finish("--jobs", "2")
    assert "By their 3 seeds" in outcome["verdict"]
    assert "beyond noise" in outcome["verdict"]
    first = outcome["trials"][0]
    assert [len(one["values"]) for one in outcome["trials"]] == [3, 3]
    assert first["value"] == pytest.approx(sum(first["values"]) / 3)
    assert outcome["best"].endswith("trial-0-seed-43") or outcome["best"].endswith("trial-0-seed-44")


def test_a_hopeless_trial_is_pruned(tmp_path):
    good = "".join(f"\n  - {{learning_rate: {rate}}}" for rate in (2e-5, 3e-5, 4e-5, 5e-5))
    bad = "\n  - {learning_rate: 1e-2, run_tags: [slow], max_steps: 40}"
    sweeping = Sweeping(tmp_path, f"prune: true\nsearch: listed\nconfigurations:{good}{bad}")
    outcome = sweeping.finish()
    last = outcome["trials"][-1]
    assert (last["state"], last["settings"]["learning_rate"]) == ("pruned", 1e-2)
    assert sweeping.runs()[-1].read_run()["why"].startswith("pruned")
    assert len(sweeping.runs()[-1].metrics_jsonl.read_text().splitlines()) < 40


def test_a_metric_that_no_trial_reports_is_one_message_and_the_corrected_search_goes_on(tmp_path):
    sweeping = Sweeping(tmp_path, "metric: eval_los\nparameters: {learning_rate: [1e-5, 2e-5]}")
    _, stderr = sweeping.begin().communicate(timeout=200)
    assert "has no eval_los: nothing to rank trials by" in stderr
    assert "expected:  one of: eval_loss" in stderr
    assert "Traceback" not in stderr
    sweeping.space.write_text(sweeping.space.read_text().replace("eval_los\n", "eval_loss\n"))
    sweeping.finish()
    sweeping.check_whole(2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--jobs", "0"], "--jobs is 0"),
        (["--trial-timeout", "-1"], "--trial-timeout is -1"),
        (["--watch"], "holds no search"),
        (["--slurm"], "names no placement, and a job needs one"),
    ],
)
def test_a_command_that_cannot_be_is_one_message(flags, words, tmp_path):
    process = Sweeping(tmp_path, GRID).begin(*flags)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 2
    assert words in stderr
    assert "Traceback" not in stderr
