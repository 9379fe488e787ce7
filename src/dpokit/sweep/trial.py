"""One run of a trial: its own processes, found again by a mark in their environment whoever started them.

accelerate's and torch's launchers put workers into sessions of their own, and who is killed forwards nothing. So a
run's processes are those that carry its folder in their environment; they are asked, watched and ended together.
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
    """A trial's run under one seed.

    Attributes:
        trial: its number.
        settings: what it has beside the recipe's own.
        run: its folder.
        is_first: of the trial's seeds, the one whose evaluations may prune the trial.
        process: of the launcher, where this worker started it.
        told: evaluations that the study was told of.
        slot: which share of the machine's devices it has.
    """

    trial: int
    settings: dict[str, Any]
    run: RunDir
    is_first: bool = True
    process: subprocess.Popen[bytes] | None = None
    told: int = 0
    slot: int = 0
    _sign: tuple[Any, ...] = ()
    _sign_seen: float = field(default_factory=time.monotonic)

    restarts_itself = False  # whether something else starts it again after a crash

    @property
    def log(self) -> Path:
        return self.run.path.with_suffix(".log")

    @property
    def settings_file(self) -> Path:
        return self.run.path.with_suffix(".yaml")

    def command(self, recipe: Path, *, config_file: Path | None, group: str) -> list[str]:
        """What trains it, the same at every start."""
        placement = [] if config_file is None else ["--config_file", str(config_file), *_find_port_words(config_file)]
        flags = ["--config", str(self.settings_file), "--output_dir", str(self.run.path), "--run_group", group]
        return [*PYTHON, "-m", "accelerate.commands.launch", *placement, str(recipe), *flags]

    def start(self, command: list[str], environment: Mapping[str, str]) -> None:
        """Starts it in a session of its own; its words go to its log."""
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
        """Its YAML file, which every start reads."""
        self.settings_file.write_text(yaml.safe_dump(self.settings, sort_keys=True))

    def is_running(self) -> bool:
        """Whether any of its processes lives."""
        if self.process is not None:
            if self.process.poll() is None:
                return True
            self.process = None
            self.end()  # whom a killed launcher left behind
        return bool(self.processes())

    def processes(self) -> list[psutil.Process]:
        """Those that carry its mark, parents before children."""
        mark, found = str(self.run.path.absolute()), []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.pid)

    def find_slot(self) -> int | None:
        """Which share of the devices its processes have, whoever started them; None where none lives."""
        for process in self.processes():
            try:
                return int(process.environ()[SLOT])
            except (psutil.Error, KeyError, ValueError):
                continue
        return None

    def ask_to_save(self) -> None:
        """Tells its training processes to save and end. Launchers are passed over: they would only end themselves."""
        [name, *_] = choose_signals(self.settings.get("preempt_signal"))
        marked = {process.pid: process for process in self.processes()}
        for process in marked.values():
            try:
                above = marked.get(process.ppid())
                if not _is_launcher(process) and (above is None or _is_launcher(above)):
                    process.send_signal(signal.Signals[name])
            except psutil.Error:
                continue

    def end(self) -> None:
        """Ends all of its processes at once, also those that began just now."""
        for _ in range(20):
            found = self.processes()
            if not found:
                break
            for process in found:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            time.sleep(0.05)
        if self.process is not None:
            self.process.wait()
            self.process = None

    # -- what its files say ----------------------------------------------------------------------------------------

    def count_silent_seconds(self) -> float:
        """For how long this worker has seen none of its files change.

        By a clock that nobody sets and that stands still while the machine is suspended.
        """
        files = [self.log, self.run.run_json, self.run.metrics_jsonl, self.run.data_json, *self.run.checkpoints()]
        sign: list[Any] = []
        for path in files:
            try:
                found = path.stat()
            except OSError:
                continue
            sign.append((path.name, found.st_mtime_ns, found.st_size))
        if tuple(sign) != self._sign:
            self._sign = tuple(sign)
            self.start_listening()
        return time.monotonic() - self._sign_seen

    def start_listening(self) -> None:
        """Counts its silence from now on: it was just started, or could not write before."""
        self._sign_seen = time.monotonic()

    def read_mistake(self) -> str | None:
        """A mistake of the user that its last start ended with; None where the log shows none."""
        names = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
        return next((line for line in reversed(self._last_lines()) if line.partition(":")[0] in names), None)

    def last_words(self) -> str:
        """The last line of its log."""
        return (self._last_lines() or ["its log is empty"])[-1][:300]

    def _last_lines(self) -> list[str]:
        """What its last start wrote; what a launcher says of its children left out."""
        try:
            text = self.log.read_text(errors="replace").rpartition("\n$ ")[2]
        except OSError:
            return []
        before, _, after = text.rpartition("Traceback (most recent call last):")
        text = before if "accelerate/commands/launch" in after else text
        return [line.strip() for line in text.splitlines()[1:] if line.strip()]


class Followed:
    """A metrics.jsonl that grows: what was read and cannot change any more is not read again."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path, self._names = path, ("step", metric)
        self._settled: list[dict[str, Any]] = []
        self._inode = self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Step and metric, where it has one, of each record so far."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # a resume has written it anew
                    self._settled, self._inode, self._offset = [], inode, 0
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # it is just being written
                break
            found.append({name: record[name] for name in self._names if name in record})
        self._settled += found[:-1]  # an evaluation may still join the last one
        self._offset += sum(len(line) for line in lines[: len(found) - 1]) if found else 0
        return self._settled + found[-1:]


@cache
def _follow(path: Path, metric: str) -> Followed:
    return Followed(path, metric)


def follow(run: RunDir, metric: str) -> list[dict[str, Any]]:
    """Step and metric of each of a run's records so far; cheap to ask again and again."""
    return _follow(run.metrics_jsonl.absolute(), metric).read()


def name_runs(space: Space, number: int, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Folder's name and settings of each of a trial's runs: one, or one a seed."""
    name = f"trial-{number}"
    if space.seeds == 1:
        return [(name, settings)]
    first = int(settings.get("seed", space.setting("seed", 42)))
    return [(f"{name}-seed-{seed}", {**settings, "seed": seed}) for seed in range(first, first + space.seeds)]


def find_best(run: RunDir, metric: str) -> float | None:
    """The metric's best value in a run's records; None where none is finite."""
    values = [finite(record.get(metric)) for record in follow(run, metric)]
    known = [value for value in values if value is not None]
    return (min if is_lower_better(metric) else max)(known, default=None)


def _is_launcher(process: psutil.Process) -> bool:
    return any("accelerate.commands.launch" in word or "torch.distributed.run" in word for word in process.cmdline())


def _find_port_words(config_file: Path) -> list[str]:
    """A port of its own for each run whose processes meet: two on one machine must not meet at the same."""
    placement = yaml.safe_load(config_file.read_text()) or {}
    if placement.get("distributed_type") not in PARALLEL_PLACEMENTS:
        return []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--main_process_port", str(free.getsockname()[1])]
