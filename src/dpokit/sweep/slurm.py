"""Runs of a search as Slurm arrays: queued together, saved, requeued and restarted by launch/train.sbatch."""

import getpass
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpokit.cluster.slurm import Job, check_job, render_job, submit_text
from dpokit.console import say
from dpokit.sweep.trial import TrialRun

LOOK_SECONDS = 5.0  # between two questions to Slurm


class Queue:
    """What a search has in Slurm's queue.

    Args:
        job: what each run is to have: nodes, GPUs, time; its recipe and flags are those of the search.
        group: the search's name.
    """

    def __init__(self, job: Job, *, group: str) -> None:
        self.job = job
        self.group = group
        self._gathered: list[QueuedRun] = []
        self._states: dict[str, str] | None = None  # before Slurm has answered
        self._looked = 0.0

    def add(self, run: "QueuedRun") -> None:
        """To be queued with the next `flush`."""
        self._gathered.append(run)

    def holds(self, run: "QueuedRun") -> bool:
        """Whether it waits to be queued."""
        return run in self._gathered

    def flush(self) -> None:
        """Queues what was gathered: one array of the trials of each seed.

        Raises: DpokitError where the job is refused, by us or by sbatch.
        """
        kinds: dict[str, list[QueuedRun]] = {}
        for run in self._gathered:
            kinds.setdefault(run.pattern, []).append(run)
        self._gathered = []
        for pattern, runs in kinds.items():
            job = build_array(self.job, pattern, [run.trial for run in runs], group=self.group)
            check_job(job)
            number = submit_text(render_job(job))
            for run in runs:
                run.job_file.write_text(f"{number}_{run.trial}\n")
                if self._states is not None:
                    self._states[f"{number}_{run.trial}"] = "PENDING"
            say(f"queued as job {number}: trial{'s' if len(runs) > 1 else ''} {job.array}")

    def find_state(self, job: str) -> str | None:
        """PENDING, RUNNING, ...; None of a job that is not in the queue any more.

        PENDING, too, as long as Slurm has not been reached: a job that is taken for lost would be queued twice.
        """
        if time.monotonic() - self._looked > LOOK_SECONDS:
            words = ["squeue", "--noheader", "--array", "--format=%i %T", f"--user={getpass.getuser()}"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            self._looked = time.monotonic()
            if done.returncode == 0:  # else the controller is away for a while, and all is as it was
                self._states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
        return "PENDING" if self._states is None else self._states.get(job)

    def cancel(self, job: str) -> None:
        """Ends a job."""
        subprocess.run(["scancel", job], capture_output=True, check=False)
        self._looked = 0.0


def build_array(job: Job, pattern: str, trials: list[int], *, group: str) -> Job:
    """The array of these trials.

    Args:
        job: what each run is to have.
        pattern: of the run folders, with %a for the trial.
        trials: their numbers.
        group: the search's name.
    """
    flags = ("--config", f"{pattern}.yaml", "--output_dir", pattern, "--run_group", group)
    array = ",".join(str(trial) for trial in sorted(trials))
    return replace(job, flags=flags, array=array, job_name=group, sbatch=(f"--output={pattern}.log", *job.sbatch))


@dataclass
class QueuedRun(TrialRun):
    """A run that Slurm starts."""

    queue: Queue = field(kw_only=True)

    restarts_itself = True  # train.sbatch decides on that

    @property
    def pattern(self) -> str:
        """Of the folders of its array."""
        name = self.run.path.name
        return str(self.run.path.absolute().with_name(name.replace(f"trial-{self.trial}", "trial-%a", 1)))

    @property
    def job_file(self) -> Path:
        return self.run.path.with_suffix(".job")

    def find_job(self) -> str | None:
        """Its job and index, `12_3`; None where it was never queued."""
        text = self.job_file.read_text().strip() if self.job_file.is_file() else ""
        return text if re.fullmatch(r"\d+_\d+", text) else None

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Gathers it for the next array; what Slurm runs there is its own."""
        self.write_settings()
        self.queue.add(self)

    def is_running(self) -> bool:
        """Whether it is in the queue, waiting or running."""
        job = self.find_job()
        return self.queue.holds(self) or (job is not None and self.queue.find_state(job) is not None)

    def count_silent_seconds(self) -> float:
        """A run that waits for nodes is no silent one, and has its time anew when it gets them."""
        job = self.find_job()
        if job is None or self.queue.find_state(job) != "RUNNING":
            self.start_listening()
        return super().count_silent_seconds()

    def ask_to_save(self) -> None:
        """Nothing: the job goes on while nobody looks."""

    def end(self) -> None:
        """Cancels its job."""
        job = self.find_job()
        if job is not None:
            self.queue.cancel(job)
