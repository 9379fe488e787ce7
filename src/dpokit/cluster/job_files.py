"""The log that Slurm writes for a job: its name, and the folders that it needs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dpokit.cluster.command import split_arguments
from dpokit.cluster.slurm import SlurmJob
from dpokit.errors import RunFolderError, SettingsError

# Slurm's own upper limit of MaxArraySize.
MOST_INDEX = 4_000_000
MOST_FOLDERS = 10_000  # that a submission makes before sbatch has accepted the job


def with_log(job: SlurmJob) -> SlurmJob:
    """The job with an absolute path as its log: by default a file in the run folder, if its path allows that."""
    if any(option.startswith("--output=") for option in job.sbatch):
        return job
    if job.output is not None:
        return replace(job, output=str(Path(job.output).absolute()))
    folder = str(split_arguments(job.arguments()).run_folder().path.absolute())
    if re.search(r'["\\\x00-\x1f]', folder):  # no #SBATCH line can hold it: the log is where sbatch puts it
        return job
    # In a pattern %% is a percent sign; in an array Slurm replaces %a, as the job does in its flags.
    folder = re.sub(r"%(?!a)" if job.array else "%", "%%", folder)
    return replace(job, output=f"{folder}/slurm-{'%A_%a' if job.array else '%j'}.out")


@contextmanager
def log_folders(job: SlurmJob) -> Iterator[None]:
    """Creates the folders of the job's logs, without which Slurm ends a job unseen; empty again if the block raises.

    Raises:
        SettingsError: as `list_log_folders`.
        RunFolderError: a folder cannot be created.
    """
    folders = list_log_folders(job)
    made: list[Path] = []
    try:
        for folder in folders:
            new = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            made += reversed(new)
    except OSError as error:
        _remove_empty(made)
        raise RunFolderError(
            f"the folder of the job's log cannot be created: {error}",
            expected="a folder that the job can write to from every node",
            do="choose another --output_dir, or --output FILE for the log alone",
        ) from error
    try:
        yield
    except BaseException:
        _remove_empty(made)
        raise


def list_log_folders(job: SlurmJob) -> list[Path]:
    """The folders of the job's logs; of an array, of all of its jobs.

    Raises:
        SettingsError: the log is a folder, lies in a folder that only the job can name, or is one file for an array;
            or there are more than MOST_FOLDERS folders.
    """
    if job.output is None:
        return []
    log = Path(job.output)
    folder = str(log.parent)
    marks = re.findall(r"%(.?)", job.output)
    if log.is_dir():
        raise SettingsError(
            f"--output {job.output} is a folder",
            expected="the job's log, a file",
            do=f"--output {log / 'slurm-%j.out'}; the run folder is --output_dir",
        )
    if job.array is not None and not set(marks) - {"%", "A"}:
        raise SettingsError(
            f"every job of --array {job.array} would write its log to {job.output}",
            expected="a log for each job",
            do="write %a, the index, into the name: --output logs/run_%a.out",
        )
    unknown = set(re.findall(r"%(.?)", folder)) - {"%", "a" if job.array else "%"}
    if unknown:
        raise SettingsError(
            f"--output {job.output}: only the job knows %{unknown.pop()}, and Slurm creates no folders",
            expected="a folder whose name is known now",
            do="write such marks into the name of the file alone",
        )
    indices = list_indices(job.array) if job.array and "a" in marks else [0]
    if "%a" in folder and len(indices) > MOST_FOLDERS:
        raise SettingsError(
            f"the logs of --array {job.array} would lie in {len(indices):,} folders, made before the job is queued",
            expected=f"at most {MOST_FOLDERS:,} folders",
            do="--output logs/%A_%a.out: one folder for all logs",
        )
    return sorted({Path(_fill_pattern(folder, index)) for index in indices})


def _fill_pattern(pattern: str, index: int) -> str:
    return re.sub("%(.)", lambda mark: "%" if mark[1] == "%" else str(index), pattern)


def _remove_empty(made: list[Path]) -> None:
    for folder in reversed(made):
        try:
            folder.rmdir()
        except OSError:  # something else was written to it
            return


def list_indices(array: str) -> list[int]:
    """The indices of an array of Slurm, such as `0-6:2,9%4`. Raises: SettingsError if one is above Slurm's limit."""
    indices: set[int] = set()
    for first, last, step in re.findall(r"(\d+)(?:-(\d+)(?::(\d+))?)?", array.partition("%")[0]):
        if int(last or first) > MOST_INDEX:
            raise SettingsError(
                f"--array {array}: Slurm has no index above {MOST_INDEX:,}",
                expected="a smaller index",
                do="--array 0-7",
            )
        indices.update(range(int(first), int(last or first) + 1, max(1, int(step or 1))))
    return sorted(indices)


def describe_log(log: str, job_id: str) -> str:
    """The log's path as far as it is known when the job is queued."""
    return log.replace("%j", job_id).replace("%A", job_id).replace("%%", "%")
