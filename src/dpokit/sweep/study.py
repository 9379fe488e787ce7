"""A search's memory: an Optuna study, from which several workers, on several nodes, take trials; none twice.

Configurations that are known beforehand (grid, listed) are put into the study when it is made. Those of random and TPE
are drawn one by one, each from a random stream of its own number: a search that was interrupted goes on as if it had
not been, where a sampler with one seed would begin with its first draws again.
"""

import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
import psutil
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from dpokit.errors import MachineError, SettingsError
from dpokit.metrics import is_lower_better
from dpokit.rundir import write_json
from dpokit.sweep.space import Range, Space

SPACE, SETTINGS, WORKER, WHY = "space", "settings", "worker", "why"
# A worker of another host that has not been heard of for so long is gone.
SILENT_SECONDS = 120.0
# How long a storage that was reached once may be away: a database is started anew, a file is locked by others.
STORAGE_SECONDS = 300.0


Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def patiently(
    ask: Callable[Concatenate["Search", Asked], Answer],
) -> Callable[Concatenate["Search", Asked], Answer]:
    """Asks the storage again where it does not answer. Raises: MachineError after STORAGE_SECONDS."""

    @wraps(ask)
    def asked(search: "Search", /, *args: Asked.args, **options: Asked.kwargs) -> Answer:
        end = time.monotonic() + STORAGE_SECONDS
        while True:
            try:
                return ask(search, *args, **options)
            except optuna.exceptions.StorageInternalError as error:
                if time.monotonic() > end:
                    raise _unreachable(search.url, error) from error
                time.sleep(1.0)

    return asked


class Search:
    """The study of one space, as this worker sees it.

    Args:
        space: what is searched.
        folder: of the search; the same for all workers.
        storage: Optuna's URL; None for a SQLite file in the folder.
        name: of the study.

    Raises:
        MachineError: a storage that cannot be reached.
        SettingsError: the study was begun with another space, or a folder that cannot be written to.
    """

    def __init__(self, space: Space, folder: Path, *, storage: str | None, name: str) -> None:
        self.space = space
        self.folder = folder
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{find_start(os.getpid())}"
        self._sign = folder / "workers" / f"{socket.gethostname()}-{os.getpid()}"
        self._signs: dict[str, tuple[bytes, float]] = {}  # of workers on other hosts, and since when they are the same
        self.url = storage or f"sqlite:///{folder.absolute() / 'study.db'}"
        try:
            (folder / "workers").mkdir(parents=True, exist_ok=True)
            self.give_sign()
        except OSError as error:
            raise SettingsError(
                f"{folder} cannot be written to: {error.strerror}",
                expected="a folder of yours",
                do="name another: --output-dir",
            ) from error
        with self._locked():
            self.study = self._open(self.url, name)
            self._fill()

    def _open(self, url: str, name: str) -> optuna.Study:
        direction = "minimize" if is_lower_better(self.space.metric) else "maximize"
        asked = {"storage": url, "study_name": name, "direction": direction, "load_if_exists": True}
        asked["pruner"] = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
        try:
            study = optuna.create_study(**asked)
            if study.direction.name.lower() != direction and not any(
                trial.state == TrialState.COMPLETE or self._is_alive(trial.user_attrs.get(WORKER))
                for trial in study.get_trials(deepcopy=False)
            ):  # the metric was corrected; runs that are finished are found again by their folders
                optuna.delete_study(study_name=name, storage=url)
                study = optuna.create_study(**asked)
            then = study.user_attrs.get(SPACE)
            if then is None:
                study.set_user_attr(SPACE, self.space.identity())
        except (OSError, ValueError, ImportError, RuntimeError, optuna.exceptions.OptunaError) as error:
            raise _unreachable(url, error) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] == "sqlalchemy":
                raise _unreachable(url, error) from error
            raise
        _check_same(then, self.space, name)
        if study.direction.name.lower() != direction:
            raise SettingsError(
                f"the study {name} has trials that are ranked by another metric; {self.space.metric} is to "
                f"{'fall' if direction == 'minimize' else 'rise'}, that one was not",
                expected="a metric that is better in the same direction",
                do="set the metric back, or begin a search in another --output-dir",
            )
        return study

    def _fill(self) -> None:
        """Puts in the configurations that are known beforehand; those that a killed worker put in are there."""
        if self.space.search not in ("grid", "listed"):
            return
        there = {trial.user_attrs.get("place") for trial in self.trials()}
        for place, configuration in enumerate(self.space.configurations):
            if place not in there:
                texts = {name: _as_choice(value) for name, value in configuration.items()}
                self.study.enqueue_trial(texts, user_attrs={"place": place, SETTINGS: configuration})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One worker at a time, on all nodes that see the folder."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # -- trials ----------------------------------------------------------------------------------------------------

    @patiently
    def trials(self) -> list[FrozenTrial]:
        """All there are, oldest first."""
        return list(self.study.get_trials(deepcopy=False))

    @patiently
    def take(self) -> FrozenTrial | None:
        """The next trial, now this worker's: one whose worker is gone, one that waits, or a new one; None for none."""
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
        """Makes a trial this worker's; what a worker killed while it drew had left undrawn is drawn."""
        if SETTINGS not in trial.user_attrs:
            self._seed(number)
            drawn = {name: _draw(trial, name, one) for name, one in _build_distributions(self.space).items()}
            trial.set_user_attr(SETTINGS, {name: _from_choice(value) for name, value in drawn.items()})
        trial.set_user_attr(WORKER, self.worker)

    def look_up(self, number: int) -> FrozenTrial:
        """A trial as the storage has it."""
        return self.trials()[number]

    @patiently
    def tell(self, number: int, state: TrialState, value: float | None = None, why: str | None = None) -> None:
        """How a trial ended; a second word on it changes nothing."""
        if why is not None:
            self._trial(self.look_up(number)).set_user_attr(WHY, why)
        self.study.tell(number, value, state=state, skip_if_finished=True)

    def is_over(self) -> bool:
        """Whether every trial has ended."""
        trials = self.trials()
        return len(trials) >= self.space.trials and all(trial.state.is_finished() for trial in trials)

    @patiently
    def report(self, number: int, evaluation: int, value: float) -> bool:
        """Notes a trial's n-th evaluation; whether it is so bad that it may end now."""
        known = self.look_up(number)
        trial = self._trial(known)
        if evaluation not in known.intermediate_values:
            trial.report(value, evaluation)
        return self.space.prune and trial.should_prune()

    def _trial(self, frozen: FrozenTrial) -> Trial:
        # Optuna gives a trial to write to only once, to the process that asked for it; this is how it makes one.
        return Trial(self.study, frozen._trial_id)

    # -- workers ---------------------------------------------------------------------------------------------------

    def give_sign(self) -> None:
        """Tells workers on other hosts that this one lives; called every few seconds."""
        write_json(self._sign, {"worker": self.worker, "beat": time.monotonic_ns()})

    def leave(self) -> None:
        """No sign any more: others may take over what this worker had."""
        self._sign.unlink(missing_ok=True)

    def _is_alive(self, worker: str | None) -> bool:
        if worker is None:  # killed between being given a trial and saying so
            return False
        host, pid, start = worker.split(":")
        try:
            sign = (self.folder / "workers" / f"{host}-{pid}").read_bytes()
            if host == socket.gethostname():
                return find_start(int(pid)) == start
        except (OSError, psutil.Error):
            return False
        # Another host's clock may be wrong: this worker watches whether the sign changes.
        before, since = self._signs.get(worker, (b"", 0.0))
        if sign != before:
            since = time.monotonic()
            self._signs[worker] = sign, since
        return time.monotonic() - since < SILENT_SECONDS


def find_start(pid: int) -> str:
    """When a process began: in ticks since the machine did (Linux), which setting the clock leaves as they are.

    Raises: psutil.NoSuchProcess.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): field 22
    except OSError:
        return f"{psutil.Process(pid).create_time():.0f}"


def _build_distributions(space: Space) -> dict[str, BaseDistribution]:
    if space.search in ("grid", "listed"):
        names = dict.fromkeys(name for one in space.configurations for name in one)
        return {
            name: CategoricalDistribution(
                list(dict.fromkeys(_as_choice(one[name]) for one in space.configurations if name in one))
            )
            for name in names
            if all(name in one for one in space.configurations)
        }
    return {name: _build_distribution(values) for name, values in space.parameters.items()}


def _build_distribution(values: list[Any] | Range) -> BaseDistribution:
    if not isinstance(values, Range):
        return CategoricalDistribution([_as_choice(value) for value in values])
    if values.is_whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _draw(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """A trial's value of one parameter: the value that it has already, else a new one."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    low, high, step, log = distribution.low, distribution.high, distribution.step, distribution.log
    suggest = trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    return suggest(name, low, high, step=step, log=log)


def _as_choice(value: Any) -> Any:
    """A value that a storage can keep: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _from_choice(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value[:1] in ("[", "{") else value


def _check_same(then: Mapping[str, Any] | None, space: Space, name: str) -> None:
    now = space.identity()
    if then is None or then == now:
        return
    told = "; ".join(f"{key} was {then.get(key)}, now {value}" for key, value in now.items() if then.get(key) != value)
    raise SettingsError(
        f"the study {name} was begun with another space: {told}",
        expected="the space it was begun with; trials, metric and prune may change",
        do="set them back, or begin a search in another --output-dir",
    )


def _unreachable(url: str, error: BaseException) -> MachineError:
    # A URL may hold a password.
    where = f"{url.partition('://')[0]}://{url.rpartition('@')[2].removeprefix(url.partition('://')[0] + '://')}"
    cause = getattr(error, "orig", None) or error
    return MachineError(
        f"the storage {where} cannot be used: {' '.join(str(cause).split())[:200]}",
        expected="a URL that Optuna knows, of a database that this machine reaches",
        do="correct --storage (sqlite:///FILE, postgresql://USER@HOST/NAME, ...), or leave it out for a file in the "
        "search's folder",
    )
