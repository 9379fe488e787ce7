"""The run folder: every file name of a run, and how each is written. No torch."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpokit.errors import RunFolderError


class RunDir:
    """One folder that holds all of a run, enough to resume, judge, merge, publish, plot or serve it.

    run.json (state and settings), metrics.jsonl (one record per logged step), data.json (rows kept and dropped),
    checkpoint-N/, and the final weights in model/ or adapter/.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.run_json = self.path / "run.json"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.data_json = self.path / "data.json"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, oldest first."""
        found = [p for p in self.path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))

    def own_files(self) -> list[Path]:
        """What a run of ours left here; files of others are never listed, so they are never deleted."""
        named = [self.run_json, self.metrics_jsonl, self.data_json, self.model, self.adapter]
        return [p for p in named if p.exists()] + self.checkpoints()

    def make(self) -> None:
        """Makes the folder. Raises: OSError where it cannot be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()

    def clear(self) -> None:
        """Deletes what a former run left here, run.json last: an interrupted clearing is still recognised."""
        for path in sorted(self.own_files(), key=lambda p: p == self.run_json):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None where there is no run yet. Raises: RunFolderError where it is damaged."""
        try:
            record = json.loads(self.run_json.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            record = error
        if not isinstance(record, dict):
            raise RunFolderError(
                f"{self.run_json} is damaged ({record if isinstance(record, ValueError) else 'not a mapping'})",
                expected="the record that a run keeps of itself",
                do="--overwrite_run true to begin anew here, or another --output_dir",
            )
        return record

    def write_run(self, **changes: Any) -> None:
        """Sets fields of run.json and leaves the others as they are."""
        write_json(self.run_json, {**(self.read_run() or {}), **changes})


def write_json(path: Path, record: Any) -> None:
    """Writes JSON so that a reader, or a machine that loses power, sees the old file or the new one whole."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with part.open("w") as file:
            json.dump(record, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill that takes its name only when the block ends well; no half-filled one is ever seen."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class MetricsFile:
    """metrics.jsonl: one record per logged step, in order, never a lost or a doubled one.

    Training and evaluation log the same step separately; the second joins the first's record.

    Args:
        path: the file.
        after_step: 0 for a new run; a run resumed at step N keeps the records up to N and goes on from their clock.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= after_step] if path.exists() else []
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(_line(record) for record in kept))
        part.replace(path)
        self.seconds_before = float(kept[-1]["seconds"]) if kept else 0.0
        self._path = path
        self._last = kept[-1] if kept else {}
        self._offset = path.stat().st_size - len(_line(self._last).encode()) if kept else 0

    def log(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """Adds the values under the step. `seconds`: wall clock since this process began the run."""
        if step != self._last.get("step"):
            self._offset = self._path.stat().st_size
            self._last = {"step": step}
        self._last |= {"seconds": round(self.seconds_before + seconds, 3)}
        # JSON has no NaN and no infinity.
        self._last |= {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self._path.open("r+b") as file:
            file.seek(self._offset)
            file.write(_line(self._last).encode())
            file.truncate()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a last line torn by a crash is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
