"""A run as its folder tells it: records, evaluations and what `dpokit evaluate` left, each file checked. No torch."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpokit.errors import RunFolderError
from dpokit.metrics import is_lower_better
from dpokit.report.votes import is_between
from dpokit.rundir import RunDir

PAIRS_FORMAT = 1
EVAL_LOSS = "eval_loss"


@dataclass(frozen=True)
class Run:
    """What one folder holds.

    Attributes:
        name: the folder's, or its path where several runs have one name.
        record: run.json.
        metrics: records of metrics.jsonl, each with its `step`.
        data: data.json; None where there is none.
        pairs, answer_numbers: eval/pairs.json and eval/answers.json; None where nobody evaluated these weights.
        answers: records of eval/answers.jsonl.
        votes: records of votes.jsonl that compared this run's model, not one that was here before, with its own base.
        notes: what a reader should know of the files.
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
        """Every start of the run, the first one first."""
        return [start for start in self.record.get("generations") or [] if isinstance(start, dict)]

    @property
    def first_token(self) -> str | None:
        """Of the run's first start: no other run, though in the same folder, has it."""
        return self.starts[0].get("token") if self.starts else None

    @property
    def last_step(self) -> int | None:
        return self.metrics[-1]["step"] if self.metrics else None

    def setting(self, name: str) -> Any:
        """A setting's value; None where it is not known."""
        return self.settings().get(name, {}).get("value")

    def settings(self) -> dict[str, dict[str, Any]]:
        """`{name: {value, origin}}`."""
        return {name: mapping(entry) for name, entry in mapping(self.record.get("settings")).items()}

    def series(self, metric: str) -> tuple[list[int], list[float | None]]:
        """Steps at which the metric was logged, and its values; None where it was not finite."""
        rows = [record for record in self.metrics if metric in record]
        return [record["step"] for record in rows], [finite(record[metric]) for record in rows]

    def best(self, metric: str) -> tuple[float, int] | None:
        """The metric's best value and its first step; None without any finite value."""
        points = [(v, s) for s, v in zip(*self.series(metric), strict=True) if v is not None]
        sign = 1 if is_lower_better(metric) else -1
        return min(points, key=lambda point: (sign * point[0], point[1]), default=None)

    def metric_names(self) -> set[str]:
        """Metrics with a finite value."""
        return {n for r in self.metrics for n, v in r.items() if n not in ("step", "seconds") and finite(v) is not None}


def finite(value: object) -> float | None:
    """A finite number as a float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: object) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one: files of other versions may have other things there."""
    return value if isinstance(value, dict) else {}


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Every folder once, in the order given.

    Raises:
        RunFolderError: a folder without a run, or a file that is damaged.
    """
    folders = list({path.resolve(): path for path in paths}.items())
    names = [resolved.name for resolved, _ in folders]
    return [
        load_run(path, name=str(path) if names.count(resolved.name) > 1 else resolved.name)
        for resolved, path in folders
    ]


def load_run(path: Path, *, name: str) -> Run:
    """All of one run. Raises: RunFolderError as `load_runs`."""
    folder = RunDir(path)
    if not folder.run_json.is_file():
        raise RunFolderError(
            f"{path} holds no run.json" if path.is_dir() else f"there is no folder {path}",
            expected="the folder of a run: its --output_dir",
            do="correct the path, or look at the log of the job: a run that never began has no folder",
        )
    notes: list[str] = []
    again = f"dpokit evaluate {path}"
    stale = _is_stale(folder.pairs_json, folder, notes, do="dpokit evaluate RUN")
    pairs = None if stale else read_object(folder.pairs_json, do=again)
    of_others = _is_stale(folder.answers_json, folder, notes, do="dpokit evaluate RUN --answers 50")
    if pairs is not None and pairs.get("format") != PAIRS_FORMAT:
        notes.append(f"eval/pairs.json has format {pairs.get('format')}, which this version does not know: left out")
        pairs = None
    mend = "bring it back from a copy of the folder; a run that goes on, or begins anew, writes it again"
    of = mapping(mapping(pairs).get("data"))
    if of.get("own") is False:
        notes.append(f"eval/pairs.json was measured on other pairs than the run holds out: {of.get('name')}")
    run = Run(
        path=path,
        name=name,
        record=read_object(folder.run_json, do=mend) or {},
        metrics=[_as_metrics(folder.metrics_jsonl, n, r) for n, r in _read_lines(folder.metrics_jsonl, notes)],
        data=read_object(folder.data_json, do=mend),
        pairs=pairs,
        answers=[] if of_others else [record for _, record in _read_lines(folder.answers_jsonl, notes)],
        answer_numbers=None if of_others else _read_answer_numbers(folder, again),
        votes=[record for _, record in _read_lines(folder.votes_jsonl, notes)],
        notes=notes,
    )
    _keep_votes(run)
    notes += _find_lost(run)
    return run


def _is_stale(path: Path, folder: RunDir, notes: list[str], *, do: str) -> bool:
    """Whether what an evaluation left speaks of other weights than those that are here now, which is then noted."""
    stale = folder.is_outdated(path)
    if stale:
        notes.append(
            f"eval/{path.name} is of an earlier end, and the run was trained on: left out ({do} makes it anew)"
        )
    return stale


def _keep_votes(run: Run) -> None:
    own = [vote for vote in run.votes if vote.get("run") == run.first_token]
    names = {"base": run.setting("model_name_or_path")}
    run.votes[:] = [vote for vote in own if is_between(vote, names, run=run.first_token)]
    if len(run.votes) < len(own):
        run.notes.append(f"{len(own) - len(run.votes):,} votes in votes.jsonl are against another base, and left out")


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
            expected="a file that you may read",
            do=f"ls -l {path.parent}; the file's owner can copy the folder for you",
        ) from None


def read_object(path: Path, *, do: str) -> dict[str, Any] | None:
    """A file's JSON object; None without the file. Raises: RunFolderError where it is damaged, with what to `do`."""
    content = _read_bytes(path)
    if content is None:
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are one, too
        raise RunFolderError(f"{path} is damaged: {error}", expected="one JSON object", do=do) from None
    if not isinstance(record, dict):
        raise RunFolderError(f"{path} is damaged: it holds no mapping", expected="one JSON object", do=do)
    return record


def _read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and records of a JSONL file. A last line without its end is being written, or was torn by a crash."""
    lines = (_read_bytes(path) or b"").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip() and number == len(lines):
            return
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it holds no mapping")
        except ValueError as error:
            if number == len(lines):
                notes.append(f"the last line of {path.name} is not whole, and is left out")
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
        expected="one JSON object a line; in metrics.jsonl each with its step, a whole number",
        do=f"mend or delete line {number}, or bring the file back from a copy",
    )


def _find_lost(run: Run) -> Iterator[str]:
    """A sentence for each metric that was not always finite."""
    names: Mapping[str, None] = dict.fromkeys(name for record in run.metrics for name in record)
    for name in names:
        lost = [r["step"] for r in run.metrics if name in r and _is_lost(r[name])]
        if lost:
            often = "once" if len(lost) == 1 else f"{len(lost):,} times"
            yield f"{name} was not finite {often}, first at step {lost[0]:,}"


def _is_lost(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
