"""One run of a trial: starts, signals, watches and ends its processes.

The launchers of accelerate and torch put workers into separate sessions, and a killed launcher ends no worker. So every
process of a run has the run's folder in its environment, and any sweep worker can find all processes of a run by it.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import yaml

from dpokit import errors
from dpokit.checkpoint.preempt import choose_signals
from dpokit.interpreter import PYTHON
from dpokit.metrics import is_lower_better
from dpokit.report.read import finite
from dpokit.rundir import RunDir
from dpokit.sweep.space import Space

MARK, SLOT = "DPOKIT_SWEEP_RUN", "DPOKIT_SWEEP_SLOT"
PARALLEL_PLACEMENTS = ("MULTI_GPU", "DEEPSPEED", "FSDP")


@dataclass
class TrialRun:
    """A trial's run with one seed.

    Attributes:
        trial: the trial's number.
        settings: the settings that differ from the recipe's.
        run: its folder.
        is_first: whether it has the trial's first seed, whose evaluations may prune the trial.
        process: the launcher's process, if this worker started it.
        reported: the number of evaluations that were reported to the study.
        slot: the index of its share of the machine's devices.
    """

    trial: int
    settings: dict[str, Any]
    run: RunDir
    is_first: bool = True
    process: subprocess.Popen[bytes] | None = None
    reported: int = 0
    slot: int = 0
    _file_stamps: tuple[Any, ...] = ()
    _last_change: float = field(default_factory=time.monotonic)

    restarts_itself = False  # whether Slurm, instead of this worker, starts it again after a crash

    @property
    def log(self) -> Path:
        return self.run.path.with_suffix(".log")

    @property
    def settings_file(self) -> Path:
        return self.run.path.with_suffix(".yaml")

    def command(self, recipe: Path, *, config_file: Path | None, group: str) -> list[str]:
        """The command that trains it, the same at every start except the port."""
        placement: list[str] = []
        if config_file is not None:
            placement = ["--config_file", str(config_file), *_build_port_arguments(config_file)]
        flags = ["--config", str(self.settings_file), "--output_dir", str(self.run.path), "--run_group", group]
        return [*PYTHON, "-m", "accelerate.commands.launch", *placement, str(recipe), *flags]

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Starts it in a new session; its output goes to its log."""
        self.write_settings()
        with self.log.open("ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment, MARK: str(self.run.path.absolute()), SLOT: str(self.slot)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def write_settings(self) -> None:
        """Writes its YAML file, which every start reads."""
        # The order of the settings themselves does not matter; that of the sources of a mixture does.
        self.settings_file.write_text(yaml.safe_dump(dict(sorted(self.settings.items())), sort_keys=False))

    def is_running(self) -> bool:
        """Whether any of its processes is alive."""
        if self.process is not None:
            if self.process.poll() is None:
                return True
            self.process = None
            self.end()  # the workers that a killed launcher left
        return bool(self.processes())

    def processes(self) -> list[psutil.Process]:
        """Its processes, by the folder in their environment, in order of their ids."""
        folder, marked = str(self.run.path.absolute()), []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == folder and process.status() != psutil.STATUS_ZOMBIE:
                    marked.append(process)
            except psutil.Error:
                continue
        return sorted(marked, key=lambda process: process.pid)

    def find_slot(self) -> int | None:
        """The slot of its processes, also if another worker started them; None if no process is alive."""
        for process in self.processes():
            try:
                return int(process.environ()[SLOT])
            except (psutil.Error, KeyError, ValueError):
                continue
        return None

    def ask_to_save(self) -> None:
        """Signals its training processes to save and end; not the launchers, which would only end themselves."""
        [name, *_] = choose_signals(self.settings.get("preempt_signal"))
        marked = {process.pid: process for process in self.processes()}
        for process in marked.values():
            try:
                parent = marked.get(process.ppid())
                if not _is_launcher(process) and (parent is None or _is_launcher(parent)):
                    process.send_signal(signal.Signals[name])
            except psutil.Error:
                continue

    def end(self) -> None:
        """Kills all of its processes, also those that start meanwhile."""
        for _ in range(20):
            processes = self.processes()
            if not processes:
                break
            for process in processes:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            time.sleep(0.05)
        if self.process is not None:
            self.process.wait()
            self.process = None

    # -- files -----------------------------------------------------------------------------------------------------

    def count_silent_seconds(self) -> float:
        """How many seconds ago this worker last saw one of its files change.

        The clock is monotonic and stops while the machine is suspended.
        """
        files = [self.log, self.run.run_json, self.run.metrics_jsonl, self.run.data_json, *self.run.checkpoints()]
        stamps: list[Any] = []
        for path in files:
            try:
                stat = path.stat()
            except OSError:
                continue
            stamps.append((path.name, stat.st_mtime_ns, stat.st_size))
        if tuple(stamps) != self._file_stamps:
            self._file_stamps = tuple(stamps)
            self.reset_silence()
        return time.monotonic() - self._last_change

    def reset_silence(self) -> None:
        """Counts the silent seconds from now: the run has just started, or could not write before."""
        self._last_change = time.monotonic()

    def find_user_error(self) -> str | None:
        """The line of the log with the DpokitError that ended the last start; None without one."""
        names = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
        return next((line for line in reversed(self._read_last_lines()) if line.partition(":")[0] in names), None)

    def read_last_line(self) -> str:
        """The last line of its log, at most 300 characters."""
        return (self._read_last_lines() or ["its log is empty"])[-1][:300]

    def _read_last_lines(self) -> list[str]:
        """The output of its last start, without the launcher's own traceback."""
        try:
            text = self.log.read_text(errors="replace").rpartition("\n$ ")[2]
        except OSError:
            return []
        before, _, last_traceback = text.rpartition("Traceback (most recent call last):")
        text = before if "accelerate/commands/launch" in last_traceback else text
        return [line.strip() for line in text.splitlines()[1:] if line.strip()]


class MetricsFollower:
    """Reads a growing metrics.jsonl; records that can no longer change are read once."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path, self._names = path, ("step", metric)
        self._final_records: list[dict[str, Any]] = []
        self._inode = self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The step of each record so far, and its metric if it has one."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # a resume has rewritten the file
                    self._final_records, self._inode, self._offset = [], inode, 0
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the run is still writing this line
                break
            records.append({name: record[name] for name in self._names if name in record})
        self._final_records += records[:-1]  # an evaluation may still be added to the last record
        self._offset += sum(len(line) for line in lines[: len(records) - 1]) if records else 0
        return self._final_records + records[-1:]


@cache
def _follow(path: Path, metric: str) -> MetricsFollower:
    return MetricsFollower(path, metric)


def follow(run: RunDir, metric: str) -> list[dict[str, Any]]:
    """The step and metric of each record of a run so far; repeated calls read only new lines."""
    return _follow(run.metrics_jsonl.absolute(), metric).read()


def name_runs(space: Space, number: int, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The folder name and settings of each run of a trial: one run for each seed."""
    name = f"trial-{number}"
    if space.seeds == 1:
        return [(name, settings)]
    first = int(settings.get("seed", space.setting("seed", 42)))
    return [(f"{name}-seed-{seed}", {**settings, "seed": seed}) for seed in range(first, first + space.seeds)]


def find_best_value(run: RunDir, metric: str) -> float | None:
    """The best value of the metric in a run's records; None if no value is finite."""
    values = [finite(record.get(metric)) for record in follow(run, metric)]
    finite_values = [value for value in values if value is not None]
    return (min if is_lower_better(metric) else max)(finite_values, default=None)


def _is_launcher(process: psutil.Process) -> bool:
    return any("accelerate.commands.launch" in word or "torch.distributed.run" in word for word in process.cmdline())


def _build_port_arguments(config_file: Path) -> list[str]:
    """A free port for a run with several processes: two runs on one machine need different ports."""
    placement = yaml.safe_load(config_file.read_text()) or {}
    if placement.get("distributed_type") not in PARALLEL_PLACEMENTS:
        return []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return ["--main_process_port", str(listener.getsockname()[1])]
