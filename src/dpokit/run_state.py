"""Keeps run.json up to date: a run's settings and machine at its start, and how it ended."""

import errno
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import Trainer

from dpokit.console import say
from dpokit.credentials import hide_secrets
from dpokit.distributed.processes import find_machine, is_main_process
from dpokit.errors import DpokitError, RunFolderError, find_disk_trouble, is_missing_file
from dpokit.interrupts import Preempted, find_interruption
from dpokit.rundir import RunDir
from dpokit.settings.load import Settings
from dpokit.settings.mixture import is_local

SPACE_SECONDS = 10.0
DELETION_SECONDS = 5.0
RESERVE = ".reserve"
RESERVE_BYTES = 2**16  # disk space that a run reserves, to record its end even if the disk is full then
PACKAGES = ("dpokit", "torch", "transformers", "trl", "accelerate", "datasets", "peft")


@contextmanager
def keep_record(run: RunDir, settings: Settings, world_size: int) -> Iterator[None]:
    """Records in run.json that the run is running, then finished, preempted or failed, and why.

    Raises: RunFolderError in place of an error about the disk or a lost run folder.
    """

    def record(**changes: Any) -> None:
        if is_main_process():
            run.write_run(**changes)

    reserve = run.path / RESERVE

    def record_end(**changes: Any) -> None:
        reserve.unlink(missing_ok=True)
        record(**changes)

    try:
        if is_main_process():
            reserve.unlink(missing_ok=True)
            reserve.write_bytes(os.urandom(RESERVE_BYTES))
        record(
            recipe=settings.recipe,
            state="running",
            why=None,
            error=None,
            judged=None,
            world_size=world_size,
            versions={name: version(name) for name in PACKAGES},
            settings=settings.record(),
            machine=find_machine(on_cpu=settings.training.use_cpu),
            local=find_local(settings),
        )
        yield
        record_end(state="finished")
    except BaseException as error:
        end = error if isinstance(error, Preempted) else find_interruption(error)
        if end is not None:
            try:
                record_end(state="preempted", why=end.why)
            except OSError as disk:
                raise find_disk_trouble(disk) or disk from disk
            raise end from None
        trouble = (
            error if isinstance(error, DpokitError) else _await_lost_folder(run, error) or find_disk_trouble(error)
        )
        why = str(trouble or hide_secrets("".join(traceback.format_exception_only(error)).strip()))
        kind = type(trouble or error).__name__
        try:
            _record_patiently(lambda: record_end(state="failed", why=why, error=kind))
        except (OSError, RunFolderError):
            if not isinstance(trouble, RunFolderError):  # whose own message says so
                say(f"{run.run_json} could not be updated")
        if trouble is not None and trouble is not error:
            raise trouble from error
        raise


def record_preemption(run: RunDir, why: str) -> None:
    """Writes to run.json that a signal ended this start, if it owns the folder and has neither finished nor failed.

    Raises: OSError, RunFolderError.
    """
    if run.token and is_main_process() and (run.read_run() or {}).get("state") not in ("finished", "failed"):
        (run.path / RESERVE).unlink(missing_ok=True)
        run.write_run(state="preempted", why=why, error=None)


def _await_lost_folder(run: RunDir, error: BaseException) -> RunFolderError | None:
    """The error of a lost run folder; None if it is whole.

    A folder that is being deleted loses its files one by one: where another file is missing, run.json may be gone a
    moment later.
    """
    end = time.monotonic() + (DELETION_SECONDS if is_missing_file(error) else 0)
    while (lost := run.find_lost_folder()) is None and time.monotonic() < end:
        time.sleep(0.05)
    return lost


def _record_patiently(write: Callable[[], None]) -> None:
    """Writes, and retries on a full disk: other ranks may still free the space of a failed save. Raises: OSError."""
    end = time.monotonic() + SPACE_SECONDS
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or time.monotonic() > end:
                raise
            time.sleep(0.5)


def find_local(settings: Settings) -> list[str]:
    """The flags of model and data that name local paths; of a mixture, the places of the sources that do.

    A model card must not take them for names on the Hub.
    """
    name = settings.model.model_name_or_path
    sources = [source for source in settings.data.sources() if is_local(source)]
    is_single = settings.data.dataset_name is not None and len(settings.data.sources()) == 1
    return [
        *(["model_name_or_path"] if name and Path(name).expanduser().exists() else []),
        *("dataset_name" if is_single else source.place for source in sources),
    ]


def find_kept_evaluation(trainer: Trainer) -> dict[str, Any] | None:
    """Step, metric and value of the evaluation whose weights were kept; None if the last weights were kept."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end or state.best_metric is None or not math.isfinite(state.best_metric):
        return None
    return {"step": state.best_global_step, "metric": trainer.args.metric_for_best_model, "value": state.best_metric}
