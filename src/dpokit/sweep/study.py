"""The Optuna study of a search: workers on several nodes take trials from it, each trial once.

The configurations of `grid` and `listed` are added to the study when it is created. Those of random and TPE are drawn
one by one, each with a seed from the trial's number. So an interrupted search draws the same trials as one that was
not interrupted; a sampler with one seed would repeat its first draws.
"""

import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
import psutil
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from dpokit.atomic_files import read_record, write_json
from dpokit.console import say
from dpokit.errors import MachineError, SettingsError
from dpokit.metrics import is_lower_better
from dpokit.run_starts import has_only_failed_starts
from dpokit.rundir import RunDir
from dpokit.sweep.space import Range, Space

SPACE, SETTINGS, WORKER, WHY = "space", "settings", "worker", "why"
# A worker on another host whose heartbeat has not changed for this long counts as dead.
SILENT_SECONDS = 120.0
# How long a storage that answered once may fail: a database restarts, or another process locks the file.
STORAGE_SECONDS = 300.0


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def retry_storage(
    call: Callable[Concatenate["Search", Arguments], Result],
) -> Callable[Concatenate["Search", Arguments], Result]:
    """Repeats a call of the storage until it answers. Raises: MachineError after STORAGE_SECONDS."""

    @wraps(call)
    def retry(search: "Search", /, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
        end = time.monotonic() + STORAGE_SECONDS
        while True:
            try:
                return call(search, *args, **options)
            except optuna.exceptions.StorageInternalError as error:
                if time.monotonic() > end:
                    raise _unreachable(search.url, error) from error
                time.sleep(1.0)

    return retry


class Search:
    """A worker's access to the study of one space.

    Args:
        space: the space to search.
        folder: the search's folder, the same for all workers.
        storage: Optuna's URL; None for a SQLite file in the folder.
        name: the study's name.
        watch_only: only reads the study.

    Raises:
        MachineError: the storage cannot be reached.
        SettingsError: the study has another space, or the folder is not writable.
    """

    def __init__(self, space: Space, folder: Path, *, storage: str | None, name: str, watch_only: bool = False) -> None:
        self.space = space
        self.folder = folder
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{find_start(os.getpid())}"
        self._heartbeat_file = folder / "workers" / f"{socket.gethostname()}-{os.getpid()}"
        # By worker on another host: its heartbeat, and the time of its last change.
        self._heartbeats: dict[str, tuple[bytes, float]] = {}
        self.url = storage or f"sqlite:///{folder.absolute() / 'study.db'}"
        try:
            (folder / "workers").mkdir(parents=True, exist_ok=True)
            self.write_heartbeat()
        except OSError as error:
            raise SettingsError(
                f"{folder} cannot be written to: {error.strerror}",
                expected="a folder that you can write to",
                do="set another --output-dir",
            ) from error
        with self._locked():
            self.study = self._open(self.url, name, watch_only=watch_only)
            self._fill()

    def _open(self, url: str, name: str, *, watch_only: bool) -> optuna.Study:
        direction = "minimize" if is_lower_better(self.space.metric) else "maximize"
        options = {"storage": url, "study_name": name, "direction": direction, "load_if_exists": True}
        options["pruner"] = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
        try:
            study = optuna.create_study(**options)
            if study.direction.name.lower() != direction and not any(
                trial.state == TrialState.COMPLETE or self._is_alive(trial.user_attrs.get(WORKER))
                for trial in study.get_trials(deepcopy=False)
            ):  # the metric was corrected; finished runs are read again from their folders
                optuna.delete_study(study_name=name, storage=url)
                study = optuna.create_study(**options)
            elif not watch_only and self._has_only_failed_starts(study):
                say(f"no trial of the search in {self.folder} took a step: it starts again")
                optuna.delete_study(study_name=name, storage=url)
                study = optuna.create_study(**options)
            saved_space = study.user_attrs.get(SPACE)
            if saved_space is None:
                study.set_user_attr(SPACE, self.space.identity())
        except (OSError, ValueError, ImportError, RuntimeError, optuna.exceptions.OptunaError) as error:
            raise _unreachable(url, error) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] == "sqlalchemy":
                raise _unreachable(url, error) from error
            raise
        _check_same(saved_space, self.space, name)
        if study.direction.name.lower() != direction:
            raise SettingsError(
                f"the study {name} has trials that are ranked by another metric; {self.space.metric} is better "
                f"when {'lower' if direction == 'minimize' else 'higher'}, and the former metric is not",
                expected="a metric that improves in the same direction",
                do="set the former metric (eval_loss if the space named none), or search in another --output-dir",
            )
        return study

    def _has_only_failed_starts(self, study: optuna.Study) -> bool:
        """Whether a trial failed, none took a step, none is running or queued, and no other worker is alive."""
        if any(worker != self.worker and self._is_alive(worker) for worker in self._list_workers()):
            return False  # it may be about to take its next trial
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        if TrialState.FAIL not in states or not {*states} <= {TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING}:
            return False
        for trial in study.get_trials(deepcopy=False):
            queued = (self.folder / f"trial-{trial.number}.job").exists()  # as `QueuedRun.job_file`
            if trial.state == TrialState.RUNNING and (queued or self._is_alive(trial.user_attrs.get(WORKER))):
                return False
        return all(has_only_failed_starts(RunDir(path)) for path in self.folder.glob("trial-*") if path.is_dir())

    def _fill(self) -> None:
        """Adds the configurations of grid and listed to the study, except those that a killed worker has added."""
        if self.space.search not in ("grid", "listed"):
            return
        places = {trial.user_attrs.get("place") for trial in self.trials()}
        for place, configuration in enumerate(self.space.configurations):
            if place not in places:
                texts = {name: _as_choice(value) for name, value in configuration.items()}
                self.study.enqueue_trial(texts, user_attrs={"place": place, SETTINGS: configuration})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lets one worker at a time run, on all nodes that share the folder."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # -- trials ----------------------------------------------------------------------------------------------------

    @retry_storage
    def trials(self) -> list[FrozenTrial]:
        """All trials of the study, oldest first."""
        return list(self.study.get_trials(deepcopy=False))

    @retry_storage
    def take(self) -> FrozenTrial | None:
        """Assigns this worker a trial whose worker is dead, a waiting trial, or a new one; None if no trial is left."""
        with self._locked():
            trials = self.trials()
            for trial in trials:
                if trial.state == TrialState.RUNNING and not self._is_alive(trial.user_attrs.get(WORKER)):
                    self._complete(trial.number, self._trial(trial))
                    return self.look_up(trial.number)
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if not waiting and (self.space.search in ("grid", "listed") or len(trials) >= self.space.trials):
                return None
            return self._ask(len(trials))

    def _ask(self, number: int) -> FrozenTrial:
        self._seed(number)
        trial = self.study.ask(_build_distributions(self.space))
        self._complete(trial.number, trial)
        return self.look_up(trial.number)

    def _seed(self, number: int) -> None:
        kind = optuna.samplers.TPESampler if self.space.search == "tpe" else optuna.samplers.RandomSampler
        self.study.sampler = kind(seed=self.space.sampler_seed * 1_000_003 + number)

    def _complete(self, number: int, trial: Trial) -> None:
        """Assigns a trial to this worker, and draws the values that a worker killed during the draw left open."""
        if SETTINGS not in trial.user_attrs:
            self._seed(number)
            drawn = {
                name: _draw(trial, name, distribution)
                for name, distribution in _build_distributions(self.space).items()
            }
            trial.set_user_attr(SETTINGS, {name: _from_choice(value) for name, value in drawn.items()})
        trial.set_user_attr(WORKER, self.worker)

    def look_up(self, number: int) -> FrozenTrial:
        """The trial of that number, from the storage."""
        return self.trials()[number]

    @retry_storage
    def tell(self, number: int, state: TrialState, value: float | None = None, why: str | None = None) -> None:
        """Records how a trial ended; a second call changes nothing."""
        if why is not None:
            self._trial(self.look_up(number)).set_user_attr(WHY, why)
        self.study.tell(number, value, state=state, skip_if_finished=True)

    def is_over(self) -> bool:
        """Whether every trial has ended."""
        trials = self.trials()
        return len(trials) >= self.space.trials and all(trial.state.is_finished() for trial in trials)

    @retry_storage
    def report(self, number: int, evaluation: int, value: float) -> bool:
        """Records a trial's n-th evaluation; True if the trial should be pruned."""
        frozen = self.look_up(number)
        trial = self._trial(frozen)
        if evaluation not in frozen.intermediate_values:
            trial.report(value, evaluation)
        return self.space.prune and trial.should_prune()

    def _trial(self, frozen: FrozenTrial) -> Trial:
        # Optuna returns a writable trial only from `ask`, in the process that asked; `ask` creates it in this way.
        return Trial(self.study, frozen._trial_id)

    # -- workers ---------------------------------------------------------------------------------------------------

    def write_heartbeat(self) -> None:
        """Writes this worker's heartbeat for workers on other hosts; called every few seconds."""
        write_json(self._heartbeat_file, {"worker": self.worker, "beat": time.monotonic_ns()})

    def leave(self) -> None:
        """Removes the heartbeat: other workers may take over this worker's trials."""
        self._heartbeat_file.unlink(missing_ok=True)

    def _list_workers(self) -> list[str]:
        """The workers that have a heartbeat in the folder, also those that were killed."""
        workers = []
        for path in (self.folder / "workers").iterdir():
            with suppress(OSError, ValueError, KeyError, TypeError):  # removed meanwhile, or half written
                workers.append(str(read_record(path)["worker"]))
        return workers

    def _is_alive(self, worker: str | None) -> bool:
        if worker is None:  # killed after the study created the trial and before it was assigned
            return False
        host, pid, start = worker.split(":")
        try:
            heartbeat = (self.folder / "workers" / f"{host}-{pid}").read_bytes()
            if host == socket.gethostname():
                return find_start(int(pid)) == start
        except (OSError, psutil.Error):
            return False
        # Another host's clock may be wrong, so this worker times the changes of the heartbeat with its own.
        last, changed_at = self._heartbeats.get(worker, (b"", 0.0))
        if heartbeat != last:
            changed_at = time.monotonic()
            self._heartbeats[worker] = heartbeat, changed_at
        return time.monotonic() - changed_at < SILENT_SECONDS


def find_start(pid: int) -> str:
    """The start time of a process: on Linux in ticks since boot, which a change of the clock does not affect.

    Raises: psutil.NoSuchProcess.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): field 22
    except OSError:
        return f"{psutil.Process(pid).create_time():.0f}"


def _build_distributions(space: Space) -> dict[str, BaseDistribution]:
    if space.search in ("grid", "listed"):
        names = dict.fromkeys(name for entry in space.configurations for name in entry)
        return {
            name: CategoricalDistribution(
                list(dict.fromkeys(_as_choice(entry[name]) for entry in space.configurations if name in entry))
            )
            for name in names
            if all(name in entry for entry in space.configurations)
        }
    return {name: _build_distribution(values) for name, values in space.parameters.items()}


def _build_distribution(values: list[Any] | Range) -> BaseDistribution:
    if not isinstance(values, Range):
        return CategoricalDistribution([_as_choice(value) for value in values])
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _draw(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """A trial's value of one parameter: the value that it has, else a new draw."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
    suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, low, high, step=step, log=log)


def _as_choice(value: Any) -> Any:
    """The value in a form that a storage can keep: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _from_choice(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value


def _check_same(saved: Mapping[str, Any] | None, space: Space, name: str) -> None:
    current = space.identity()
    if saved is None or saved == current:
        return
    changes = "; ".join(
        f"{key} was {saved.get(key)}, now {value}" for key, value in current.items() if saved.get(key) != value
    )
    raise SettingsError(
        f"the study {name} was started with another space: {changes}",
        expected="the space of the first start; trials, metric and prune may change",
        do="restore the former values, or start a search in another --output-dir",
    )


def _unreachable(url: str, error: BaseException) -> MachineError:
    # The message leaves out user and password of the URL.
    where = f"{url.partition('://')[0]}://{url.rpartition('@')[2].removeprefix(url.partition('://')[0] + '://')}"
    cause = getattr(error, "orig", None) or error
    return MachineError(
        f"the storage {where} cannot be used: {' '.join(str(cause).split())[:200]}",
        expected="a URL that Optuna supports, of a database that this machine can reach",
        do="correct --storage (sqlite:///FILE, postgresql://USER@HOST/NAME, ...), or leave it out for a file in the "
        "search's folder",
    )
