"""Preemption: a signal on any rank makes all ranks save and exit at the next boundary.

A boundary is the end of a step, of a batch of an evaluation, or of a part of the reference that is kept on disk. Before
the first one, a single process has nothing to save, so a signal ends it at once (interrupts.py).

The signals are SIGTERM and SIGUSR1, or the one that `--preempt_signal` names, and Ctrl-C. Ctrl-C before the first step
ends all processes at once; a second Ctrl-C ends them without a save. A known time limit has the same effect as a
signal, `--save_before_seconds` ahead of it.
"""

import _thread
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
LAUNCHER = "TORCHELASTIC_RUN_ID"  # a variable of the processes that torchrun starts
LAUNCHER_SECONDS = 10.0  # within this time the launcher of one process ends after Ctrl-C
NAMES = sorted(name.name for name in signal.Signals if name.name not in ("SIGKILL", "SIGSTOP"))


class EvaluationCut(Preempted):
    """The run is preempted during an evaluation, and its last step may still be unsaved."""


def is_restarted(run: RunDir) -> bool:
    """Whether the launcher (`--max_restarts`) restarts, with the same flags, a run that it started in this folder."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    last = ((run.read_run() or {}).get("generations") or [{}])[-1]
    return bool((last.get("host"), last.get("launcher")) == (socket.gethostname(), os.getppid()))


def find_preempted_restart(run: RunDir) -> str | None:
    """Why a run was preempted that its launcher now restarts; None if this start is not such a restart."""
    record = (run.read_run() or {}) if is_restarted(run) else {}
    return str(record.get("why")) if record.get("state") == "preempted" else None


class Notice:
    """A request to this process to save and exit, by a signal or a time limit.

    Args:
        rank: of this process, for the text.
        save_before_seconds: how long before a known time limit to save; None to ignore the limit.

    Attributes:
        why: text of the first request; None before it.
        due: when the time limit makes one, by `time.monotonic`; None without a limit.
        checked_at_boundaries: whether the trainer will call `is_given`; if not, a signal raises Interrupted.
        is_training: whether the first step has begun; before it, Ctrl-C raises Interrupted.

    Raises: SettingsError if `save_before_seconds` is set and no time limit is known.
    """

    def __init__(self, rank: int, save_before_seconds: float | None = None) -> None:
        self.rank = rank
        self.why: str | None = None
        self.due: float | None = None
        self.checked_at_boundaries = True
        self.is_training = False
        self._first, self._since = "", 0.0
        self._is_ending = False
        self._names: tuple[str, ...] = ()
        if save_before_seconds is not None:
            limit = find_time_limit()
            if limit is None:
                raise SettingsError(
                    f"save_before_seconds is {save_before_seconds:g}, but no time limit is known",
                    expected="a Slurm job with a time limit, from SLURM_JOB_END_TIME, or from SLURM_JOB_ID and squeue",
                    do="submit with --time, or remove --save_before_seconds",
                )
            # By a clock that nobody can set.
            self.due = time.monotonic() + limit - save_before_seconds - time.time()

    def note(self, number: int, _: object = None) -> None:
        """Records a signal: the handler. A second Ctrl-C ends the process."""
        name = signal.Signals(number).name
        is_ctrl_c = name == "SIGINT" and name not in self._names
        is_first, self.why = self.why is None, self.why or f"{name} on rank {self.rank}"
        if is_first:
            self._first, self._since = name, time.monotonic()
        if not (self.is_training if is_ctrl_c else self.checked_at_boundaries) and not self._is_ending:
            self._is_ending = True
            interrupt(name_signal(number))
        elif is_first and is_ctrl_c and os.isatty(2):
            _announce_save()
        elif not is_first and self._is_second_ctrl_c(name, is_ctrl_c):
            end_now(Interrupted(self.why))

    def _is_second_ctrl_c(self, name: str, is_ctrl_c: bool) -> bool:
        """Whether a signal after the first one comes from a second Ctrl-C; torchrun turns that into SIGTERM."""
        from_launcher = self._first == "SIGINT" and name == "SIGTERM" and LAUNCHER in os.environ
        return (is_ctrl_c or from_launcher) and time.monotonic() - self._since > REPEAT_SECONDS

    def is_given(self) -> bool:
        """Whether this process has to save and exit; to be called at boundaries."""
        if self.due is not None and time.monotonic() >= self.due:
            self.why = self.why or "the job's time limit is near"
        return self.why is not None

    @contextmanager
    def listen(self, names: tuple[str, ...] = SIGNALS) -> Iterator[None]:
        """Records these signals and Ctrl-C inside the block, so that they do not end the process."""
        self._names = names
        handled = {*names} | ({"SIGINT"} if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else set())
        before = {name: signal.signal(getattr(signal, name), self.note) for name in sorted(handled)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler or signal.SIG_DFL)


def _announce_save() -> None:
    """Writes a line to the terminal after the first Ctrl-C; called by a signal handler."""
    if LAUNCHER in os.environ:
        seconds = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")
        write_line(
            f"SIGINT: saving at the end of this step; the launcher waits {seconds} s for it (once more: ending now)"
        )
    else:
        write_line("SIGINT: saving at the end of this step (once more: ending now)")
        _thread.start_new_thread(_report_lost_launcher, (os.getppid(),))


def _report_lost_launcher(parent: int) -> None:
    """Writes a line if accelerate's launcher of one process, the parent, ends at Ctrl-C and leaves this one behind."""
    end = time.monotonic() + LAUNCHER_SECONDS
    while time.monotonic() < end:
        time.sleep(0.1)
        if os.getppid() != parent:
            pid = os.getpid()
            write_line(f"the launcher ended, but process {pid} is still saving (to end it now: kill -INT {pid})")
            return


def choose_signals(flag: str | None) -> tuple[str, ...]:
    """The signals to listen for, from `--preempt_signal`.

    Raises: SettingsError for an unknown signal, or one that no process can catch.
    """
    if flag is None:
        return SIGNALS
    name = flag.upper() if flag.upper().startswith("SIG") else f"SIG{flag.upper()}"
    if name not in NAMES:
        raise SettingsError(
            f"preempt_signal is {flag!r}",
            expected=f"one of {', '.join(NAMES)}",
            do="name a signal, or remove the flag",
        )
    return (name,)


def find_time_limit() -> float | None:
    """When Slurm ends this job, in seconds since 1970; None outside of Slurm, or if Slurm does not tell."""
    if "SLURM_JOB_END_TIME" in os.environ:
        return float(os.environ["SLURM_JOB_END_TIME"])
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    command = ["squeue", "--noheader", "--job", job, "--format", "%e"]
    try:
        end = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
        return datetime.fromisoformat(end).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
