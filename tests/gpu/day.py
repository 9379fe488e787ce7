"""Runs the stages of a GPU day: each in a process of its own with a time limit, most valuable first.

    bash tests/gpu/day.sh --minutes 12
    bash tests/gpu/day.sh --dry-run          every stage on a CPU, with small shapes
    bash tests/gpu/day.sh --only equality placements

The folder of the day ($OUT, or runs/gpu-day) gets records.jsonl (each result as soon as it is there), and from it after
each stage day.json and tables.md; STAGE.log has the output of a stage. A stage that fails does not end the day. The
same command continues a day that was cut: finished stages and cases are not repeated; those that failed run last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
from day_machine import ROOT, Gpu, find_lack, read_machine
from day_tables import render

MARGIN_SECONDS = 3  # kept for the end of the day: the last stage's processes, JSON and tables
TRAINING = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")


@dataclass(frozen=True)
class Stage:
    """A stage of the day; `day_stages.py` has its cases.

    Attributes:
        name: of the stage, and of its cases' function.
        limit: seconds after which it is cut.
        least: seconds; with fewer left it is not started.
        gib: free GPU memory that its first case needs.
        packages: what it imports.
        shows: what its result shows.
    """

    name: str
    limit: int
    least: int
    gib: float
    packages: tuple[str, ...]
    shows: str


STAGES = [
    Stage("machine", 30, 10, 2, ("torch",), "versions, and the matrix peak of this GPU"),
    Stage("equality", 75, 25, 3, TRAINING, "packed rows equal padded ones, in fp32 and bf16"),
    Stage("tests", 75, 30, 3, (*TRAINING, "pytest"), "the tests that need a GPU"),
    Stage("steps-gpt2-512", 75, 35, 12, TRAINING, "steps beside TRL's: GPT-2 124M, HH pairs of up to 512 tokens"),
    Stage("steps-0.5b-512", 75, 40, 20, TRAINING, "the same with the shape of Qwen2-0.5B"),
    Stage("steps-7b-2048", 110, 60, 70, TRAINING, "the same with the shape of Qwen2-7B, pairs of up to 2,048 tokens"),
    Stage("run", 100, 40, 4, TRAINING, "a whole run with its evaluation, and the GPU's numbers in its log"),
    Stage("placements", 120, 40, 4, (*TRAINING, "pytest", "deepspeed", "bitsandbytes"), "each placement on one GPU"),
    Stage("memory", 75, 30, 8, TRAINING, "the peak that `dpokit plan` predicts, and the measured one"),
    Stage("steps-gpt2-2048", 60, 35, 12, TRAINING, "steps: GPT-2 124M, pairs of up to 2,048 tokens"),
    Stage("steps-0.5b-2048", 75, 40, 20, TRAINING, "steps: the shape of Qwen2-0.5B, pairs of up to 2,048 tokens"),
    Stage("steps-1.5b-2048", 75, 45, 24, TRAINING, "steps: the shape of Qwen2-1.5B, pairs of up to 2,048 tokens"),
]
DRY_GIB = 1.0  # of this machine's memory, for a stage of a dry run


class Records:
    """records.jsonl: one JSON object a line, appended by the day and by its stages."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """The records; without a last line that was cut while it was written."""
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)


def is_done(case: dict[str, Any]) -> bool:
    """Whether a case has a result; one that began, failed or lacked something runs again."""
    return not case.keys() & {"began", "error", "lacked"}


def summarise(records: Records) -> dict[str, Any]:
    """The content of day.json: the last machine, and of each stage its last state and the last result of each case."""
    day: dict[str, Any] = {"stages": {}}
    for record in records.read():
        if "machine" in record:
            day |= record
            continue
        stage = day["stages"].setdefault(record["stage"], {"state": "cut", "cases": {}})
        if "case" in record:
            result = {name: value for name, value in record.items() if name not in ("stage", "case")}
            stage["cases"][record["case"]] = result
        elif record["state"] == "running":
            stage |= {"state": "cut", "reason": "the day ended while it ran"}
            stage["cases"] = {name: case for name, case in stage["cases"].items() if is_done(case)}
        else:
            stage |= {"reason": "", **{name: value for name, value in record.items() if name != "stage"}}
    return day


class Day:
    """One call of the command.

    Args:
        out: the folder of the day.
        minutes: the time until it ends, from now.
    """

    def __init__(self, out: Path, *, minutes: float, dry_run: bool, memory_gib: float | None) -> None:
        self.ends = time.monotonic() + 60 * minutes
        self.out, self.dry_run, self.memory_gib = out, dry_run, memory_gib
        self.records = Records(out / "records.jsonl")
        out.mkdir(parents=True, exist_ok=True)
        self.machine = read_machine(dry_run=dry_run, memory_gib=memory_gib)
        self.keep_other_results()
        at = datetime.now(UTC).isoformat(timespec="seconds")
        identity = self.machine.find_identity(dry_run=dry_run)
        self.records.append(machine=self.machine.record(), identity=identity, minutes=minutes, at=at)
        self.write()

    def keep_other_results(self) -> None:
        """Renames the records of another machine, of other versions, or of a dry run: they belong to another day."""
        before = summarise(self.records).get("identity")
        if before not in (None, self.machine.find_identity(dry_run=self.dry_run)):
            number = len(list(self.out.glob("records*.jsonl")))
            self.records.path.rename(self.out / f"records-{number}.jsonl")
            print(f"the earlier results are of {before}: kept in records-{number}.jsonl, and a new day begins")

    def write(self) -> dict[str, Any]:
        """Writes day.json and tables.md, each whole."""
        day = summarise(self.records)
        for name, text in (("day.json", json.dumps(day, indent=1)), ("tables.md", render(day))):
            part = self.out / f".{name}"
            part.write_text(text + "\n")
            part.replace(self.out / name)
        return day

    def run(self, stages: list[Stage]) -> bool:
        """Runs the stages that have not passed, those that failed last; returns whether all have passed."""
        states = {name: stage["state"] for name, stage in summarise(self.records)["stages"].items()}
        waiting = [stage for stage in stages if states.get(stage.name) != "passed"]
        waiting.sort(key=lambda stage: states.get(stage.name) in ("failed", "lacked"))
        for stage in waiting:
            began = time.monotonic()
            end = self.run_stage(stage)
            seconds = round(time.monotonic() - began, 1)
            self.records.append(stage=stage.name, seconds=seconds, commit=self.machine.commit, **end)
            reason = f": {end['reason']}" if end.get("reason") else ""
            print(f"== {stage.name}: {end['state']} after {seconds:.0f} s{reason}", flush=True)
            self.write()
        day = self.write()
        return all(day["stages"].get(stage.name, {}).get("state") == "passed" for stage in stages)

    def run_stage(self, stage: Stage) -> dict[str, Any]:
        """Runs one stage; returns its state and the reason of it."""
        gib = DRY_GIB if self.dry_run else stage.gib
        lack = find_lack(self.machine, packages=stage.packages, gib=gib, dry_run=self.dry_run)
        if lack is not None:
            return {"state": "lacked", "reason": lack}
        left = self.ends - time.monotonic() - MARGIN_SECONDS
        if left < (0 if self.dry_run else stage.least):
            return {"state": "not run", "reason": f"{max(left, 0):.0f} s were left, and it needs {stage.least}"}
        self.records.append(stage=stage.name, state="running")
        limit = left if self.dry_run else min(stage.limit, left)
        with (
            tempfile.TemporaryDirectory(prefix="dpokit-gpu-day-", ignore_cleanup_errors=True) as work,
            Sampler(dry_run=self.dry_run) as sampler,
        ):
            code = self.wait(stage, Path(work), limit)
        cases = summarise(self.records)["stages"][stage.name]["cases"].values()
        end: dict[str, Any] = {"gpu": sampler.take()} if sampler.readings else {}
        if code is None:
            return {"state": "cut", "reason": f"its limit of {limit:.0f} s", **end}
        if code != 0:
            last = self.read_log(stage)[-300:]
            return {"state": "failed", "reason": f"its process ended with {code}: {last}", **end}
        errors = [case for case in cases if "error" in case]
        lacks = [case["lacked"] for case in cases if "lacked" in case]
        if errors:
            return {"state": "failed", "reason": f"{len(errors)} of {len(cases)} cases", **end}
        return {"state": "lacked", "reason": lacks[0], **end} if lacks else {"state": "passed", **end}

    def read_log(self, stage: Stage) -> str:
        lines = (self.out / f"{stage.name}.log").read_text(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")

    def wait(self, stage: Stage, work: Path, limit: float) -> int | None:
        """Runs the process of a stage; returns its exit code, None if it was cut."""
        command = [sys.executable, str(ROOT / "tests" / "gpu" / "day_stages.py"), stage.name]
        command += ["--records", str(self.records.path), "--work", str(work), "--parent", str(os.getpid())]
        command += ["--dry-run"] if self.dry_run else []
        command += [] if self.memory_gib is None else ["--memory-gib", str(self.memory_gib)]
        environment = os.environ | {"DPOKIT_CACHE": str(work / "cache"), "HF_DATASETS_CACHE": str(work / "datasets")}
        if not self.dry_run:  # one GPU: the first visible one
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
            environment |= {"CUDA_VISIBLE_DEVICES": first, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        with (self.out / f"{stage.name}.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=work)
            try:
                return process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                end_all(process)


def end_all(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and all that it started; the workers of launchers have sessions of their own."""
    if process.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family[1:], timeout=5)
    process.wait()


class Sampler:
    """Reads the GPU's numbers each second while a stage runs. Reads nothing if NVML does not answer."""

    def __init__(self, *, dry_run: bool) -> None:
        self.readings: defaultdict[str, list[float]] = defaultdict(list)
        self._dry_run = dry_run
        self._ended = Event()
        self._thread = Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Sampler":
        if not self._dry_run:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        try:
            gpu = Gpu()
            while not self._ended.wait(1.0):
                for name, value in gpu.sample().items():
                    self.readings[name].append(value)
        except Exception as error:  # NVML has a class for each reason, and no number is worth the day
            print(f"the GPU's numbers are not sampled: {error}", file=sys.stderr)

    def take(self) -> dict[str, dict[str, float]]:
        """Mean and maximum of each number."""
        return {
            name: {"mean": round(sum(values) / len(values), 1), "most": round(max(values), 1)}
            for name, values in self.readings.items()
        }


def stop(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="the time until the day ends (12; 60 in a dry run)")
    parser.add_argument("--dry-run", action="store_true", help="every stage on a CPU, with small shapes")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="these stages only")
    parser.add_argument("--memory-gib", type=float, help="use at most so much memory, if others need the rest")
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    options = parser.parse_args()
    if options.list:
        for stage in STAGES:
            print(f"{stage.name:<16} at most {stage.limit:>3} s, {stage.gib:>4.0f} GiB  {stage.shows}")
        return 0
    signal.signal(signal.SIGTERM, stop)
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-day").absolute()
    minutes = options.minutes or (60 if options.dry_run else 12)
    day = Day(out, minutes=minutes, dry_run=options.dry_run, memory_gib=options.memory_gib)
    chosen = [stage for stage in STAGES if options.only is None or stage.name in options.only]
    try:
        has_passed = day.run(chosen)
    finally:
        day.write()
        print(f"results: {day.out / 'tables.md'}, {day.out / 'day.json'}")
    return 0 if has_passed else 1


if __name__ == "__main__":
    sys.exit(main())
