"""Reads a run folder for reports and cards: records and evaluations, each file checked. No torch."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpokit.errors import RunFolderError, SettingsError
from dpokit.metrics import is_lower_better
from dpokit.report.votes import is_between
from dpokit.rundir import RunDir
from dpokit.settings.mixture import NAMES, DataSource, parse_sources

PAIRS_FORMAT = 1
EVAL_LOSS = "eval_loss"
MOST_NAMES = 3  # of files in a note


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run's present weights by `dpokit evaluate`.

    Attributes:
        name: its folder in the run folder: `eval/NAME`, or `eval` if an older version wrote it.
        pairs, answer_numbers: pairs.json; answers.json with judge.json as `judge`. None if they are missing.
        answers_file: answers.jsonl; None if it is missing.
    """

    name: str
    pairs: dict[str, Any] | None
    answer_numbers: dict[str, Any] | None
    answers_file: Path | None

    @property
    def data(self) -> dict[str, Any]:
        """The scored data: `name`, `own`, `pairs`, `available`, `prompts`, `fingerprint`."""
        return mapping(mapping(self.pairs).get("data"))

    @property
    def changed(self) -> list[str]:
        """The flags by which it differs from an evaluation as in training, such as `base` and `beta`."""
        changed = mapping(self.pairs).get("changed")
        return [str(name) for name in changed] if isinstance(changed, list) else []

    @property
    def made(self) -> str:
        """Its time, UTC in ISO format; "" in old records."""
        return str(mapping(self.pairs).get("made") or "")

    def rank(self, number: object) -> tuple[bool, bool, int, str, str]:
        """Larger for the run's own pairs, scored as in training; then for a larger number; of equals for the newest."""
        is_own = self.data.get("own") is not False
        return is_own and not self.changed, is_own, number if isinstance(number, int) else 0, self.made, self.name


@dataclass(frozen=True)
class Run:
    """The content of one run folder.

    Attributes:
        name: the folder's name, or its path if several runs have the same name.
        record: run.json.
        metrics: records of metrics.jsonl, each with its `step`.
        data: data.json; None if it is missing.
        evaluations: of these weights, oldest first.
        evaluation, answered: the one that is shown, and the one whose sampled answers are shown; None without one.
        answers: the sampled answers: records of answers.jsonl.
        votes: records of votes.jsonl that compare this run's model, and no earlier run's, with its base.
        notes: sentences on defects of the files.
    """

    path: Path
    name: str
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    data: dict[str, Any] | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    evaluation: Evaluation | None = None
    answered: Evaluation | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    votes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> dict[str, Any] | None:
        """The content of the shown evaluation's pairs.json; None if these weights were not evaluated."""
        return None if self.evaluation is None else self.evaluation.pairs

    @property
    def answer_numbers(self) -> dict[str, Any] | None:
        """The statistics of the shown answers; None without them."""
        return None if self.answered is None else self.answered.answer_numbers

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

    def data_sources(self) -> list[DataSource]:
        """The sources of its pairs; empty if they are unknown."""
        try:
            return parse_sources({name: self.setting(name) for name in NAMES})
        except (SettingsError, TypeError, ValueError):  # a damaged record
            return []

    def data_names(self) -> list[str]:
        """The names of the sources of its pairs; empty if they are unknown."""
        return [source.place for source in self.data_sources()]

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


def load_runs(paths: Sequence[Path], *, evaluation: str | None = None) -> list[Run]:
    """Reads each folder once, in the order of `paths`; `evaluation` as for `load_run`.

    Raises:
        RunFolderError: a folder without a run, or a damaged file.
        SettingsError: no such evaluation, or one is named for several runs.
    """
    folders = list({path.resolve(): path for path in paths}.items())
    names = [resolved.name for resolved, _ in folders]
    if evaluation is not None and len(folders) > 1:
        raise SettingsError(
            f"--evaluation {evaluation} names an evaluation of one run, and there are {len(folders)} runs",
            expected="one run, or no --evaluation",
            do="report this run by itself",
        )
    return [
        load_run(path, name=str(path) if names.count(resolved.name) > 1 else resolved.name, evaluation=evaluation)
        for resolved, path in folders
    ]


def load_run(path: Path, *, name: str, evaluation: str | None = None) -> Run:
    """Reads one run folder.

    Args:
        evaluation: the folder in eval/ of the evaluation that is shown; None for the largest of the run's own pairs.

    Raises: RunFolderError, SettingsError: as `load_runs`.
    """
    folder = RunDir(path)
    if not folder.run_json.is_file():
        raise RunFolderError(
            f"{path} holds no run.json" if path.is_dir() else f"there is no folder {path}",
            expected="the folder of a run: its --output_dir",
            do="correct the path, or read the log of the job: a run that never started has no folder",
        )
    notes: list[str] = []
    evaluations = read_evaluations(folder, notes)
    shown, answered = _choose_evaluations(path, evaluations, evaluation)
    restore = "restore it from a copy of the folder; a run that is resumed or started again also writes it"
    notes += _describe_differences(shown, answered)
    run = Run(
        path=path,
        name=name,
        record=read_object(folder.run_json, do=restore) or {},
        metrics=[_as_metrics(folder.metrics_jsonl, n, r) for n, r in _read_lines(folder.metrics_jsonl, notes)],
        data=read_object(folder.data_json, do=restore),
        evaluations=evaluations,
        evaluation=shown,
        answered=answered,
        answers=[record for _, record in _read_lines(answered.answers_file, notes)]
        if answered is not None and answered.answers_file is not None
        else [],
        votes=[record for _, record in _read_lines(folder.votes_jsonl, notes)],
        notes=notes,
    )
    _keep_votes(run)
    notes += _describe_not_finite(run)
    return run


def read_evaluations(folder: RunDir, notes: list[str]) -> list[Evaluation]:
    """The evaluations of the run's present weights, oldest first; others are left out, with a note.

    Raises: RunFolderError: a file is damaged.
    """
    evaluations, outdated = [], []
    for files in folder.evaluations():
        name, pairs, answers, answers_file = str(files.folder.relative_to(folder.path)), None, None, None
        do = f"delete it; dpokit evaluate {folder.path} makes a new evaluation"
        is_old = folder.is_outdated(files.pairs_json)
        if is_old:
            outdated.append(f"{name}/{files.pairs_json.name}")
        else:
            pairs = read_object(files.pairs_json, do=do)
        if folder.is_outdated(files.answers_json):
            outdated.append(f"{name}/{files.answers_json.name}")
        elif files.answers_json.exists() or not is_old:  # if sampling was interrupted, there is no answers.json
            answers, judgement = (read_object(file, do=do) for file in (files.answers_json, files.judge_json))
            answers = answers if answers is None or judgement is None else answers | {"judge": judgement}
            answers_file = files.answers_jsonl if files.answers_jsonl.exists() else None
        if pairs is not None and pairs.get("format") != PAIRS_FORMAT:
            form = pairs.get("format")
            notes.append(f"{name}/pairs.json has format {form}, which this version cannot read: left out")
            pairs = None
        if any(part is not None for part in (pairs, answers, answers_file)):
            evaluations.append(Evaluation(name, pairs, answers, answers_file))
    if outdated:
        more = f" and {len(outdated) - MOST_NAMES} more" if len(outdated) > MOST_NAMES else ""
        notes.append(
            f"out of date, because the run was trained further, and left out: {', '.join(outdated[:MOST_NAMES])}{more} "
            "(dpokit evaluate RUN evaluates the present weights)"
        )
    return evaluations


def _choose_evaluations(
    path: Path, evaluations: Sequence[Evaluation], name: str | None
) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluation to show, and the one whose answers are shown.

    Raises: SettingsError: no evaluation of the present weights has this name.
    """
    if name is not None:
        short = Path(name).name
        named = next((evaluation for evaluation in evaluations if Path(evaluation.name).name == short), None)
        if named is None:
            names = [evaluation.name for evaluation in evaluations]
            raise SettingsError(
                f"{path} has no evaluation {name!r} of its present weights",
                expected=", ".join(names) or f"an evaluation: dpokit evaluate {path}",
                do="--evaluation with one of them" if names else "evaluate the run",
            )
        return named, named
    return choose_evaluation(evaluations), max(
        (other for other in evaluations if other.answers_file is not None or other.answer_numbers is not None),
        key=lambda other: other.rank(mapping(mapping(other.answer_numbers).get("settings")).get("prompts")),
        default=None,
    )


def _describe_differences(shown: Evaluation | None, answered: Evaluation | None) -> Iterator[str]:
    """Yields sentences on the evaluations whose numbers or answers are not of the run's own pairs, base and flags."""
    files = {} if shown is None else {shown.name: (shown, "pairs.json was measured")}
    if answered is not None and answered is not shown:
        files[answered.name] = (answered, "answers.jsonl was sampled")
    for evaluation, file in files.values():
        if evaluation.data.get("own") is False:
            yield f"{evaluation.name}/{file} on other pairs than the run holds out: {evaluation.data.get('name')}"
        if evaluation.changed:
            yield f"{evaluation.name}/{file} with another value than the run's of {', '.join(evaluation.changed)}"


def choose_evaluation(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The largest evaluation of the run's own held-out pairs, else of other pairs; None without one."""
    scored = (evaluation for evaluation in evaluations if evaluation.pairs is not None)
    return max(scored, key=lambda evaluation: evaluation.rank(evaluation.data.get("pairs")), default=None)


def _keep_votes(run: Run) -> None:
    votes = [vote for vote in run.votes if vote.get("run") == run.first_token]
    names = {"base": run.setting("model_name_or_path")}
    run.votes[:] = [vote for vote in votes if is_between(vote, names, run=run.first_token)]
    if len(run.votes) < len(votes):
        left_out = len(votes) - len(run.votes)
        run.notes.append(f"{left_out:,} votes in votes.jsonl are against another base, and left out")


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
