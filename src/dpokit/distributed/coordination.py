"""What the processes of a world do together: decide, build, speak; and what becomes of one that is lost."""

import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from threading import Event, Thread
from typing import Any, TypeVar, cast

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import Store, _get_default_store

from dpokit.distributed.processes import is_main_process
from dpokit.errors import OUT_OF_MEMORY, DpokitError, MachineError
from dpokit.interrupts import Interrupted, Preempted

T = TypeVar("T")
_builds = count()


def speaks_for_all() -> bool:
    """Whether this process shows an error that ended its run: the first of the world that asks does.

    Other ranks have met the same, or a consequence of it. Before the world is joined, one process per machine speaks.
    """
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        store = _get_default_store()
        return bool(store.add("dpokit/errors_shown", 1) == 1)
    except RuntimeError:  # the store went down with the process that kept it
        return True


# What gloo, NCCL and the rendezvous say when another process is gone, cannot be reached or does not answer.
_LOST = re.compile(
    "timed out|timeout|connection (closed|reset) by peer|connection refused|address already in use", re.I
)
AFTERMATH_SECONDS = 2.0  # how long the ranks that are left wait for each other's sign


@contextmanager
def peer_errors(timeout_seconds: int, where: Callable[[], str] = str) -> Iterator[None]:
    """Turns what is raised when another process is gone or silent, or memory runs out, into a MachineError.

    Into Interrupted, where a signal ended the other one. What ends this process is told to the others, who meet its
    consequence only.

    Args:
        timeout_seconds: the collective time-out in force (`--ddp_timeout`), for the message.
        where: says how far the run was, as in " at step 3".
    """
    rank = os.environ.get("RANK", "0")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        of_torch = isinstance(error, dist.DistError) or re.search("gloo|pair closure", text)
        if of_torch and _LOST.search(text):
            raise _lost_peer(text[:200], timeout_seconds, where()) from error
        _tell_cause(f"rank {rank}{where()}: {type(error).__name__}: {text[:300]}")
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
            raise MachineError(
                f"rank {rank} ran out of memory{where()}: {text[:200]}",
                expected="a step that fits the device",
                do="lower --per_device_train_batch_size and raise --gradient_accumulation_steps, lower --max_length, "
                "or let `dpokit plan` find a placement that fits",
            ) from error
        raise
    except Preempted as end:
        _tell_cause(end.why, "dpokit/preempted")
        raise
    except Exception as error:
        _tell_cause(f"rank {rank}{where()}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise


def _tell_cause(text: str, key: str = "dpokit/cause") -> None:
    with suppress(RuntimeError):
        if dist.is_initialized():
            _get_default_store().compare_set(key, "", text)


def _find_gone() -> tuple[list[int], str]:
    """Which ranks give no sign any more, and what the first of them said; the store may be gone, too.

    Raises: Interrupted where a signal ended one.
    """
    try:
        store, world = _get_default_store(), dist.get_world_size()
        store.set(f"dpokit/left/{dist.get_rank()}", "")
        time.sleep(AFTERMATH_SECONDS)
        gone = [rank for rank in range(world) if not store.check([f"dpokit/left/{rank}"])]
        if store.check(["dpokit/preempted"]):
            raise Interrupted(store.get("dpokit/preempted").decode())
        cause = store.get("dpokit/cause").decode() if store.check(["dpokit/cause"]) else ""
    except RuntimeError:
        return [0], ""  # which keeps the store
    return gone, cause


def _lost_peer(text: str, timeout_seconds: float, where: str = "") -> MachineError:
    rank = os.environ.get("RANK", "0")
    if not dist.is_initialized():
        master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return MachineError(
            f"rank {rank} could not join the other processes at {master} within {timeout_seconds:g} s: {text}",
            expected="a first process (rank 0) that listens there, and a network that lets it be reached",
            do="check the address and the port (--main_process_ip, --main_process_port), and that rank 0 was started",
        )
    gone, cause = _find_gone()
    who = " and ".join(f"rank {other}" for other in gone) or "another process"
    return MachineError(
        f"rank {rank} lost {who}{where}, or waited {timeout_seconds:g} s for it in vain: {cause or text}",
        expected="every process to take part in every step",
        do="look for the first error above, on any rank or machine (killed? out of memory?); where a process only "
        "needed longer, raise --ddp_timeout",
    )


def decide_on_main_process(decide: Callable[[], T]) -> T:
    """Rank 0 decides; every rank gets its answer (any picklable object), or raises its DpokitError."""
    from accelerate.utils import broadcast_object_list

    box: list[tuple[Any, DpokitError | None]] = [_try(decide) if is_main_process() else (None, None)]
    broadcast_object_list(box, from_process=0)
    answer, error = box[0]
    if error is not None:
        raise error
    return cast(T, answer)


def build_on_each_machine_first(build: Callable[[], T], *, timeout_seconds: float) -> T:
    """What `build` returns, on every rank: one process of each machine builds, then the others find its cached files.

    This may take longer than a collective is waited for. So nobody waits in one: whoever builds gives signs of life
    through the store, and only a silence of `timeout_seconds` ends the wait.

    Raises:
        DpokitError: an error of any machine, on every rank, so that none waits for a rank that is gone.
        MachineError: a process that builds is silent.
    """
    state = PartialState()
    if state.num_processes == 1:
        return build()
    store, name = _get_default_store(), f"dpokit/build/{next(_builds)}"
    result: Any = None
    if state.is_local_main_process:
        with _signs_of_life(store, f"{name}/life/{state.process_index}", timeout_seconds / 10):
            result, error = _try(build)
        if error is not None:
            store.set(f"{name}/error", pickle.dumps(error).hex())
    store.set(f"{name}/done/{state.process_index}", "")
    for rank in range(state.num_processes):
        _wait_for(store, name, rank, timeout_seconds)
    if store.check([f"{name}/error"]):
        raise pickle.loads(bytes.fromhex(store.get(f"{name}/error").decode()))
    return cast(T, result) if state.is_local_main_process else build()


@contextmanager
def _signs_of_life(store: Store, key: str, every_seconds: float) -> Iterator[None]:
    ended = Event()

    def count_up() -> None:
        while not ended.wait(every_seconds):
            store.add(key, 1)

    thread = Thread(target=count_up, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _wait_for(store: Store, name: str, rank: int, timeout_seconds: float) -> None:
    signs, since = 0, time.monotonic()
    while not store.check([f"{name}/done/{rank}"]):
        if (now := store.add(f"{name}/life/{rank}", 0)) != signs:
            signs, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_seconds:
            raise _lost_peer(f"rank {rank} gave no sign of life while it prepared the data", timeout_seconds)
        time.sleep(min(1.0, timeout_seconds / 20))


def _try(call: Callable[[], T]) -> tuple[T | None, DpokitError | None]:
    try:
        return call(), None
    except DpokitError as error:
        return None, error
