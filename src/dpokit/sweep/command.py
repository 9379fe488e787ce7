"""What `dpokit sweep` does: a space is searched, gone on with, or watched."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpokit.cluster.slurm import Job
from dpokit.errors import MachineError, SettingsError
from dpokit.sweep.slurm import Queue
from dpokit.sweep.space import Space, load_space

TPE_TRIALS = 4


def sweep(
    path: Path,
    *,
    output_dir: Path | None,
    storage: str | None,
    jobs: int | None,
    timeout_seconds: float,
    watch_only: bool,
    job: Job | None = None,
) -> dict[str, Any] | None:
    """Searches until every trial has ended; what sweep.json holds then, None where the user left before.

    Args:
        path: SPACE.yaml.
        output_dir: the search's folder; None for sweeps/NAME.
        storage: Optuna's URL; None for a file in the folder.
        jobs: runs side by side; None for one, or under Slurm for all (of TPE for those of TPE_TRIALS).
        timeout_seconds: a run that wrote nothing for so long is ended.
        watch_only: show what others do, and start nothing.
        job: what each run has under Slurm; None to train here. Recipe, placement and flags are the space's.

    Raises: DpokitError: what the user can mend.
    """
    for name, number in {"--jobs": jobs, "--trial-timeout": timeout_seconds}.items():
        if number is not None and number <= 0:
            raise SettingsError(f"{name} is {number}", expected="a number above 0", do=f"correct {name}")
    if importlib.util.find_spec("optuna") is None:
        raise MachineError(
            "Optuna is not installed", expected="the extra for searches", do="pip install 'dpokit[sweep]'"
        )
    from dpokit.sweep.live_table import Screen, watch
    from dpokit.sweep.ranking import write_outcome
    from dpokit.sweep.study import Search
    from dpokit.sweep.worker import Worker

    space = load_space(path)
    folder = output_dir or Path("sweeps") / path.stem
    _check_begun(folder, storage=storage, watch_only=watch_only, slurm=job is not None)
    search = Search(space, folder, storage=storage, name=folder.resolve().name)
    if watch_only:
        search.leave()
        watch(space, search)
        return write_outcome(space, search)
    if jobs is None:
        # TPE learns from trials that have ended: all at once, it would draw at random.
        trials = min(space.trials, TPE_TRIALS) if space.search == "tpe" else space.trials
        jobs = 1 if job is None else trials * space.seeds
    queue = None if job is None else build_queue(space, job, group=search.study.study_name)
    with Screen(space, search) as screen:
        worker = Worker(space, search, jobs=jobs, timeout_seconds=timeout_seconds, show=screen.show, queue=queue)
        over = worker.work()
    return write_outcome(space, search) if over else None


def _check_begun(folder: Path, *, storage: str | None, watch_only: bool, slurm: bool) -> None:
    """Raises SettingsError where a search is to go on otherwise than it was begun: runs would be started twice."""
    begun, kept = (folder / "workers").is_dir(), (folder / "study.db").is_file()
    if watch_only and not begun:
        raise SettingsError(f"{folder} holds no search", expected="one that was begun", do="leave out --watch")
    # A storage that could not be reached leaves workers, but no trial.
    if begun and storage is None and not kept and (watch_only or any(folder.glob("trial-*"))):
        raise SettingsError(
            f"the search in {folder} was begun with --storage", expected="the same storage", do="--storage URL, as then"
        )
    jobs = sorted(folder.glob("trial-*.job"))
    if jobs and not slurm and not watch_only:
        raise SettingsError(
            f"the search in {folder} was begun with --slurm",
            expected="--slurm, which finds its jobs again",
            do=f"add --slurm; or, where Slurm has none of its jobs any more, remove {folder}/trial-*.job",
        )


def build_queue(space: Space, job: Job, *, group: str) -> Queue:
    """Slurm's queue for a space. Raises: SettingsError for a space without a placement."""
    if space.config_file is None:
        raise SettingsError(
            f"{space.path} names no placement, and a job needs one",
            expected="config_file: accelerate_configs/single_gpu.yaml, or another of that folder",
            do="add it to the space",
        )
    return Queue(replace(job, recipe=space.recipe, config_file=space.config_file), group=group)
