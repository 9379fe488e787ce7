"""Reads a run folder for reports and cards: records and evaluations, each file checked. No torch."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpokit.errors import RunFolderError, SettingsError
from dpokit.metrics import is_lower_better
from dpokit.report.votes import is_between
from dpokit.rundir import RunDir
from dpokit.settings.mixture import NAMES, parse_sources

PAIRS_FORMAT = 1
EVAL_LOSS = "eval_loss"


@dataclass(frozen=True)
class Run:
    """The content of one run folder.

    Attributes:
        name: the folder's name, or its path if several runs have the same name.
        record: run.json.
        metrics: records of metrics.jsonl, each with its `step`.
        data: data.json; None if it is missing.
        pairs, answer_numbers: eval/pairs.json and eval/answers.json; None if these weights were not evaluated.
        answers: records of eval/answers.jsonl.
        votes: records of votes.jsonl that compare this run's model, and no earlier run's, with its base.
        notes: sentences on defects of the files.
    """

    path: Path
    name: str
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    data: dict[str, Any] | None = None
    pairs: dict[str, Any] | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    answer_numbers: dict[str, Any] | None = None
    votes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, oldest first."""
        return [start for start in self.record.get("generations") or [] if isinstance(start, dict)]

    @property
    def first_token(self) -> str | None:
        """The token of the run's first start, which identifies the run: another run in this folder has another one."""
        return self.starts[0].get("token") if self.starts else None

    @property
    def last_step(self) -> int | None:
        return self.metrics[-1]["step"] if self.metrics else None

    def setting(self, name: str) -> Any:
        """A setting's value; None if it is unknown."""
        return self.settings().get(name, {}).get("value")

    def data_names(self) -> list[str]:
        """The names of the sources of its pairs; empty if they are unknown."""
        try:
            return [source.place for source in parse_sources({name: self.setting(name) for name in NAMES})]
        except (SettingsError, TypeError, ValueError):  # a damaged record
            return []

    def settings(self) -> dict[str, dict[str, Any]]:
        """`{name: {value, origin}}`."""
        return {name: mapping(entry) for name, entry in mapping(self.record.get("settings")).items()}

    def series(self, metric: str) -> tuple[list[int], list[float | None]]:
        """The steps at which the metric was logged, and its values; None for a value that was not finite."""
        rows = [record for record in self.metrics if metric in record]
        return [record["step"] for record in rows], [finite(record[metric]) for record in rows]

    def best(self, metric: str) -> tuple[float, int] | None:
        """The metric's best value and its first step; None without a finite value."""
        points = [(v, s) for s, v in zip(*self.series(metric), strict=True) if v is not None]
        sign = 1 if is_lower_better(metric) else -1
        return min(points, key=lambda point: (sign * point[0], point[1]), default=None)

    def metric_names(self) -> set[str]:
        """The metrics that have a finite value."""
        return {n for r in self.metrics for n, v in r.items() if n not in ("step", "seconds") and finite(v) is not None}


def finite(value: object) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: files of other versions may hold other types."""
    return value if isinstance(value, dict) else {}


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Reads each folder once, in the order of `paths`.

    Raises:
        RunFolderError: a folder without a run, or a damaged file.
    """
    folders = list({path.resolve(): path for path in paths}.items())
    names = [resolved.name for resolved, _ in folders]
    return [
        load_run(path, name=str(path) if names.count(resolved.name) > 1 else resolved.name)
        for resolved, path in folders
    ]


def load_run(path: Path, *, name: str) -> Run:
    """Reads one run folder. Raises: RunFolderError as `load_runs`."""
    folder = RunDir(path)
    if not folder.run_json.is_file():
        raise RunFolderError(
            f"{path} holds no run.json" if path.is_dir() else f"there is no folder {path}",
            expected="the folder of a run: its --output_dir",
            do="correct the path, or read the log of the job: a run that never started has no folder",
        )
    notes: list[str] = []
    again = f"dpokit evaluate {path}"
    stale = _is_stale(folder.pairs_json, folder, notes, do="dpokit evaluate RUN")
    pairs = None if stale else read_object(folder.pairs_json, do=again)
    answers_stale = _is_stale(folder.answers_json, folder, notes, do="dpokit evaluate RUN --answers 50")
    if pairs is not None and pairs.get("format") != PAIRS_FORMAT:
        notes.append(f"eval/pairs.json has format {pairs.get('format')}, which this version cannot read: left out")
        pairs = None
    restore = "restore it from a copy of the folder; a run that is resumed or started again also writes it"
    measured = mapping(mapping(pairs).get("data"))
    if measured.get("own") is False:
        notes.append(f"eval/pairs.json was measured on other pairs than the run holds out: {measured.get('name')}")
    run = Run(
        path=path,
        name=name,
        record=read_object(folder.run_json, do=restore) or {},
        metrics=[_as_metrics(folder.metrics_jsonl, n, r) for n, r in _read_lines(folder.metrics_jsonl, notes)],
        data=read_object(folder.data_json, do=restore),
        pairs=pairs,
        answers=[] if answers_stale else [record for _, record in _read_lines(folder.answers_jsonl, notes)],
        answer_numbers=None if answers_stale else _read_answer_numbers(folder, again),
        votes=[record for _, record in _read_lines(folder.votes_jsonl, notes)],
        notes=notes,
    )
    _keep_votes(run)
    notes += _describe_not_finite(run)
    return run


def _is_stale(path: Path, folder: RunDir, notes: list[str], *, do: str) -> bool:
    """Whether an evaluation's file describes earlier weights; if so, adds a note."""
    stale = folder.is_outdated(path)
    if stale:
        notes.append(
            f"eval/{path.name} is out of date, because the run was trained further: left out ({do} writes it again)"
        )
    return stale


def _keep_votes(run: Run) -> None:
    votes = [vote for vote in run.votes if vote.get("run") == run.first_token]
    names = {"base": run.setting("model_name_or_path")}
    run.votes[:] = [vote for vote in votes if is_between(vote, names, run=run.first_token)]
    if len(run.votes) < len(votes):
        left_out = len(votes) - len(run.votes)
        run.notes.append(f"{left_out:,} votes in votes.jsonl are against another base, and left out")


def _read_answer_numbers(folder: RunDir, do: str) -> dict[str, Any] | None:
    numbers, judge = (read_object(file, do=do) for file in (folder.answers_json, folder.judge_json))
    return numbers if numbers is None or judge is None else numbers | {"judge": judge}


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read: {error.strerror}",
            expected="a readable file",
            do=f"check its permissions (ls -l {path.parent}), or ask its owner for a copy of the folder",
        ) from None


def read_object(path: Path, *, do: str) -> dict[str, Any] | None:
    """A file's JSON object; None without the file. Raises: RunFolderError: it is damaged; `do` is the remedy."""
    content = _read_bytes(path)
    if content is None:
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise RunFolderError(f"{path} is damaged: {error}", expected="one JSON object", do=do) from None
    if not isinstance(record, dict):
        raise RunFolderError(f"{path} is damaged: it is not a mapping", expected="one JSON object", do=do)
    return record


def _read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, record) of a JSONL file. An incomplete last line, as a crash leaves it, only adds a note."""
    lines = (_read_bytes(path) or b"").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() and number == len(lines):
            return
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is not a mapping")
        except ValueError as error:
            if number == len(lines):
                notes.append(f"the last line of {path.name} is incomplete, and left out")
                return
            raise _damaged(path, number, str(error)) from None
        yield number, record


def _as_metrics(path: Path, number: int, record: dict[str, Any]) -> dict[str, Any]:
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise _damaged(path, number, f"its step is {json.dumps(step)}")
    return record


def _damaged(path: Path, number: int, why: str) -> RunFolderError:
    return RunFolderError(
        f"{path}, line {number} is damaged: {why}",
        expected="one JSON object for each line; in metrics.jsonl with a whole number as its step",
        do=f"correct or delete line {number}, or restore the file from a copy",
    )


def _describe_not_finite(run: Run) -> Iterator[str]:
    """Yields a sentence for each metric with values that are not finite."""
    names: Mapping[str, None] = dict.fromkeys(name for record in run.metrics for name in record)
    for name in names:
        steps = [r["step"] for r in run.metrics if name in r and _is_not_finite(r[name])]
        if steps:
            often = "once" if len(steps) == 1 else f"{len(steps):,} times"
            yield f"{name} was not finite {often}, first at step {steps[0]:,}"


def _is_not_finite(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
