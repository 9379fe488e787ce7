"""SIGINT, SIGTERM and SIGUSR1 end a program with one line on stderr and exit code 75. No torch.

While a program imports, a signal ends it at once. While it works (`working`), the signal raises Interrupted, so that
the program removes half-written files and ends the processes it started. Training saves first: see
checkpoint/preempt.py. If library code keeps the main thread, the program ends without clean-up after GRACE_SECONDS.

A signal that was ignored when the program began stays ignored, as under nohup and in launch/train.sbatch.
"""

import _thread
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Never

EXIT_CODE = 75  # EX_TEMPFAIL, never 0: an interrupted run must not look completed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A library may catch Interrupted, or wait for a thread that ends much later.
GRACE_SECONDS = 10.0
AGAIN_SECONDS = 0.1
# A second Ctrl-C ends a process that is still saving. Within this time it counts as the first one, which a launcher's
# worker receives twice: from the terminal and from the launcher.
REPEAT_SECONDS = 1.0


class Preempted(SystemExit):
    """A signal ended the run after it saved its state."""

    def __init__(self, why: str) -> None:
        super().__init__(EXIT_CODE)
        self.why = why


class Interrupted(Preempted):
    """A signal ended the program while there was no state to save.

    Args:
        why: the signal's name, and the rank that received it.
        advice: the next thing for the user to do.
    """

    def __init__(self, why: str, advice: str = "run the same command again to go on") -> None:
        super().__init__(why)
        self.advice = advice


class _Program:
    """The state of this process inside `ending_on_signals`.

    Attributes:
        pid: this process; 0 outside `ending_on_signals`.
        working: whether a signal raises Interrupted; else it ends the process.
        interrupted: the exception for the first signal.
        since: monotonic time of the first signal.
        dropped: whether Python dropped the exception, so that the next signal raises it again.
        reported: whether the line on stderr is written.
        record: writes the reason for the end to a file; None if there is no such file.
    """

    pid = 0
    working = False
    interrupted: Interrupted | None = None
    since = 0.0
    dropped = False
    reported = False
    record: Callable[[str], None] | None = None


_program = _Program()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Around a program's main function: a signal of SIGNALS ends the program with one line and exit code 75."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: before or signal.SIG_DFL for number, before in handlers.items() if before != signal.SIG_IGN}
    _program.pid = os.getpid()
    for number in handlers:
        signal.signal(number, _handle)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _thread.start_new_thread(_watch, (reader,))
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    hook = sys.unraisablehook

    def raise_again_if_interrupted(dropped: Any) -> None:
        """Python prints and drops an exception that is raised in a finalizer or a callback, such as an import's."""
        if isinstance(dropped.exc_value, Interrupted):
            _program.dropped = True
            _thread.start_new_thread(_raise_again, (dropped.exc_value,))
        else:
            hook(dropped)

    sys.unraisablehook = raise_again_if_interrupted
    try:
        yield
    except BaseException as error:
        end = error if isinstance(error, Preempted) else find_interruption(error)
        if end is None:
            raise
        handlers = dict.fromkeys(handlers, signal.SIG_IGN)  # the same signal may come again
        if isinstance(end, Interrupted):
            _report(end)
        raise SystemExit(EXIT_CODE) from None
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(-1)
        os.close(writer)
        if _program.interrupted is None:  # an interrupted program must still end soon
            _program.pid = 0
        sys.unraisablehook = hook
        atexit.register(_ignore, list(handlers))  # the interpreter takes a second to unload torch


@contextmanager
def working() -> Iterator[None]:
    """Inside, a signal raises Interrupted; outside, it ends the process at once."""
    before, _program.working = _program.working, True
    try:
        yield
    except KeyboardInterrupt:  # raised by a library with its own handler, such as hf_xet
        interrupt(name_signal(signal.SIGINT))
    finally:
        _program.working = before


@contextmanager
def recording(record: Callable[[str], None]) -> Iterator[None]:
    """Inside, `record` is called with the reason before a signal ends the program, also if it ends without clean-up."""
    before, _program.record = _program.record, record
    try:
        yield
    except BaseException as error:
        end = error if isinstance(error, Preempted) else find_interruption(error)
        if end is not None:
            _record(end)
        raise
    finally:
        _program.record = before


@contextmanager
def left_to_python() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise KeyboardInterrupt, by which chat stops one answer and a server ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def find_interruption(error: BaseException) -> Interrupted | None:
    """The interruption that an error is or follows from; None if no signal came."""
    return error if isinstance(error, Interrupted) else _program.interrupted


def interrupt(why: str) -> Never:
    """Raises Interrupted; inside `ending_on_signals`, also ends the program after GRACE_SECONDS at the latest."""
    end = Interrupted(why)
    if _program.pid and _program.interrupted is None:
        _program.interrupted, _program.since = end, time.monotonic()
        if not _program.working:
            end_now(end)
        _thread.start_new_thread(_end_late, (end,))  # threading has a lock that the interrupted code may hold
    raise end


def end_now(end: Interrupted) -> Never:
    """Ends the program without clean-up; outside `ending_on_signals`, raises `end`."""
    if not _program.pid:
        raise end
    _record(end)
    _report(end)
    os._exit(EXIT_CODE)


def name_signal(number: int) -> str:
    """`SIGTERM`, or `SIGTERM on rank 1` if there are several processes."""
    rank = f" on rank {os.environ.get('RANK', '0')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    return f"{signal.Signals(number).name}{rank}"


def write_line(line: str) -> None:
    """Writes to stderr from a signal handler, which may have interrupted a print; on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, (("\n" if os.isatty(2) else "") + line + "\n").encode())  # below a progress bar


def _handle(number: int, _: object = None) -> None:
    if os.getpid() != _program.pid:  # a forked child: its parent writes the line
        os._exit(EXIT_CODE)
    if (end := _program.interrupted) is None:
        interrupt(name_signal(number))
    elif _program.dropped:
        _program.dropped = False
        raise end
    elif number == signal.SIGINT and time.monotonic() - _program.since > REPEAT_SECONDS:
        end_now(end)


def _raise_again(end: Interrupted) -> None:
    """Sends the main thread a signal, whose handler raises the dropped exception where it is not dropped."""
    time.sleep(AGAIN_SECONDS)
    number = next((number for number in SIGNALS if signal.getsignal(number) is _handle), None)
    if number is None:  # the program's main function has returned
        end_now(end)
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _end_late(end: Interrupted) -> None:
    time.sleep(GRACE_SECONDS)
    end_now(end)


def _watch(reader: int) -> None:
    """Ends the program if its main thread is in library code, such as an upload, and does not reach the handler.

    Args:
        reader: the pipe end from which the number of each received signal is read.
    """
    main_thread = threading.main_thread().ident or 0
    while received := os.read(reader, 1):
        [number] = received
        end = time.monotonic() + GRACE_SECONDS
        while _is_unhandled(number) and time.monotonic() < end:
            time.sleep(AGAIN_SECONDS)
            if _is_unhandled(number):  # a system call that began at the same moment missed the signal
                signal.pthread_kill(main_thread, number)
        if _is_unhandled(number):
            end_now(Interrupted(name_signal(number)))
    os.close(reader)


def _is_unhandled(number: int) -> bool:
    has_handler = number in SIGNALS and signal.getsignal(number) is _handle
    return has_handler and _program.pid == os.getpid() and _program.interrupted is None


def _leave_to_parent() -> None:
    """In a forked child: signals of the child are no longer written to the parent's pipe."""
    if _program.pid:
        with suppress(ValueError):  # raised outside the main thread, which has no wake-up pipe
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)


def _record(end: Preempted) -> None:
    if _program.record is not None:
        with suppress(Exception):  # if the folder is gone or taken over, the program still ends
            _program.record(end.why)


def _report(end: Interrupted) -> None:
    if not _program.reported:
        _program.reported = True
        write_line(f"interrupted by {end.why}; {end.advice}")


def _ignore(numbers: Iterable[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
