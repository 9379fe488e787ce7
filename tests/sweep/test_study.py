"""The study of a search: every trial is taken once, also when workers die, and a resume draws the same trials."""

import os
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from optuna.trial import TrialState

from dpokit.atomic_files import write_json
from dpokit.errors import MachineError, SettingsError
from dpokit.rundir import RunDir
from dpokit.sweep.command import _check_same_mode, run_sweep
from dpokit.sweep.space import load_space
from dpokit.sweep.study import SETTINGS, Search, find_start

STAND_IN = Path(__file__).parent / "stand_in_recipe.py"
GRID = "parameters: {learning_rate: [1e-5, 2e-5], beta: [0.1, 0.2]}"
DRAWN = "trials: 6\nparameters: {learning_rate: {low: 1e-6, high: 1e-4, log: true}, loss_type: [[sigmoid, sft], [ipo]]}"


@pytest.fixture
def open_search(tmp_path):
    def open_space(text: str, storage: str | None = None) -> Search:
        path = tmp_path / "space.yaml"
        path.write_text(f"recipe: {STAND_IN}\n{text}")
        return Search(load_space(path), tmp_path / "sweep", storage=storage, name="sweep")

    return open_space


def test_two_workers_take_each_configuration_once(open_search):
    workers = [open_search(GRID), open_search(GRID)]
    trials = [workers[turn % 2].take() for turn in range(4)]
    assert [worker.take() for worker in workers] == [None, None]
    assert sorted(trial.number for trial in trials) == [0, 1, 2, 3]
    assert len({str(trial.user_attrs[SETTINGS]) for trial in trials}) == 4


def test_no_more_than_the_given_number_of_trials_is_drawn(open_search):
    workers = [open_search(f"search: random\n{DRAWN}"), open_search(f"search: random\n{DRAWN}")]
    trials = [workers[turn % 2].take() for turn in range(8)]
    assert sum(trial is not None for trial in trials) == 6


def take_and_die(folder: Path) -> int:
    """Lets a worker take a trial and die; returns the trial's number."""
    code = f"""
import os
from pathlib import Path
from dpokit.sweep.space import load_space
from dpokit.sweep.study import Search
space = load_space(Path({str(folder / "space.yaml")!r}))
print(Search(space, Path({str(folder / "sweep")!r}), storage=None, name="sweep").take().number, flush=True)
os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[-1])


def test_the_trial_of_a_dead_worker_is_taken_again(open_search, tmp_path):
    first = open_search(GRID)
    lost = take_and_die(tmp_path)
    assert first.look_up(lost).state == TrialState.RUNNING
    again = first.take()
    assert again.number == lost
    assert again.user_attrs[SETTINGS] == first.space.configurations[lost]
    assert first.take().number != lost


@pytest.mark.parametrize("search", ["tpe", "random"])
def test_a_resumed_search_draws_the_same_trials(search, open_search, tmp_path):
    text = f"search: {search}\n{DRAWN}".replace("trials: 6", "trials: 14")

    def draw(number: int, *, fresh: bool) -> list[dict]:
        drawn, current = [], open_search(text)
        for _ in range(number):
            current = open_search(text) if fresh else current
            trial = current.take()
            drawn.append(trial.user_attrs[SETTINGS])
            current.tell(trial.number, TrialState.COMPLETE, trial.user_attrs[SETTINGS]["learning_rate"])
        return drawn

    whole = draw(14, fresh=False)
    (tmp_path / "sweep").rename(tmp_path / "whole")
    assert draw(14, fresh=True) == whole
    assert len({settings["learning_rate"] for settings in whole}) == 14
    assert {str(settings["loss_type"]) for settings in whole} == {"['sigmoid', 'sft']", "['ipo']"}


def test_another_space_is_refused_and_more_trials_are_not(open_search):
    text = f"search: random\n{DRAWN}"
    open_search(text)
    open_search(text.replace("trials: 6", "trials: 7"))
    with pytest.raises(SettingsError, match="was started with another space: search was random, now tpe"):
        open_search(f"search: tpe\n{DRAWN}")


def fail(search: Search, **record: object) -> None:
    """Takes a trial, and records its run as failed."""
    trial = search.take()
    folder = search.folder / f"trial-{trial.number}"
    RunDir(folder).make()
    RunDir(folder).write_run(state="failed", **record)
    search.tell(trial.number, TrialState.FAIL, why="DataError: there is no such file")


def test_a_corrected_space_starts_again_if_no_trial_took_a_step(open_search, capfd):
    wrong, right = (f"settings: {{dataset_name: {name}}}\n{GRID}" for name in ("parris.jsonl", "pairs.jsonl"))
    fail(open_search(wrong))
    search = open_search(right)
    assert "no trial of the search in" in capfd.readouterr().err
    assert [trial.state for trial in search.trials()] == [TrialState.WAITING] * 4
    fail(search)
    open_search(right)  # the data was put in its place
    fail(search, shared_prefix="on")
    with pytest.raises(SettingsError, match="was started with another space"):
        open_search(wrong)


@pytest.mark.parametrize("state", ["alive", "between two trials", "queued", "pruned", "only watched"])
def test_a_search_in_use_is_not_started_again(state, open_search, tmp_path):
    search = open_search(GRID)
    fail(search)
    if state == "between two trials":
        search.leave()
        worker = f"{socket.gethostname()}:{os.getppid()}:{find_start(os.getppid())}"
        write_json(tmp_path / "sweep" / "workers" / f"{socket.gethostname()}-{os.getppid()}", {"worker": worker})
    else:
        trial = search.take()
    if state == "queued":
        search.leave()
        (tmp_path / "sweep" / f"trial-{trial.number}.job").write_text("12_1")
    if state == "pruned":
        search.tell(trial.number, TrialState.PRUNED)
    if state == "only watched":
        search.leave()
        space = load_space(tmp_path / "space.yaml")
        Search(space, tmp_path / "sweep", storage=None, name="sweep", watch_only=True)
    else:
        open_search(GRID)
    assert search.look_up(0).state == TrialState.FAIL


@pytest.mark.parametrize(
    "storage", ["nonsense", "nonsense://x", "sqlite:////nowhere/at/all.db", "postgresql://me:pw9@127.0.0.1:1/x"]
)
def test_the_error_of_a_storage_hides_its_password(storage, open_search):
    with pytest.raises(MachineError, match="cannot be used") as error:
        open_search(GRID, storage)
    assert "pw9" not in str(error.value)


def test_a_search_waits_for_a_locked_storage(open_search, tmp_path):
    search = open_search(GRID)
    other = sqlite3.connect(tmp_path / "sweep" / "study.db", check_same_thread=False, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(8.0, other.rollback).start()  # SQLite itself waits for five seconds
    assert search.take().number == 0
    other.close()


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        (["trial-0"], {}, "was started with --storage"),
        ([], {"watch_only": True}, "was started with --storage"),
        (["study.db", "trial-0.job"], {}, "was started with --slurm"),
    ],
)
def test_a_search_continues_with_its_storage_and_queue(files, flags, message, tmp_path):
    (tmp_path / "space.yaml").write_text(f"recipe: {STAND_IN}\n{GRID}")
    (tmp_path / "sweep" / "workers").mkdir(parents=True)
    for name in files:
        (tmp_path / "sweep" / name).touch()
    options = {
        "output_dir": tmp_path / "sweep",
        "storage": None,
        "jobs": 1,
        "timeout_seconds": 9.0,
        "watch_only": False,
    }
    with pytest.raises(SettingsError, match=message):
        run_sweep(tmp_path / "space.yaml", **{**options, **flags})


def test_a_search_that_never_reached_its_storage_may_change_it(tmp_path):
    (tmp_path / "sweep" / "workers").mkdir(parents=True)
    _check_same_mode(tmp_path / "sweep", storage=None, watch_only=False, slurm=False)


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "space.yaml").write_text(f"recipe: {STAND_IN}\n{GRID}")
    options = {"output_dir": tmp_path / "space.yaml" / "sweep", "storage": None, "jobs": 1, "timeout_seconds": 9.0}
    with pytest.raises(SettingsError, match="cannot be written to: Not a directory"):
        run_sweep(tmp_path / "space.yaml", **options, watch_only=False)


def test_a_partly_drawn_trial_is_completed(open_search):
    """A worker that is killed while it draws leaves such a trial."""
    search = open_search(f"search: tpe\n{DRAWN}")
    search.study.ask()
    trial = search.take()
    assert trial.number == 0
    assert trial.user_attrs[SETTINGS].keys() == {"learning_rate", "loss_type"}


def test_a_metric_may_change_until_a_trial_is_ranked_by_it(open_search, tmp_path):
    open_search(f"metric: eval_los\n{GRID}")
    take_and_die(tmp_path)
    search = open_search(f"metric: eval_loss\n{GRID}")
    search.tell(search.take().number, TrialState.COMPLETE, 0.5)
    open_search(f"metric: eval_aux_loss\n{GRID}")
    with pytest.raises(SettingsError, match="has trials that are ranked by another metric"):
        open_search(f"metric: eval_rewards/accuracies\n{GRID}")


def test_a_metric_may_not_change_while_a_worker_runs(open_search):
    search = open_search(f"metric: eval_rewards/accuracies\n{GRID}")
    search.take()
    with pytest.raises(SettingsError, match="has trials that are ranked by another metric"):
        open_search(f"metric: eval_loss\n{GRID}")
    assert search.trials()[0].state == TrialState.RUNNING
