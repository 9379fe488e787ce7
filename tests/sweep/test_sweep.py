"""`dpokit sweep` as a process: whatever is killed, every trial is trained once and recorded."""

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


def wait_for(condition, seconds: float = 200):
    """Waits until `condition` returns a true value, and returns it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition stayed false"
        time.sleep(0.05)
    return value


def test_a_grid_is_ranked_reported_and_linked(tmp_path):
    sweeping = Sweeping(tmp_path, "parameters: {learning_rate: [1e-5, 2e-5, 5e-5, 1e-4], weight_decay: [0.0, 0.1]}")
    outcome = sweeping.finish("--jobs", "2")
    sweeping.check_whole(8)
    values = [trial["value"] for trial in outcome["trials"]]
    assert values == sorted(values)
    assert outcome["trials"][0]["settings"] == {"learning_rate": 2e-5, "weight_decay": 0.0}
    assert (sweeping.folder / "best").resolve().name == "trial-2"
    assert outcome["importances"]["learning_rate"] > outcome["importances"]["weight_decay"]
    page = (sweeping.folder / "report" / "report.html").read_text()
    assert all(f"trial-{number}" in page for number in range(8))
    assert "| 2 | 2e-05 | 0 | 0.2250 | finished |" in (sweeping.folder / "README.md").read_text()
    starts = len(sweeping.starts())
    assert sweeping.finish()["trials"] == outcome["trials"]  # shown again, nothing is trained
    assert len(sweeping.starts()) == starts


def test_trials_share_tokens_and_reference_log_probs(tiny_gpt2, tmp_path):
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
    assert [trial["state"] for trial in outcome["trials"]] == ["finished"] * 4
    assert outcome["metric"] == "eval_rewards/accuracies"  # as losses with different beta cannot be compared
    logs = [run.path.with_suffix(".log").read_text() for run in sweeping.runs()]
    assert ["pairs were cached" in log for log in logs] == [False, True, True, True]
    # One file for the training pairs, one for the held-out pairs.
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    assert ["tokenising" in log and "rows/s" in log for log in logs] == [True, False, False, False]


@pytest.mark.long
def test_failed_trials_are_recorded_and_the_others_finish(tmp_path):
    tags = ["nan", "crash", "early", "mistake", "hang", "slow", "none"]
    listed = "".join(f"\n  - {{learning_rate: 1e-5, run_tags: [{tag}]}}" for tag in tags)
    sweeping = Sweeping(tmp_path, f"search: listed\nconfigurations:{listed}")
    outcome = sweeping.finish("--jobs", "2", "--trial-timeout", "30")
    trials = {trial["settings"]["run_tags"][0]: trial for trial in outcome["trials"]}
    assert trials["slow"]["state"] == "finished"
    failures = {"nan": "without a finite eval_loss", "crash": "it broke", "early": "it broke"}
    failures |= {"mistake": "this cannot be", "hang": "wrote nothing for 30 s"}
    for tag, message in failures.items():
        assert trials[tag]["state"] == "failed"
        assert message in trials[tag]["why"]
        assert "trial-" in trials[tag]["why"].partition("log: ")[2]
    assert "trial-1" in Path(outcome["report"]).read_text()  # its curve up to the crash
    assert not any(TrialRun(0, {}, run).processes() for run in sweeping.runs())


def test_a_killed_search_repeats_and_loses_no_trial(tmp_path):
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
    # The runs of a killed search continue, and the next search watches them: no run started twice.
    assert sorted(start["run"] for start in sweeping.starts()) == [f"trial-{number}" for number in range(4)]


def test_a_killed_trial_resumes_from_its_checkpoint(tmp_path):
    sweeping = Sweeping(tmp_path, f"settings: {{run_tags: [slow], max_steps: 30}}\n{GRID}")
    process = sweeping.begin("--jobs", "2")
    for number in (0, 2):
        run = TrialRun(0, {}, wait_for(lambda number=number: len(sweeping.runs()) > number and sweeping.runs()[number]))
        wait_for(run.run.checkpoints)
        os.kill(run.processes()[0 if number else -1].pid, signal.SIGKILL)  # once the launcher, once its child
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr[-3000:]
    sweeping.check_whole(4, steps=30)
    assert len([start for start in sweeping.starts() if start["from"] > 0]) == 2


def test_an_interrupted_trial_is_saved_and_resumed(tmp_path):
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


def test_an_interrupt_during_a_launch_loses_nothing(tmp_path):
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


def test_two_workers_share_a_storage(tmp_path):
    sweeping = Sweeping(tmp_path, GRID)
    storage = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    both = [sweeping.begin("--storage", storage) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate(timeout=400)
        assert process.returncode == 0, stderr[-3000:]
    sweeping.check_whole(4)
    assert len(sweeping.starts()) == 4


def test_seeds_estimate_noise_and_the_middle_run_is_linked(tmp_path):
    sweeping = Sweeping(tmp_path, "seeds: 3\nparameters: {learning_rate: [2e-5, 1e-4]}")
    outcome = sweeping.finish("--jobs", "2")
    assert "By their 3 seeds" in outcome["verdict"]
    assert "beyond noise" in outcome["verdict"]
    first = outcome["trials"][0]
    assert [len(trial["values"]) for trial in outcome["trials"]] == [3, 3]
    assert first["value"] == pytest.approx(sum(first["values"]) / 3)
    assert outcome["best"].endswith("trial-0-seed-43") or outcome["best"].endswith("trial-0-seed-44")


def test_a_bad_trial_is_pruned(tmp_path):
    good = "".join(f"\n  - {{learning_rate: {rate}}}" for rate in (2e-5, 3e-5, 4e-5, 5e-5))
    bad = "\n  - {learning_rate: 1e-2, run_tags: [slow], max_steps: 40}"
    sweeping = Sweeping(tmp_path, f"prune: true\nsearch: listed\nconfigurations:{good}{bad}")
    outcome = sweeping.finish()
    last = outcome["trials"][-1]
    assert (last["state"], last["settings"]["learning_rate"]) == ("pruned", 1e-2)
    assert sweeping.runs()[-1].read_run()["why"].startswith("pruned")
    assert len(sweeping.runs()[-1].metrics_jsonl.read_text().splitlines()) < 40


def test_a_misspelt_metric_can_be_corrected(tmp_path):
    sweeping = Sweeping(tmp_path, "metric: eval_los\nparameters: {learning_rate: [1e-5, 2e-5]}")
    _, stderr = sweeping.begin().communicate(timeout=200)
    assert "has no eval_los: nothing to rank trials by" in stderr
    assert "expected:  one of: eval_loss" in stderr
    assert "Traceback" not in stderr
    sweeping.space.write_text(sweeping.space.read_text().replace("eval_los\n", "eval_loss\n"))
    sweeping.finish()
    sweeping.check_whole(2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jobs", "0"], "--jobs is 0"),
        (["--trial-timeout", "-1"], "--trial-timeout is -1"),
        (["--watch"], "holds no search"),
        (["--slurm"], "names no placement, and a job needs one"),
    ],
)
def test_an_invalid_command_prints_one_message(flags, message, tmp_path):
    process = Sweeping(tmp_path, GRID).begin(*flags)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 2
    assert message in stderr
    assert "Traceback" not in stderr
