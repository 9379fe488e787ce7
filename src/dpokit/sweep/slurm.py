"""Runs of a search as Slurm arrays, queued together; launch/train.sbatch saves, requeues and restarts them."""

import getpass
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpokit.cluster.slurm import SlurmJob, check_job, render_job, submit_text
from dpokit.console import say
from dpokit.sweep.trial import TrialRun

LOOK_SECONDS = 5.0  # between two calls of squeue


class Queue:
    """The jobs of a search in Slurm's queue.

    Args:
        job: the nodes, GPUs and time of each run; recipe and flags come from the search.
        group: the search's name.
    """

    def __init__(self, job: SlurmJob, *, group: str) -> None:
        self.job = job
        self.group = group
        self._pending: list[QueuedRun] = []
        self._states: dict[str, str] | None = None  # None until Slurm has answered
        self._asked_slurm_at = 0.0

    def add(self, run: "QueuedRun") -> None:
        """Adds a run that the next `flush` queues."""
        self._pending.append(run)

    def holds(self, run: "QueuedRun") -> bool:
        """Whether the run waits for the next `flush`."""
        return run in self._pending

    def flush(self) -> None:
        """Queues the added runs: one array of trials for each seed.

        Raises: DpokitError if dpokit or sbatch refuses the job.
        """
        patterns: dict[str, list[QueuedRun]] = {}
        for run in self._pending:
            patterns.setdefault(run.pattern, []).append(run)
        self._pending = []
        for pattern, runs in patterns.items():
            job = build_array(self.job, pattern, [run.trial for run in runs], group=self.group)
            check_job(job)
            number = submit_text(render_job(job))
            for run in runs:
                run.job_file.write_text(f"{number}_{run.trial}\n")
                if self._states is not None:
                    self._states[f"{number}_{run.trial}"] = "PENDING"
            say(f"queued as job {number}: trial{'s' if len(runs) > 1 else ''} {job.array}")

    def find_state(self, job: str) -> str | None:
        """The job's state: PENDING, RUNNING, ...; None if the job is no longer in the queue.

        PENDING also until Slurm has answered once, because a job that is taken for lost would be queued twice.
        """
        if time.monotonic() - self._asked_slurm_at > LOOK_SECONDS:
            command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--user={getpass.getuser()}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            self._asked_slurm_at = time.monotonic()
            if done.returncode == 0:  # else the controller is unreachable, and the last states stay
                self._states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
        return "PENDING" if self._states is None else self._states.get(job)

    def cancel(self, job: str) -> None:
        """Cancels a job."""
        subprocess.run(["scancel", job], capture_output=True, check=False)
        self._asked_slurm_at = 0.0


def build_array(job: SlurmJob, pattern: str, trials: list[int], *, group: str) -> SlurmJob:
    """The Slurm array that runs the given trials.

    Args:
        job: the nodes, GPUs and time of each run.
        pattern: the path of the run folders, with %a in place of the trial's number.
        trials: the trials' numbers.
        group: the search's name.
    """
    flags = ("--config", f"{pattern}.yaml", "--output_dir", pattern, "--run_group", group)
    array = ",".join(str(trial) for trial in sorted(trials))
    return replace(job, flags=flags, array=array, job_name=group, output=f"{pattern}.log")


@dataclass
class QueuedRun(TrialRun):
    """A run that Slurm starts."""

    queue: Queue = field(kw_only=True)

    restarts_itself = True  # train.sbatch decides whether a run starts again

    @property
    def pattern(self) -> str:
        """The path of the run folders of its array, with %a in place of the trial's number."""
        name = self.run.path.name
        return str(self.run.path.absolute().with_name(name.replace(f"trial-{self.trial}", "trial-%a", 1)))

    @property
    def job_file(self) -> Path:
        return self.run.path.with_suffix(".job")

    def find_job(self) -> str | None:
        """Its job and index, `12_3`; None if it was never queued."""
        text = self.job_file.read_text().strip() if self.job_file.is_file() else ""
        return text if re.fullmatch(r"\d+_\d+", text) else None

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Adds the run to the next array; Slurm runs train.sbatch, not `command`."""
        self.write_settings()
        self.queue.add(self)

    def is_running(self) -> bool:
        """Whether it is in the queue, waiting or running."""
        job = self.find_job()
        return self.queue.holds(self) or (job is not None and self.queue.find_state(job) is not None)

    def count_silent_seconds(self) -> float:
        """As for `TrialRun`, but the time that a run waits for nodes does not count."""
        job = self.find_job()
        if job is None or self.queue.find_state(job) != "RUNNING":
            self.reset_silence()
        return super().count_silent_seconds()

    def ask_to_save(self) -> None:
        """Does nothing: the job continues without this worker."""

    def end(self) -> None:
        """Cancels its job."""
        job = self.find_job()
        if job is not None:
            self.queue.cancel(job)
