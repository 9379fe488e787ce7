"""SIGINT, SIGTERM and SIGUSR1 end a program with one line on stderr and exit code 75, whatever it does. No torch.

While a program imports, a signal ends it at once. While it works (`working`) the signal raises Interrupted, so that
half-made files and processes it started are removed. Training saves first: see checkpoint/preempt.py. Where a library
keeps the main thread, the program ends without clean-up after GRACE_SECONDS.

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

EXIT_CODE = 75  # EX_TEMPFAIL, never 0: a run that was cut short must not look completed
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A library may catch Interrupted, or wait for a thread that ends much later.
GRACE_SECONDS = 10.0
AGAIN_SECONDS = 0.1
# A second Ctrl-C ends a process that is still saving. Sooner, it is the first one once more: a launcher's worker gets
# it from the terminal and from the launcher.
REPEAT_SECONDS = 1.0


class Preempted(SystemExit):
    """The run was asked to end, and its state is saved."""

    def __init__(self, why: str) -> None:
        super().__init__(EXIT_CODE)
        self.why = why


class Interrupted(Preempted):
    """A signal came where nothing has to be saved first.

    Args:
        why: which signal, and on which rank.
        advice: what the user does next.
    """

    def __init__(self, why: str, advice: str = "run the same command again to go on") -> None:
        super().__init__(why)
        self.advice = advice


class _Program:
    """This process, while `ending_on_signals` is in force; `pid` is 0 before.

    Attributes:
        working: whether a signal raises Interrupted.
        interrupted: by the first signal.
        record: writes down why the program ends; None where there is nothing to write to.
    """

    pid = 0
    working = False
    interrupted: Interrupted | None = None
    since = 0.0
    told = False
    record: Callable[[str], None] | None = None


_program = _Program()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """For the main function of a program: ends it with one line and code 75 when one of SIGNALS comes."""
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

    def find_lost(lost: Any) -> None:
        """Python prints and drops an exception that is raised in a finalizer or a callback."""
        if isinstance(lost.exc_value, Interrupted):
            end_now(lost.exc_value)
        hook(lost)

    sys.unraisablehook = find_lost
    try:
        yield
    except BaseException as error:
        end = error if isinstance(error, Preempted) else find_interruption(error)
        if end is None:
            raise
        handlers = dict.fromkeys(handlers, signal.SIG_IGN)  # the same signal may come again
        if isinstance(end, Interrupted):
            _tell(end)
        raise SystemExit(EXIT_CODE) from None
    finally:
        for number, before in handlers.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(-1)
        os.close(writer)
        if _program.interrupted is None:  # else it must still end soon
            _program.pid = 0
        sys.unraisablehook = hook
        atexit.register(_ignore, list(handlers))  # the interpreter takes a second to unload torch


@contextmanager
def working() -> Iterator[None]:
    """Inside, a signal raises Interrupted; outside, it ends the process at once."""
    before, _program.working = _program.working, True
    try:
        yield
    except KeyboardInterrupt:  # of a library with a handler of its own: hf_xet
        interrupt(name_signal(signal.SIGINT))
    finally:
        _program.working = before


@contextmanager
def recording(record: Callable[[str], None]) -> Iterator[None]:
    """Inside, `record` gets the reason before a signal ends the program, also where that ends without clean-up."""
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
    """Inside, SIGINT and SIGTERM raise KeyboardInterrupt, for code that stops one answer or a server by it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def find_interruption(error: BaseException) -> Interrupted | None:
    """The interruption that an error is, or follows from; None where no signal came."""
    return error if isinstance(error, Interrupted) else _program.interrupted


def interrupt(why: str) -> Never:
    """Raises Interrupted; in a program, also makes sure that it ends soon."""
    end = Interrupted(why)
    if _program.pid and _program.interrupted is None:
        _program.interrupted, _program.since = end, time.monotonic()
        if not _program.working:
            end_now(end)
        _thread.start_new_thread(_end_late, (end,))  # not threading's: the signal may come while that holds its lock
    raise end


def end_now(end: Interrupted) -> Never:
    """Ends a program without clean-up; as a library, raises `end`."""
    if not _program.pid:
        raise end
    _record(end)
    _tell(end)
    os._exit(EXIT_CODE)


def name_signal(number: int) -> str:
    """`SIGTERM`; `SIGTERM on rank 1` of several processes."""
    rank = f" on rank {os.environ.get('RANK', '0')}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    return f"{signal.Signals(number).name}{rank}"


def write_line(line: str) -> None:
    """Writes to stderr from a signal handler, which may have interrupted a print. Rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            os.write(2, (("\n" if os.isatty(2) else "") + line + "\n").encode())  # below a progress bar


def _handle(number: int, _: object = None) -> None:
    if os.getpid() != _program.pid:  # a forked helper: its parent tells
        os._exit(EXIT_CODE)
    if (end := _program.interrupted) is None:
        interrupt(name_signal(number))
    elif number == signal.SIGINT and time.monotonic() - _program.since > REPEAT_SECONDS:
        end_now(end)


def _end_late(end: Interrupted) -> None:
    time.sleep(GRACE_SECONDS)
    end_now(end)


def _watch(reader: int) -> None:
    """Ends the program where its main thread is in a library's code, an upload say, and does not get to the handler.

    Args:
        reader: where the system writes the number of each signal that comes.
    """
    main_thread = threading.main_thread().ident or 0
    while received := os.read(reader, 1):
        [number] = received
        end = time.monotonic() + GRACE_SECONDS
        while _is_unheard(number) and time.monotonic() < end:
            time.sleep(AGAIN_SECONDS)
            if _is_unheard(number):  # a wait that began at the same moment did not notice the signal
                signal.pthread_kill(main_thread, number)
        if _is_unheard(number):
            end_now(Interrupted(name_signal(number)))
    os.close(reader)


def _is_unheard(number: int) -> bool:
    is_ours = number in SIGNALS and signal.getsignal(number) is _handle
    return is_ours and _program.pid == os.getpid() and _program.interrupted is None


def _leave_to_parent() -> None:
    """A forked helper gets signals of its own, which are not told to the parent."""
    if _program.pid:
        with suppress(ValueError):  # not the main thread, which has none
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_to_parent)


def _record(end: Preempted) -> None:
    if _program.record is not None:
        with suppress(Exception):  # the folder is gone, or another start's: the program ends all the same
            _program.record(end.why)


def _tell(end: Interrupted) -> None:
    if not _program.told:
        _program.told = True
        write_line(f"interrupted by {end.why}; {end.advice}")


def _ignore(numbers: Iterable[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
