"""A scheduler wants the machine back: noted on any rank, agreed by all at the next boundary, saved, said.

A boundary is the end of a step, of a batch of an evaluation, or of a part of the reference that is kept. Before the
first one a process that is alone has nothing to save: a signal ends it as it does elsewhere (interrupts.py).

The signals are SIGTERM and SIGUSR1, or the one that `--preempt_signal` names, and Ctrl-C; once more, Ctrl-C ends the
process without a save. A known time limit counts as one, too, `--save_before_seconds` ahead of it.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from dpokit.errors import SettingsError
from dpokit.interrupts import REPEAT_SECONDS, Interrupted, Preempted, end_now, interrupt, name_signal, write_line
from dpokit.rundir import RunDir

SIGNALS = ("SIGTERM", "SIGUSR1")
NAMES = sorted(name.name for name in signal.Signals if name.name not in ("SIGKILL", "SIGSTOP"))


class EvaluationCut(Preempted):
    """The run was asked to end in the middle of an evaluation, whose step may still be unsaved."""


def is_restarted(run: RunDir) -> bool:
    """Whether the launcher (`--max_restarts`) starts again, with the words it was given, what it had begun here."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    last = ((run.read_run() or {}).get("generations") or [{}])[-1]
    return bool((last.get("host"), last.get("launcher")) == (socket.gethostname(), os.getppid()))


def find_preempted_restart(run: RunDir) -> str | None:
    """Why a run was asked to end that its launcher starts again at once; None for another start."""
    record = (run.read_run() or {}) if is_restarted(run) else {}
    return str(record.get("why")) if record.get("state") == "preempted" else None


class Notice:
    """What this process was told: at most one line, the first.

    Args:
        rank: of this process, for the line.
        save_before_seconds: how long before a known time limit to save; None to ignore it.

    Attributes:
        asked_at_boundaries: whether somebody will ask `is_given`; before, a signal raises Interrupted.

    Raises: SettingsError where a time limit is to be kept and none is known.
    """

    def __init__(self, rank: int, save_before_seconds: float | None = None) -> None:
        self.rank = rank
        self.why: str | None = None
        self.due: float | None = None
        self.asked_at_boundaries = True
        self._since = 0.0
        self._names: tuple[str, ...] = ()
        if save_before_seconds is not None:
            limit = find_time_limit()
            if limit is None:
                raise SettingsError(
                    f"save_before_seconds is {save_before_seconds:g}, but no time limit is known",
                    expected="a Slurm job with a time limit (SLURM_JOB_ID, and squeue at hand)",
                    do="submit with --time, or remove --save_before_seconds",
                )
            self.due = time.monotonic() + limit - save_before_seconds - time.time()  # whoever sets the clock later

    def note(self, number: int, _: object = None) -> None:
        """The signal handler."""
        name = signal.Signals(number).name
        again, self.why = self.why, self.why or f"{name} on rank {self.rank}"
        if not self.asked_at_boundaries:
            interrupt(name_signal(number))
        if again is None:
            self._since = time.monotonic()
            if name == "SIGINT" and os.isatty(2):
                write_line("SIGINT: saving at the end of this step (once more: ending now)")
        elif name == "SIGINT" and name not in self._names and time.monotonic() - self._since > REPEAT_SECONDS:
            end_now(Interrupted(self.why))

    def is_given(self) -> bool:
        """Whether this process was told to end; to be asked at step boundaries."""
        if self.due is not None and time.monotonic() >= self.due:
            self.why = self.why or "the job's time limit is near"
        return self.why is not None

    @contextmanager
    def heard(self, names: tuple[str, ...] = SIGNALS) -> Iterator[None]:
        """Notes these signals and Ctrl-C meanwhile, instead of dying of them."""
        self._names = names
        heard = {*names} | ({"SIGINT"} if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else set())
        before = {name: signal.signal(getattr(signal, name), self.note) for name in sorted(heard)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler or signal.SIG_DFL)


def choose_signals(asked: str | None) -> tuple[str, ...]:
    """What to listen for. Raises: SettingsError for a name that is no signal's, or one that cannot be caught."""
    if asked is None:
        return SIGNALS
    name = asked.upper() if asked.upper().startswith("SIG") else f"SIG{asked.upper()}"
    if name not in NAMES:
        raise SettingsError(
            f"preempt_signal is {asked!r}",
            expected=f"one of {', '.join(NAMES)}",
            do="name a signal, or remove the flag",
        )
    return (name,)


def find_time_limit() -> float | None:
    """When Slurm ends this job, in seconds since 1970; None where nobody says."""
    if "SLURM_JOB_END_TIME" in os.environ:
        return float(os.environ["SLURM_JOB_END_TIME"])
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    words = ["squeue", "--noheader", "--job", job, "--format", "%e"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        return datetime.fromisoformat(found).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
