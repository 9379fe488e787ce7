"""Collective work of all processes: decisions, cached builds, and error messages when a process is lost."""

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


def is_first_to_report() -> bool:
    """Whether this process shows the error that ended its run: True for the first process that calls this function.

    Other ranks have the same error or a consequence of it. Before the process group exists, True on local rank 0 of
    each machine.
    """
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    try:
        store = _get_default_store()
        return bool(store.add("dpokit/errors_shown", 1) == 1)
    except RuntimeError:  # the process that hosts the store has ended
        return True


# Messages of gloo, NCCL and the rendezvous when another process is gone, cannot be reached or does not answer.
_LOST = re.compile(
    "timed out|timeout|connection (closed|reset) by peer|connection refused|address already in use", re.I
)
AFTERMATH_SECONDS = 2.0  # how long the remaining ranks wait for each other's sign of life


@contextmanager
def peer_errors(timeout_seconds: int, where: Callable[[], str] = str) -> Iterator[None]:
    """Turns errors about a lost or silent process, or about memory, into MachineError.

    If a signal ended the other process, raises Interrupted. The reason why this process ends is written to the store,
    because other ranks see only its consequence.

    Args:
        timeout_seconds: the collective time-out in force (`--ddp_timeout`), for the message.
        where: returns the progress of the run for the message, such as " at step 3".
    """
    rank = os.environ.get("RANK", "0")
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        of_torch = isinstance(error, dist.DistError) or re.search("gloo|pair closure", text)
        if of_torch and _LOST.search(text):
            raise _lost_peer(text[:200], timeout_seconds, where()) from error
        _publish_cause(f"rank {rank}{where()}: {type(error).__name__}: {text[:300]}")
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
            raise MachineError(
                f"rank {rank} ran out of memory{where()}: {text[:200]}",
                expected="a step that fits the device",
                do="lower --per_device_train_batch_size and raise --gradient_accumulation_steps, lower --max_length, "
                "or let `dpokit plan` find a placement that fits",
            ) from error
        raise
    except Preempted as end:
        _publish_cause(end.why, "dpokit/preempted")
        raise
    except Exception as error:
        _publish_cause(f"rank {rank}{where()}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise


def _publish_cause(text: str, key: str = "dpokit/cause") -> None:
    with suppress(RuntimeError):
        if dist.is_initialized():
            _get_default_store().compare_set(key, "", text)


def _find_gone() -> tuple[list[int], str]:
    """The ranks without a sign of life, and the cause that the first of them published; rank 0 if the store is gone.

    Raises: Interrupted if a signal ended one of them.
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
        return [0], ""  # rank 0 hosts the store
    return gone, cause


def _lost_peer(text: str, timeout_seconds: float, where: str = "") -> MachineError:
    rank = os.environ.get("RANK", "0")
    if not dist.is_initialized():
        master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return MachineError(
            f"rank {rank} could not join the other processes at {master} within {timeout_seconds:g} s: {text}",
            expected="a first process (rank 0) that listens there, and a network that reaches it",
            do="check the address and the port (--main_process_ip, --main_process_port), and that rank 0 was started",
        )
    gone, cause = _find_gone()
    who = " and ".join(f"rank {other}" for other in gone) or "another process"
    return MachineError(
        f"rank {rank} lost {who}{where}, which ended or did not respond within {timeout_seconds:g} s: {cause or text}",
        expected="every process to take part in every step",
        do="look for the first error above, on any rank or machine (killed? out of memory?); if a process only "
        "needed longer, raise --ddp_timeout",
    )


def decide_on_main_process(decide: Callable[[], T]) -> T:
    """The result of `decide` on rank 0 (any picklable object), on every rank; or rank 0's DpokitError is raised."""
    from accelerate.utils import broadcast_object_list

    box: list[tuple[Any, DpokitError | None]] = [_try(decide) if is_main_process() else (None, None)]
    broadcast_object_list(box, from_process=0)
    answer, error = box[0]
    if error is not None:
        raise error
    return cast(T, answer)


def build_on_each_machine_first(build: Callable[[], T], *, timeout_seconds: float) -> T:
    """The result of `build` on every rank: one process of each machine builds, then the others use its cached files.

    A build may take longer than the time-out of a collective, so no rank waits in one. A building process gives signs
    of life through the store, and the others wait until these stop for `timeout_seconds`.

    Raises:
        DpokitError: an error of any machine, on every rank, so that no rank waits for one that is gone.
        MachineError: a building process gives no sign of life.
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
