"""The run folder: the names of a run's files, and how each is read and written. No torch."""

import json
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from dpokit.atomic_files import MOST_RECORD_BYTES, read_record, write_json, write_whole
from dpokit.errors import RunFolderError

# Types of the fields of run.json that are checked on reading; other fields are ignored.
RECORD: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("recipe", "state", "why", "error", "placement", "model_fingerprint", "judged"), (str, type(None))),
    **dict.fromkeys(("settings", "versions", "machine"), (dict,)),
    **dict.fromkeys(("generations", "accepted_changes", "local"), (list,)),
    **dict.fromkeys(("world_size", "former_starts", "steps"), (int,)),
    "best": (dict, type(None)),
}
# Limits for a file that is read into memory; a tokenizer has some 30 MB, the metrics of a million steps some 500 MB.
MOST_FILE_BYTES = {".jsonl": 2**31}
OTHER_FILE_BYTES = 2**28
NOT_READ = (".safetensors", ".png")  # never read into memory as a whole
CARD_MARK = "made by dpokit card"  # at the beginning of a generated model card and of each of its pictures


class EvaluationFiles:
    """The files of one evaluation. `folder` is RUN/eval/NAME, or RUN/eval itself if an older version wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pairs_json = folder / "pairs.json"
        self.answers_jsonl = folder / "answers.jsonl"
        self.answers_json = folder / "answers.json"
        self.judge_json = folder / "judge.json"

    def exist(self) -> bool:
        """Whether there is any of the files."""
        return any(path.exists() for path in (self.pairs_json, self.answers_jsonl, self.answers_json))


class RunDir:
    """A run's folder, which holds all that is needed to resume, evaluate, merge, publish, plot or serve the run.

    run.json (state and settings), metrics.jsonl (one record per logged step), data.json (rows kept and dropped),
    checkpoint-N/, the final weights in model/ or adapter/, merged/ (base and adapter as one model), eval/ (a folder for
    each comparison of base and tuned model), report/ (the HTML page), README.md (the model card) and its pictures in
    figures/, votes.jsonl (votes of people who talked to the model; never deleted, because they are training pairs).

    Args:
        path: the folder.
        token: identifies this start of the run once it owns the folder (`take_possession`). After a network failure or
            a requeue two starts may be alive: the later one owns the folder, and the earlier one stops writing. Empty
            for a reader.
    """

    def __init__(self, path: str | os.PathLike[str], token: str = "") -> None:
        self.path = Path(path)
        self.run_json = self.path / "run.json"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.data_json = self.path / "data.json"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"
        self.merge_json = self.merged / "merge.json"
        self.eval = self.path / "eval"
        self.report = self.path / "report"
        self.card = self.path / "README.md"
        self.figures = self.path / "figures"
        self.votes_jsonl = self.path / "votes.jsonl"
        self.token = token

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    def checkpoints(self) -> list[Path]:
        """The checkpoint folders, oldest first."""
        folders = [p for p in self.path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(folders, key=lambda p: int(p.name.removeprefix("checkpoint-")))

    def evaluations(self) -> list[EvaluationFiles]:
        """The evaluations, oldest first."""
        folders = [self.eval, *sorted(path for path in self.eval.glob("*") if path.is_dir())]
        return [files for folder in folders if (files := EvaluationFiles(folder)).exist()]

    def make_evaluation(self, name: str) -> EvaluationFiles:
        """Creates the folder of a new evaluation, with a number behind its name if another one has this name.

        Raises: OSError: it cannot be created.
        """
        self.eval.mkdir(exist_ok=True)
        for number in count(1):
            folder = self.eval / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return EvaluationFiles(folder)
        raise AssertionError("itertools.count has no end")

    def find_weights(self) -> Path | None:
        """The folder of the final weights; None if it does not exist yet."""
        return next((path for path in (self.adapter, self.model) if path.is_dir()), None)

    def find_whole(self) -> Path | None:
        """The folder of the whole model: an up-to-date merged/, else model/; None if neither exists."""
        merged = self.merged.is_dir() and not self.is_merge_old()
        return self.merged if merged else self.model if self.model.is_dir() else None

    def is_merge_old(self) -> bool:
        """Whether merged/ holds earlier weights, because the run was trained further since the merge."""
        return self.is_outdated(self.merge_json)

    def find_end(self) -> str | None:
        """The token of the start that wrote the final weights; None if the run is not finished."""
        record = self.read_run() or {}
        starts = record.get("generations") or [{}]
        return starts[-1].get("token") if record.get("state") == "finished" else None

    def is_outdated(self, made: Path) -> bool:
        """Whether a JSON record describes earlier final weights: its `end` differs from `find_end`.

        File times are not compared, because a copy has times of its own. A record without `end` counts as up to date.
        """
        try:
            record = read_record(made) if made.is_file() else {}
        except (OSError, ValueError, RecursionError):
            return False  # the reader of the record reports the damage
        if not isinstance(record, dict) or "end" not in record:
            return False
        return self.find_end() not in (None, record["end"])

    def own_files(self) -> list[Path]:
        """The files and folders that a run wrote here; other files are never listed, so they are never deleted."""
        folders = [self.model, self.adapter, self.merged, self.eval, self.report]
        named = [self.run_json, self.metrics_jsonl, self.data_json, *folders]
        return [p for p in named if p.exists()] + self.checkpoints() + self.own_card()

    def own_card(self) -> list[Path]:
        """The model card and its pictures if dpokit generated them; a README.md may also be the user's."""
        return [p for p in (self.card, *sorted(self.figures.glob("*.png"))) if p.is_file() and is_card_file(p)]

    def check_links(self) -> None:
        """Raises RunFolderError if a link among the run's files leads out of the folder.

        The maker of such a link chooses which file is read, overwritten or published through it. Checkpoints may lie
        elsewhere, because they are only read through a link.
        """
        folders = [self.model, self.adapter, self.merged, self.eval, self.report, self.figures]
        files = [self.run_json, self.metrics_jsonl, self.data_json, self.card, self.votes_jsonl]
        inside = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*"))]
        for path in (*files, *folders, *inside):
            self.check_inside(path)

    def check_inside(self, path: Path) -> None:
        """Raises RunFolderError if the path is a link out of the folder, a pipe, a device or too large a file."""
        if path.is_symlink() and not path.resolve().is_relative_to(self.path.resolve()):
            raise RunFolderError(
                f"{path} is a link to {path.readlink()}, outside of the run folder",
                expected="the run's own files",
                do="remove the link, or put a copy of the file in its place",
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RunFolderError(
                f"{path} is neither a file nor a folder", expected="the run's own files", do="remove it"
            )
        most = MOST_FILE_BYTES.get(path.suffix, OTHER_FILE_BYTES)
        if path.suffix not in NOT_READ and path.is_file() and path.stat().st_size > most:
            raise RunFolderError(
                f"{path} has {path.stat().st_size:,} bytes", expected=f"at most {most:,} of such a file", do="remove it"
            )

    def make(self) -> None:
        """Creates the folder and checks that it can be written.

        Raises:
            OSError: it cannot be written.
            RunFolderError: as `check_links`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.check_links()
        probe = self.path / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()

    def clear(self) -> None:
        """Deletes the files of a former run; run.json goes last, so that an interrupted deletion can be repeated."""
        for path in sorted(self.own_files(), key=lambda p: p == self.run_json):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def read_run(self) -> dict[str, Any] | None:
        """The content of run.json; None if there is no run yet.

        Raises: RunFolderError if it is damaged or a link out of the folder.
        """
        self.check_inside(self.run_json)
        try:
            if not self.run_json.is_file():  # opening a pipe would wait for a writer
                if not self.run_json.exists():
                    return None
                raise ValueError("it is not a file")
            record = read_record(self.run_json)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            record = error
        if (trouble := _find_record_trouble(record)) is not None:
            raise RunFolderError(
                f"{self.run_json} is damaged ({trouble})",
                expected="the file as the run wrote it",
                do="--overwrite_run true to start again here, or another --output_dir",
            )
        return record

    def write_run(self, **changes: Any) -> None:
        """Sets fields of run.json and keeps the others. Raises: RunFolderError as `check_possession`."""
        record = self.read_run() or {}
        self._check_possession(record)
        write_json(self.run_json, {**record, **changes})

    def take_possession(self, resumed_step: int, *, former_starts: int = 0) -> str:
        """Makes this start the owner of the folder and returns its token; run.json lists every start of the run.

        Args:
            resumed_step: where it starts.
            former_starts: the number of starts of runs that the folder no longer holds, from
                `run_starts.clear_folder`.
        """
        record = self.read_run() or {}
        starts = record.get("generations", [])
        if starts:
            logged = read_metrics(self.metrics_jsonl) if self.metrics_jsonl.is_file() else []
            starts[-1] |= {"ended_step": logged[-1]["step"] if logged else 0, "ended": record.get("state")}
        token = secrets.token_hex(6)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        start = {"token": token, "host": socket.gethostname(), "began": began, "resumed_step": resumed_step}
        starts.append(start | {"job": os.environ.get("SLURM_JOB_ID"), "launcher": os.getppid(), "pid": os.getpid()})
        self.token = token  # set before the write: a signal in between records its reason, which needs the token
        former = {"former_starts": former_starts} if former_starts else {}
        # `running` at once: by an older state, another run might take the folder for free.
        write_json(self.run_json, {**record, **former, "state": "running", "generations": starts})
        return token

    def check_possession(self) -> None:
        """Raises RunFolderError if a later start of the run owns the folder, or if the folder is gone."""
        self._check_possession(self.read_run() or {})

    def find_lost_folder(self) -> RunFolderError | None:
        """The error to raise if the folder was deleted, moved or replaced since this start owns it; else None."""
        if not self.token or self.run_json.is_file():
            return None
        return RunFolderError(
            f"{self.path} was deleted, moved or replaced while the run wrote to it: it has no run.json any more",
            expected="the run folder, untouched until the run has ended",
            do="move it back and run the same command again to continue; without the folder it starts from step 0",
        )

    def _check_possession(self, record: dict[str, Any]) -> None:
        if (lost := self.find_lost_folder()) is not None:
            raise lost
        owner = record.get("generations", [{}])[-1]
        if self.token and owner.get("token") != self.token:
            raise RunFolderError(
                f"{self.path} was taken over by a later start of this run (on {owner.get('host')}, "
                f"{owner.get('began')}); this one ends, and writes nothing more",
                expected="one start of a run at a time",
                do="nothing, if the job was requeued; else stop the other one",
            )


def _find_record_trouble(record: object) -> str | None:
    """Why a record is no valid run.json; None if it is valid."""
    if isinstance(record, Exception):
        return str(record)
    if not isinstance(record, dict):
        return "not a mapping"
    for name, types in RECORD.items():
        if name in record and not isinstance(record[name], types):
            return f"{name} is a {type(record[name]).__name__}"
    starts = record.get("generations") or []
    settings = record.get("settings") or {}
    if not all(isinstance(entry, dict) for entry in (*starts, *settings.values())):
        return "a start of the run, or a setting, is not a mapping"
    return None


def is_card_file(path: Path) -> bool:
    """Whether a file is a generated model card or one of its pictures."""
    with path.open("rb") as file:
        return CARD_MARK.encode() in file.read(4096)


@contextmanager
def lost_folder_errors(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turns any error of a verb that reads a run folder into RunFolderError if the folder has disappeared meanwhile."""
    record = RunDir(name).run_json
    try:
        was_there = record.is_file()
    except OSError:  # a name that no file can have
        was_there = False
    try:
        yield
    except Exception as error:
        if was_there and not record.exists():
            raise RunFolderError(
                f"{name} was deleted, moved or replaced while it was read",
                expected="the run folder, untouched until the command has ended",
                do="move it back, and run the same command again",
            ) from error
        raise


def find_model(name: str) -> str:
    """The trained model's folder if `name` is a run folder: `merged`, `model` or `adapter`; any other name unchanged.

    An outdated merge is ignored: the run was trained further since.

    Raises: RunFolderError for a run without a trained model, or one that is not finished.
    """
    run = RunDir(name)
    try:
        if not run.run_json.is_file():
            return name
    except OSError:  # a name that no file can have
        return name
    weights, state = run.find_whole() or run.find_weights(), (run.read_run() or {}).get("state")
    if weights is not None and state in (None, "finished"):
        return str(weights)
    if weights is None:
        why = f"without a trained model (it is {state or 'not begun'})"
        other = f"name its newest checkpoint: {run.checkpoints()[-1]}" if run.checkpoints() else ""
    else:
        why = f"that is {state}: its weights are from before it was trained further"
        other = f"name that model: {weights}"
    raise RunFolderError(
        f"--model_name_or_path {name} is the folder of a run {why}",
        expected="a finished run, a model's folder or a Hub id",
        do="let that run finish" + (f", or {other}" if other else ""),
    )


class MetricsFile:
    """metrics.jsonl: exactly one record per logged step, in order.

    Training and evaluation log the same step separately; both go into one record.

    Args:
        run: the run's folder.
        after_step: 0 for a new run; a run resumed at step N keeps the records up to N and continues their clock.
    """

    def __init__(self, run: RunDir, after_step: int) -> None:
        run.check_possession()
        self._run, path = run, run.metrics_jsonl
        kept = [record for record in read_metrics(path) if record["step"] <= after_step] if path.is_file() else []
        write_whole(path, "".join(_line(record) for record in kept).encode())
        self.seconds_before = float(kept[-1]["seconds"]) if kept else 0.0
        self._path = path
        self._last = kept[-1] if kept else {}
        self._offset = path.stat().st_size - len(_line(self._last).encode()) if kept else 0

    def log(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """Adds the values to the step's record. `seconds`: wall clock since this process began the run.

        Raises: RunFolderError if a later start of the run owns the folder.
        """
        self._run.check_possession()
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
    """The records of a metrics.jsonl up to the first damaged line, such as one that a crash cut off."""
    records = []
    with path.open("rb") as file:
        while line := file.readline(MOST_RECORD_BYTES):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                break
            records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
