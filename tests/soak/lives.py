"""Runs that are killed again and again, and how each of their lives ended."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dpokit.checkpoint.store import find_checkpoints
from dpokit.rundir import RunDir, read_metrics

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "dpo_gpt2.py")
LIFE_SECONDS = 240  # the most that one life may take on a busy machine


@dataclass
class Lives:
    """One run and the flags it is started with.

    Args:
        run: its folder.
        flags: of the recipe.
        config: a file of accelerate_configs, by its stem; None for one process without a launcher.
        cache: `DPOKIT_CACHE` of the run.
        launcher: more flags of the launcher.
    """

    run: RunDir
    flags: list[str]
    config: str | None
    cache: Path
    launcher: list[str] = field(default_factory=list)
    starts: int = field(default=0)

    @contextmanager
    def living(self) -> Iterator[subprocess.Popen]:
        """A start of the run; whatever is left of it at the end of the block is killed."""
        launcher = [sys.executable]
        if self.config is not None:
            launcher += ["-m", "accelerate.commands.launch", "--config_file"]
            launcher += [str(ROOT / "accelerate_configs" / f"{self.config}.yaml"), *self.launcher]
        words = [*launcher, RECIPE, *self.flags, "--output_dir", str(self.run.path), "--use_cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DPOKIT_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}
        self.starts += 1
        log = self.run.path.with_name(f"{self.run.path.name}.{self.starts}.log")
        with log.open("w") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
        try:
            yield process
        finally:
            kill_tree(process.pid)
            process.wait()

    def last_log(self) -> str:
        return self.run.path.with_name(f"{self.run.path.name}.{self.starts}.log").read_text()

    def finish(self) -> None:
        """Lets the run end by itself. Raises: AssertionError where it does not."""
        with self.living() as process:
            code = process.wait(timeout=LIFE_SECONDS)
        assert code == 0, self.last_log()[-3000:]
        assert (self.run.read_run() or {})["state"] == "finished"

    def kill_when(self, due: Callable[[], bool]) -> bool:
        """Kills all processes at once when `due`; False where the run ended first."""
        with self.living() as process:
            end = time.monotonic() + LIFE_SECONDS
            while process.poll() is None:
                if due():
                    kill_tree(process.pid)
                    return True
                assert time.monotonic() < end, self.last_log()[-3000:]
                time.sleep(0.0005)
        return False

    def kill_at_random(self, chance: random.Random, most_seconds: float) -> bool:
        """Kills it up to so many seconds after this life's first step, or as often in its start."""
        steps_before = self.count_steps()
        seconds = chance.uniform(-0.1, 1.0) * most_seconds
        since: list[float] = []

        def due() -> bool:
            if seconds < 0:
                return (self.run.path / "data.json").exists()
            if not since and self.count_steps() != steps_before:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > seconds

        return self.kill_when(due)

    def count_steps(self) -> tuple[int, int]:
        """Something that changes with each logged step."""
        path = self.run.metrics_jsonl
        try:
            return path.stat().st_size, path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0, 0

    def last_step(self) -> int:
        records = read_metrics(self.run.metrics_jsonl) if self.run.metrics_jsonl.exists() else []
        return records[-1]["step"] if records else 0

    def last_good(self) -> int:
        """The step of the newest checkpoint that verifies."""
        return next((c.step for c in find_checkpoints(self.run, deep=True) if c.resume_problem is None), 0)


def kill_tree(pid: int) -> None:
    """kill -9 of a process and all its children; stopped first, so that none is told of the other's end."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for sign in (signal.SIGSTOP, signal.SIGKILL):
        for process in family:
            try:
                process.send_signal(sign)
            except psutil.NoSuchProcess:
                continue
