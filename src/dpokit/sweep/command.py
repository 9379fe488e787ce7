"""`dpokit sweep`: starts, continues or watches a search."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpokit.cluster.slurm import SlurmJob
from dpokit.console import say
from dpokit.errors import MachineError, SettingsError
from dpokit.sweep.slurm import Queue
from dpokit.sweep.space import Space, load_space

TPE_TRIALS = 4


def run_sweep(
    path: Path,
    *,
    output_dir: Path | None,
    storage: str | None,
    jobs: int | None,
    timeout_seconds: float,
    watch_only: bool,
    job: SlurmJob | None = None,
) -> dict[str, Any] | None:
    """Searches until every trial has ended; returns the content of sweep.json, or None if the user interrupted.

    Args:
        path: SPACE.yaml.
        output_dir: the search's folder; None for sweeps/NAME.
        storage: Optuna's URL; None for a file in the folder.
        jobs: the number of runs side by side; None for one, and under Slurm for all runs (TPE: of TPE_TRIALS trials).
        timeout_seconds: a run that writes nothing for this long is ended.
        watch_only: show the search of other workers, and start nothing.
        job: the Slurm options of each run; None to train here. The space sets recipe, placement and flags.

    Raises: DpokitError: an error that the user can correct.
    """
    for name, number in {"--jobs": jobs, "--trial-timeout": timeout_seconds}.items():
        if number is not None and number <= 0:
            raise SettingsError(f"{name} is {number}", expected="a number above 0", do=f"correct {name}")
    if importlib.util.find_spec("optuna") is None:
        raise MachineError("Optuna is not installed", expected="the extra `sweep`", do="pip install 'dpokit[sweep]'")
    from dpokit.sweep.live_table import Screen, watch
    from dpokit.sweep.ranking import describe_obstacles, write_outcome
    from dpokit.sweep.study import Search
    from dpokit.sweep.worker import Worker

    space = load_space(path)
    if obstacles := space.find_obstacles():
        say(f"{describe_obstacles(space.metric, obstacles)} No trial is pruned, and none is the best.")
    folder = output_dir or Path("sweeps") / path.stem
    _check_same_mode(folder, storage=storage, watch_only=watch_only, slurm=job is not None)
    search = Search(space, folder, storage=storage, name=folder.resolve().name, watch_only=watch_only)
    if watch_only:
        search.leave()
        watch(space, search)
        return write_outcome(space, search)
    if jobs is None:
        # TPE learns from trials that have ended; with all trials at once it would draw them at random.
        trials = min(space.trials, TPE_TRIALS) if space.search == "tpe" else space.trials
        jobs = 1 if job is None else trials * space.seeds
    queue = None if job is None else build_queue(space, job, group=search.study.study_name)
    with Screen(space, search) as screen:
        worker = Worker(space, search, jobs=jobs, timeout_seconds=timeout_seconds, show=screen.show, queue=queue)
        is_over = worker.work()
    return write_outcome(space, search) if is_over else None


def _check_same_mode(folder: Path, *, storage: str | None, watch_only: bool, slurm: bool) -> None:
    """Raises SettingsError if a search continues with another storage or queue: it would start runs twice."""
    has_workers, has_database = (folder / "workers").is_dir(), (folder / "study.db").is_file()
    if watch_only and not has_workers:
        raise SettingsError(f"{folder} holds no search", expected="a search that was started", do="leave out --watch")
    # A search whose storage could not be reached leaves the folder `workers`, but no trial.
    if has_workers and storage is None and not has_database and (watch_only or any(folder.glob("trial-*"))):
        raise SettingsError(
            f"the search in {folder} was started with --storage",
            expected="the same storage",
            do="add the same --storage URL",
        )
    job_files = sorted(folder.glob("trial-*.job"))
    if job_files and not slurm and not watch_only:
        raise SettingsError(
            f"the search in {folder} was started with --slurm",
            expected="--slurm, which finds the search's jobs again",
            do=f"add --slurm; or, if Slurm has none of its jobs any more, remove {folder}/trial-*.job",
        )


def build_queue(space: Space, job: SlurmJob, *, group: str) -> Queue:
    """The Slurm queue of a search. Raises: SettingsError for a space without a placement."""
    if space.config_file is None:
        raise SettingsError(
            f"{space.path} names no placement, and a job needs one",
            expected="config_file: accelerate_configs/single_gpu.yaml or another file of that folder",
            do="add it to the space",
        )
    return Queue(replace(job, recipe=space.recipe, config_file=space.config_file), group=group)
