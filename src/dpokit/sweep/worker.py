"""Starts the runs of a search, watches them, and settles each: measured, pruned, failed, or started once more."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from optuna.trial import TrialState

from dpokit.cluster.status import is_users_mistake
from dpokit.console import say
from dpokit.errors import DpokitError, SettingsError
from dpokit.interrupts import SIGNALS
from dpokit.report.read import finite
from dpokit.rundir import RunDir, read_metrics
from dpokit.settings.flag_facts import Fact, flags_with
from dpokit.sweep.slurm import Queue, QueuedRun
from dpokit.sweep.space import Space
from dpokit.sweep.study import SETTINGS, Search
from dpokit.sweep.trial import TrialRun, find_best, follow, name_runs

POLL_SECONDS = 0.5
SIGN_SECONDS = 5.0  # between signs of life, and looks at what other workers left
FAILURES, KILLS = 1, 3  # ends of a run that are followed by another start: by an error, by a kill


class Worker:
    """Trains what a search gives it, `jobs` runs side by side.

    Args:
        space, search: what is searched, and its memory.
        jobs: runs at a time.
        timeout_seconds: a run that has written nothing for so long is ended.
        show: called now and then, to bring the screen up to date.
        queue: Slurm's; None to train here.

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
        self.ends: dict[str, list[str]] = {}  # of each folder: how its starts ended
        self.prepared: set[str] = set()
        self.leaving = self._asked = 0  # how often it was told to leave, and said so
        self._next_ask = 0.0
        self.devices = share_devices(jobs) if queue is None else [{}] * jobs
        self._next_look = self._next_take = 0.0

    def work(self) -> bool:
        """Until every trial has ended, also those of other workers; False where it was told to leave before.

        Raises: SettingsError for a metric that a finished run did not log.
        """
        with self._heeding_signals():
            while True:
                if time.monotonic() >= self._next_look:
                    self._next_look = time.monotonic() + SIGN_SECONDS
                    self.search.give_sign()
                    self.show()
                if self.leaving and self.queue is not None:
                    say("the queued trials go on; the same command comes back to them")
                    return False
                if self.leaving:
                    self._end_all()
                else:
                    self._start_more()
                for one in list(self.active):
                    self._look_at(one)
                if not self.active and (self.leaving or (not self.waiting and self.search.is_over())):
                    return not self.leaving
                time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        """Once told they are asked to save, and again and again, as one may not listen yet; twice, they are ended."""
        if not self._asked and self.active:
            say("the running trials save and end; the same command goes on from there (once more: end them now)")
        self._asked = self.leaving
        if self.leaving == 1 and time.monotonic() < self._next_ask:
            return
        self._next_ask = time.monotonic() + SIGN_SECONDS
        for one in self.active:
            if self.leaving == 1:
                one.ask_to_save()
            else:
                one.end()

    @contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        def leave(*_: object) -> None:
            self.leaving += 1

        before = {number: signal.signal(number, leave) for number in SIGNALS}
        try:
            yield
        except BaseException:
            for one in self.active if self.queue is None else ():
                one.end()
            raise
        finally:
            self.search.leave()
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- starting --------------------------------------------------------------------------------------------------

    def _start_more(self) -> None:
        while len(self.active) < self.jobs:
            if not self.waiting and not self._take():
                break
            one = next((one for one in self.waiting if not self._must_wait(one)), None)
            if one is None:
                break
            self.waiting.remove(one)
            self._begin(one)
        if self.queue is not None:
            self.queue.flush()

    def _take(self) -> bool:
        if time.monotonic() < self._next_take:
            return False
        trial = self.search.take()
        if trial is None:
            self._next_take = time.monotonic() + SIGN_SECONDS
            return False
        drawn = trial.user_attrs[SETTINGS]
        self.space.check_trial(trial.number, drawn)
        settings = {**self.space.settings, **drawn}
        self.values[trial.number] = []
        self.waiting += [
            self._build_run(trial.number, more, RunDir(self.search.folder / name), is_first=not at)
            for at, (name, more) in enumerate(name_runs(self.space, trial.number, settings))
        ]
        return True

    def _build_run(self, number: int, settings: dict[str, Any], run: RunDir, *, is_first: bool) -> TrialRun:
        if self.queue is None:
            return TrialRun(number, settings, run, is_first)
        return QueuedRun(number, settings, run, is_first, queue=self.queue)

    def _must_wait(self, one: TrialRun) -> bool:
        """Whether another run is just computing what this one needs, too: tokens, reference log-probs."""
        kind = _find_kind(one)
        if kind in self.prepared:
            return False
        others = [other for other in self.active if _find_kind(other) == kind]
        if any(follow(other.run, self.space.metric) for other in others):
            self.prepared.add(kind)
            return False
        return bool(others)

    def _begin(self, one: TrialRun) -> None:
        """Starts a run; one that goes on without its worker is watched again, one that is finished is settled."""
        free = set(range(self.jobs)) - {other.slot for other in self.active}
        kept = one.find_slot() if self.queue is None else None  # it has its devices from whoever started it
        one.slot = kept if kept in free else min(free)
        self.active.append(one)
        if one.is_running() or self._read_run(one).get("state") == "finished":
            return
        one.start_listening()
        group = self.search.study.study_name
        command = one.command(self.space.recipe, config_file=self.space.config_file, group=group)
        one.start(command, self.devices[one.slot])

    # -- watching --------------------------------------------------------------------------------------------------

    def _look_at(self, one: TrialRun) -> None:
        running, hopeless = one.is_running(), self._report(one)
        if not running:
            self._settle(one)
        elif hopeless:
            why = f"pruned: worse than the median of the others at evaluation {one.told}"
            self._give_up(one, TrialState.PRUNED, why)
        elif one.count_silent_seconds() > self.timeout_seconds:
            self._give_up(one, TrialState.FAIL, f"it wrote nothing for {self.timeout_seconds:g} s, and was ended")

    def _report(self, one: TrialRun) -> bool:
        """Tells the study of evaluations under the first seed; whether the trial is to be pruned."""
        if not one.is_first:
            return False
        records = follow(one.run, self.space.metric)
        found = [finite(record[self.space.metric]) for record in records if self.space.metric in record]
        prune = False
        for number, value in enumerate(found[one.told :], start=one.told + 1):
            one.told = number
            prune = prune or (value is not None and self.search.report(one.trial, number, value))
        return prune

    def _give_up(self, one: TrialRun, state: TrialState, why: str) -> None:
        """Ends a trial, all of its seeds; its folder says why."""
        for other in [other for other in self.active if other.trial == one.trial]:
            other.end()
            self.active.remove(other)
        self.waiting = [other for other in self.waiting if other.trial != one.trial]
        if one.run.run_json.is_file():
            with suppress(DpokitError):  # a damaged run.json says enough
                one.run.write_run(state="failed", why=why)
        self.search.tell(one.trial, state, why=f"{why}; log: {one.log}")

    def _settle(self, one: TrialRun) -> None:
        """What becomes of a run whose processes have ended."""
        record = self._read_run(one)
        if record.get("state") == "finished":
            self._finish(one)
        elif self.leaving:
            self.active.remove(one)
        elif (why := self._find_end(one, record)) is not None:
            self._give_up(one, TrialState.FAIL, why)
        else:
            self.active.remove(one)
            self.waiting.insert(0, one)

    def _read_run(self, one: TrialRun) -> dict[str, Any]:
        try:
            return one.run.read_run() or {}
        except DpokitError as error:
            return {"state": "failed", "why": error.seen, "error": type(error).__name__}

    def _find_end(self, one: TrialRun, record: dict[str, Any]) -> str | None:
        """Why a run that is not finished is not started again; None where it is."""
        ends = self.ends.setdefault(str(one.run.path), [])
        state = record.get("state")
        words = one.last_words()
        if one.restarts_itself:
            return str(record.get("why") or f"its job is gone, the last line of the log: {words}")
        if state == "preempted":
            return None
        mistake = one.read_mistake() if state is None else None  # it may be seen before there is a folder
        if mistake is not None or (state == "failed" and is_users_mistake(record.get("error"))):
            return str(mistake or record.get("why"))
        ends.append("failed" if state == "failed" else "killed")
        if ends.count("failed") > FAILURES:
            return f"it failed {ends.count('failed')} times, the last time: {record.get('why')}"
        if ends.count("killed") > KILLS:
            return f"its processes ended {len(ends)} times without a word, the last line of the log: {words}"
        return None

    def _finish(self, one: TrialRun) -> None:
        value = find_best(one.run, self.space.metric)
        if value is None:
            self._check_metric(one.run)
            self._give_up(one, TrialState.FAIL, f"it ended without a finite {self.space.metric}")
            return
        self.active.remove(one)
        self.prepared.add(_find_kind(one))
        self.values[one.trial].append(value)
        if len(self.values[one.trial]) == self.space.seeds:
            mean = sum(self.values[one.trial]) / self.space.seeds
            self.search.tell(one.trial, TrialState.COMPLETE, mean)

    def _check_metric(self, run: RunDir) -> None:
        """Raises SettingsError where a run was evaluated and does not know the metric: it is misspelt."""
        records = read_metrics(run.metrics_jsonl) if run.metrics_jsonl.is_file() else []
        logged = sorted({name for record in records for name in record if name.startswith("eval_")})
        if not logged or self.space.metric in {name for record in records for name in record}:
            return
        raise SettingsError(
            f"{run.path} is finished, and has no {self.space.metric}: nothing to rank trials by",
            expected=f"one of: {', '.join(logged)}",
            do=f"correct metric in {self.space.path}; the trial is kept, and the same command goes on",
        )


def _find_kind(one: TrialRun) -> str:
    shared = flags_with(Fact.SAME_TOKENS)
    return repr(sorted((name, value) for name, value in one.settings.items() if name not in shared))


def share_devices(jobs: int) -> list[dict[str, str]]:
    """What each slot's environment says of GPUs or threads. Raises: SettingsError for more jobs than GPUs."""
    if jobs == 1:
        return [{}]
    gpus = torch.cuda.device_count()
    if not gpus:
        cores = len(os.sched_getaffinity(0))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // jobs))
        return [{"OMP_NUM_THREADS": threads}] * jobs
    if jobs > gpus:
        raise SettingsError(
            f"--jobs {jobs}, and {gpus} GPUs are visible", expected="a GPU for each run, or more", do=f"--jobs {gpus}"
        )
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    each = gpus // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[slot * each : (slot + 1) * each])} for slot in range(jobs)]
