"""Starts and watches the runs of a search, and records each as finished, pruned or failed, or starts it again."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from optuna.trial import TrialState

from dpokit.cluster.status import is_user_error
from dpokit.console import say
from dpokit.distributed.cores import count_cores
from dpokit.errors import DpokitError, SettingsError
from dpokit.interrupts import SIGNALS
from dpokit.report.read import finite
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.sweep.slurm import Queue, QueuedRun
from dpokit.sweep.space import Space
from dpokit.sweep.study import SETTINGS, Search
from dpokit.sweep.trial import TrialRun, find_best_value, follow, name_runs

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 5.0  # between heartbeats, and between checks for trials of dead workers
FAILURES, KILLS = 1, 3  # how many ends of a run by an error, or by a kill, lead to another start


class Worker:
    """Takes trials from a search and trains them, `jobs` runs side by side.

    Args:
        space, search: the space and its study.
        jobs: the number of runs side by side.
        timeout_seconds: a run that writes nothing for this long is ended.
        show: called every few seconds to update the screen.
        queue: the Slurm queue; None to train here.

    Raises: SettingsError for more jobs than GPUs.
    """

    def __init__(
        self,
        space: Space,
        search: Search,
        *,
        jobs: int,
        timeout_seconds: float,
        show: Callable[[], None],
        queue: Queue | None = None,
    ) -> None:
        self.space = space
        self.search = search
        self.jobs = jobs
        self.timeout_seconds = timeout_seconds
        self.show = show
        self.queue = queue
        self.active: list[TrialRun] = []
        self.waiting: list[TrialRun] = []
        self.values: dict[int, list[float]] = {}
        self.ends: dict[str, list[str]] = {}  # by folder: how its starts ended
        self.prepared: set[str] = set()
        self.interrupts = self._announced = 0  # number of signals to stop so far, and how many of them were announced
        self._next_signal = 0.0
        self.devices = share_devices(jobs) if queue is None else [{}] * jobs
        self._next_look = self._next_take = 0.0

    def work(self) -> bool:
        """Works until every trial has ended, also those of other workers; False if a signal stopped it before.

        Raises: SettingsError for a metric that a finished run did not log.
        """
        with self._handle_signals():
            while True:
                if time.monotonic() >= self._next_look:
                    self._next_look = time.monotonic() + HEARTBEAT_SECONDS
                    self.search.write_heartbeat()
                    self.show()
                if self.interrupts and self.queue is not None:
                    say("the queued trials go on; the same command continues with them")
                    return False
                if self.interrupts:
                    self._end_all()
                else:
                    self._start_more()
                for trial_run in list(self.active):
                    self._check_run(trial_run)
                if not self.active and (self.interrupts or (not self.waiting and self.search.is_over())):
                    return not self.interrupts
                time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        """Asks the runs to save after the first signal, and kills them after the second.

        It asks repeatedly, because a run may not have its signal handler yet.
        """
        if not self._announced and self.active:
            say("the running trials save and end; the same command continues them (a second signal ends them now)")
        self._announced = self.interrupts
        if self.interrupts == 1 and time.monotonic() < self._next_signal:
            return
        self._next_signal = time.monotonic() + HEARTBEAT_SECONDS
        for trial_run in self.active:
            if self.interrupts == 1:
                trial_run.ask_to_save()
            else:
                trial_run.end()

    @contextmanager
    def _handle_signals(self) -> Iterator[None]:
        def interrupt(*_: object) -> None:
            self.interrupts += 1

        former_handlers = {number: signal.signal(number, interrupt) for number in SIGNALS}
        try:
            yield
        except BaseException:
            for trial_run in self.active if self.queue is None else ():
                trial_run.end()
            raise
        finally:
            self.search.leave()
            for number, handler in former_handlers.items():
                signal.signal(number, handler)

    # -- starting --------------------------------------------------------------------------------------------------

    def _start_more(self) -> None:
        while len(self.active) < self.jobs:
            if not self.waiting and not self._take():
                break
            trial_run = next((trial_run for trial_run in self.waiting if not self._must_wait(trial_run)), None)
            if trial_run is None:
                break
            self.waiting.remove(trial_run)
            self._begin(trial_run)
        if self.queue is not None:
            self.queue.flush()

    def _take(self) -> bool:
        if time.monotonic() < self._next_take:
            return False
        trial = self.search.take()
        if trial is None:
            self._next_take = time.monotonic() + HEARTBEAT_SECONDS
            return False
        drawn_settings = trial.user_attrs[SETTINGS]
        self.space.check_trial(trial.number, drawn_settings)
        settings = {**self.space.settings, **drawn_settings}
        self.values[trial.number] = []
        self.waiting += [
            self._build_run(trial.number, run_settings, RunDir(self.search.folder / name), is_first=not position)
            for position, (name, run_settings) in enumerate(name_runs(self.space, trial.number, settings))
        ]
        return True

    def _build_run(self, number: int, settings: dict[str, Any], run: RunDir, *, is_first: bool) -> TrialRun:
        if self.queue is None:
            return TrialRun(number, settings, run, is_first)
        return QueuedRun(number, settings, run, is_first, queue=self.queue)

    def _must_wait(self, trial_run: TrialRun) -> bool:
        """Whether another run is computing tokens or reference log-probabilities that this run needs as well."""
        data_key = _find_data_key(trial_run)
        if data_key in self.prepared:
            return False
        other_runs = [other_run for other_run in self.active if _find_data_key(other_run) == data_key]
        if any(follow(other_run.run, self.space.metric) for other_run in other_runs):
            self.prepared.add(data_key)
            return False
        return bool(other_runs)

    def _begin(self, trial_run: TrialRun) -> None:
        """Starts a run, unless it still runs from an earlier worker or has finished; then it is only watched."""
        free_slots = set(range(self.jobs)) - {other_run.slot for other_run in self.active}
        slot = trial_run.find_slot() if self.queue is None else None  # a run of an earlier worker keeps its devices
        trial_run.slot = slot if slot in free_slots else min(free_slots)
        self.active.append(trial_run)
        if trial_run.is_running() or self._read_run(trial_run).get("state") == "finished":
            return
        trial_run.reset_silence()
        group = self.search.study.study_name
        command = trial_run.command(self.space.recipe, config_file=self.space.config_file, group=group)
        trial_run.start(command, self.devices[trial_run.slot])

    # -- watching --------------------------------------------------------------------------------------------------

    def _check_run(self, trial_run: TrialRun) -> None:
        is_running, should_prune = trial_run.is_running(), self._report(trial_run)
        if not is_running:
            self._settle(trial_run)
        elif should_prune:
            why = f"pruned: worse than the median of the others at evaluation {trial_run.reported}"
            self._end_trial(trial_run, TrialState.PRUNED, why)
        elif trial_run.count_silent_seconds() > self.timeout_seconds:
            self._end_trial(
                trial_run, TrialState.FAIL, f"it wrote nothing for {self.timeout_seconds:g} s, and was ended"
            )

    def _report(self, trial_run: TrialRun) -> bool:
        """Reports new evaluations of the first seed to the study; True if the trial should be pruned."""
        if not trial_run.is_first:
            return False
        records = follow(trial_run.run, self.space.metric)
        values = [finite(record[self.space.metric]) for record in records if self.space.metric in record]
        prune = False
        for number, value in enumerate(values[trial_run.reported :], start=trial_run.reported + 1):
            trial_run.reported = number
            prune = prune or (value is not None and self.search.report(trial_run.trial, number, value))
        return prune

    def _end_trial(self, trial_run: TrialRun, state: TrialState, why: str) -> None:
        """Ends all runs of a trial and records the reason."""
        for other_run in [other_run for other_run in self.active if other_run.trial == trial_run.trial]:
            other_run.end()
            self.active.remove(other_run)
        self.waiting = [other_run for other_run in self.waiting if other_run.trial != trial_run.trial]
        if trial_run.run.run_json.is_file():
            with suppress(DpokitError):  # a damaged run.json stays as it is
                trial_run.run.write_run(state="failed", why=why)
        self.search.tell(trial_run.trial, state, why=f"{why}; log: {trial_run.log}")

    def _settle(self, trial_run: TrialRun) -> None:
        """Handles a run whose processes have ended."""
        record = self._read_run(trial_run)
        if record.get("state") == "finished":
            self._finish(trial_run)
        elif self.interrupts:
            self.active.remove(trial_run)
        elif (why := self._find_failure(trial_run, record)) is not None:
            self._end_trial(trial_run, TrialState.FAIL, why)
        else:
            self.active.remove(trial_run)
            self.waiting.insert(0, trial_run)

    def _read_run(self, trial_run: TrialRun) -> dict[str, Any]:
        try:
            return trial_run.run.read_run() or {}
        except DpokitError as error:
            return {"state": "failed", "why": error.seen, "error": type(error).__name__}

    def _find_failure(self, trial_run: TrialRun, record: dict[str, Any]) -> str | None:
        """The reason why an unfinished run is not started again; None if it is."""
        ends = self.ends.setdefault(str(trial_run.run.path), [])
        state = record.get("state")
        last_line = trial_run.read_last_line()
        if trial_run.restarts_itself:
            return str(record.get("why") or f"its job is gone, the last line of the log: {last_line}")
        if state == "preempted":
            return None
        # A user error may come before the run creates its folder; then only the log has it.
        user_error = trial_run.find_user_error() if state is None else None
        if user_error is not None or (state == "failed" and is_user_error(record.get("error"))):
            return str(user_error or record.get("why"))
        ends.append("failed" if state == "failed" else "killed")
        if ends.count("failed") > FAILURES:
            return f"it failed {ends.count('failed')} times, the last time: {record.get('why')}"
        if ends.count("killed") > KILLS:
            return f"its processes ended {len(ends)} times without an error, the last line of the log: {last_line}"
        return None

    def _finish(self, trial_run: TrialRun) -> None:
        value = find_best_value(trial_run.run, self.space.metric)
        if value is None:
            self._check_metric(trial_run.run)
            self._end_trial(trial_run, TrialState.FAIL, f"it ended without a finite {self.space.metric}")
            return
        self.active.remove(trial_run)
        self.prepared.add(_find_data_key(trial_run))
        self.values[trial_run.trial].append(value)
        if len(self.values[trial_run.trial]) == self.space.seeds:
            mean = sum(self.values[trial_run.trial]) / self.space.seeds
            self.search.tell(trial_run.trial, TrialState.COMPLETE, mean)

    def _check_metric(self, run: RunDir) -> None:
        """Raises SettingsError if a run logged evaluations, but not the metric: its name is misspelt."""
        records = read_metrics(run.metrics_jsonl) if run.metrics_jsonl.is_file() else []
        logged = sorted({name for record in records for name in record if name.startswith("eval_")})
        if not logged or self.space.metric in {name for record in records for name in record}:
            return
        raise SettingsError(
            f"{run.path} is finished, and has no {self.space.metric}: nothing to rank trials by",
            expected=f"one of: {', '.join(logged)}",
            do=f"correct metric in {self.space.path}; the trial is kept, and the same command continues the search",
        )


def _find_data_key(trial_run: TrialRun) -> str:
    same_tokens = flags_with(Fact.SAME_TOKENS)
    return repr(sorted((name, value) for name, value in trial_run.settings.items() if name not in same_tokens))


def share_devices(jobs: int) -> list[dict[str, str]]:
    """The environment variables with each slot's GPUs or threads. Raises: SettingsError for more jobs than GPUs."""
    if jobs == 1:
        return [{}]
    gpus = torch.cuda.device_count()
    if not gpus:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // jobs))
        return [{"OMP_NUM_THREADS": threads}] * jobs
    if jobs > gpus:
        raise SettingsError(
            f"--jobs {jobs}, and {gpus} GPUs are visible", expected="at least one GPU for each run", do=f"--jobs {gpus}"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    each = gpus // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[slot * each : (slot + 1) * each])} for slot in range(jobs)]
