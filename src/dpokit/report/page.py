"""Writes a report: one self-contained HTML file, and a PNG of each figure beside it. No torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dpokit.atomic_files import write_whole
from dpokit.errors import DpokitError, RunFolderError, find_disk_trouble
from dpokit.figures import Drawing, css, draw
from dpokit.report import tables
from dpokit.report.comparison import build_comparison, check_logged_metric, find_obstacles, sort_runs
from dpokit.report.curves import build_figures, explain_figures, letter
from dpokit.report.read import EVAL_LOSS, Run, load_runs, mapping
from dpokit.report.verdict import build_verdict, find_evaluation_verdict
from dpokit.rundir import RunDir
from dpokit.terminal import escape_controls

SIGNATURE = "dpokit report"  # in each file of a report, so that no other file is overwritten
MOST_SAMPLES = 20
MOST_LETTERS = 4000  # of a prompt or an answer


@dataclass(frozen=True)
class Report:
    """The written files and the verdict."""

    report: Path
    pngs: list[Path]
    verdict: str

    def record(self) -> dict[str, Any]:
        """JSON values, for `--json`."""
        return {"report": str(self.report), "pngs": [str(png) for png in self.pngs], "verdict": self.verdict}


def write_report(
    paths: Sequence[Path], *, output: Path | None = None, metric: str | None = None, evaluation: str | None = None
) -> Report:
    """Reads the folders, draws the figures, and writes each file atomically.

    Args:
        paths: run folders; one gives its own report, several give a comparison.
        output: the HTML file; None for RUN/report/report.html, or ./report.html for several runs.
        metric: sorts the runs, if its values can be compared, and selects the best evaluation; None for eval_loss.
        evaluation: as for `load_run`.

    Raises:
        RunFolderError: a folder without a run, a file that is damaged or has values of other types, a target file that
            dpokit did not write, or a disk error.
        SettingsError: a run has no value of the metric, or not this evaluation.
    """
    try:
        return _write_report(paths, output=output, metric=metric, evaluation=evaluation)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        # Values of a wrong type in valid JSON end here, because not every value of a file is checked by itself.
        raise RunFolderError(
            f"a file in {', '.join(map(str, paths))} holds a value that no version of dpokit writes: {error}",
            expected="the files of a run as training and `dpokit evaluate` wrote them",
            do="restore run.json, data.json and eval/ from a copy of the folder",
        ) from error


def _write_report(paths: Sequence[Path], *, output: Path | None, metric: str | None, evaluation: str | None) -> Report:
    for path in paths:
        RunDir(path).check_links()
    runs = load_runs(paths, evaluation=evaluation)
    if len(runs) > 1 or metric is not None:
        check_logged_metric(runs, metric or EVAL_LOSS)
    obstacles = find_obstacles(runs, metric or EVAL_LOSS)
    if len(runs) > 1 and not obstacles:
        runs = sort_runs(runs, metric or EVAL_LOSS)
    if output is None:
        output = RunDir(runs[0].path).report / "report.html" if len(runs) == 1 else Path("report.html")
    drawings = [draw(figure, software=SIGNATURE) for figure in build_figures(runs)]
    page = build_page(runs, drawings, metric=metric or EVAL_LOSS, obstacles=obstacles)
    pngs = [_png(output, drawing.figure.key) for drawing in drawings]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in (output, *pngs):
            check_report_overwrite(path)
        for path, drawing in zip(pngs, drawings, strict=True):
            write_whole(path, drawing.png)
        for old in set(find_pngs(output)) - set(pngs):  # pictures of metrics that the runs no longer have
            if is_report_file(old):
                old.unlink()
        write_whole(output, render_page(page).encode(errors="replace"))  # a sample may hold a lone surrogate
    except OSError as error:
        raise find_report_trouble(error) or error from None
    return Report(output, pngs, page["verdict"])


def build_page(
    runs: Sequence[Run], drawings: Sequence[Drawing], *, metric: str, obstacles: Sequence[str] = ()
) -> dict[str, Any]:
    """The template's values. Only the figures' SVG is markup; all else is plain text.

    Args:
        obstacles: of `find_obstacles`; without them, several runs must be sorted by the metric.
    """
    several = len(runs) > 1
    first = runs[0]
    notes = [f"{run.name}: {note}" if several else note for run in runs for note in (*list_alarms(run), *run.notes)]
    notes += [] if several else [str(finding) for finding in (first.data or {}).get("findings") or []]
    verdicts = [find_evaluation_verdict(run) for run in runs] if several else []
    judgements = [f"{letter(number)}: {text}" for number, text in enumerate(verdicts) if text]
    top = tables.compare_runs(runs, metric, is_ranked=not obstacles) if several else tables.list_pairs(first)[:1]
    below = [] if several else [*tables.list_pairs(first)[1:], tables.list_all_evaluations(first)]
    below += [] if several else [tables.list_votes(first)]
    below += [] if several else [tables.list_evaluations(first, metric), tables.list_answers(first)]
    samples, count = ([], 0) if several else find_samples(first)
    end = [] if several else [*tables.list_data(first), tables.list_restarts(first), *tables.list_settings(first)]
    return {
        "title": f"{len(runs)} runs compared" if several else first.name,
        "verdict": build_comparison(runs, metric, obstacles) if several else build_verdict(first, metric),
        "proven": not several and find_evaluation_verdict(first) is not None,
        "judgements": judgements,
        "facts": [] if several else list_facts(first),
        "notes": notes,
        "top": top,
        "figures": [{"svg": Markup(d.svg), "alt": d.alt, "key": d.figure.key} for d in drawings],
        "explanation": explain_figures(runs),
        "below": [table for table in below if table is not None],
        "samples": samples,
        "sample_count": count,
        "end": [table for table in end if table is not None],
        "figures_title": "Curves",
        "samples_title": "Samples",
        "samples_note": "Chosen is the data's answer; base and tuned are sampled.",
        "footer": f"{SIGNATURE}, made {datetime.now(UTC):%Y-%m-%d %H:%M UTC} from the run folder alone.",
    }


def list_alarms(run: Run) -> list[str]:
    """The alarms that evaluations during training raised, as sentences."""
    alarms = run.record.get("alarms")
    valid = [alarm for alarm in alarms if isinstance(alarm, dict)] if isinstance(alarms, list) else []
    return [f"alarm at step {alarm.get('step')}: {alarm.get('text')}" for alarm in valid]


def render_page(page: dict[str, Any], signature: str = SIGNATURE) -> str:
    """The page as HTML. The template engine escapes every value except the figures' SVG and the style sheet.

    `signature` is the verb that made it, by which dpokit recognises its own files.
    """
    folder = files("dpokit.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    environment.finalize = lambda value: escape_controls(value) if type(value) is str else value
    template = environment.from_string((folder / "page.html").read_text())
    style = (folder / "page.css").read_text().replace("LIGHT;", css(0)).replace("DARK;", css(1))
    return template.render(page, style=Markup(style), signature=signature)


def list_facts(run: Run) -> list[tuple[str, str]]:
    """The facts below the title: state, model, data, time, machine."""
    record = run.record
    state = str(record.get("state") or "unknown")
    if state == "running":
        state = "running, or killed without a record of its end"
    if record.get("why"):
        state += f" ({record['why']})"
    steps = "none logged yet" if run.last_step is None else f"{run.last_step:,}"
    versions = mapping(record.get("versions"))
    facts = {
        "state": state,
        "last step": steps,
        "model": run.setting("model_name_or_path"),
        "data": " + ".join(run.data_names()) or None,
        "recipe": record.get("recipe"),
        "time": _duration(run.metrics[-1].get("seconds")) if run.metrics else None,
        "placement": record.get("placement"),
        "processes": record.get("world_size"),
        "shared prompts": record.get("shared_prefix"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def find_samples(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The first sampled answers of base and tuned with their prompts, and the number of all samples."""
    samples = []
    for record in run.answers[:MOST_SAMPLES]:
        answers = []
        for side in ("chosen", "base", "tuned"):
            answer = record.get(side)
            text = answer.get("text") if isinstance(answer, dict) else answer
            cut = isinstance(answer, dict) and answer.get("ended") is False
            if text is not None:
                answers.append({"side": side, "text": _shorten(text), "cut": cut})
        samples.append({"title": "", "name": "", "prompt": _shorten(record.get("prompt", "")), "answers": answers})
    return samples, len(run.answers)


def check_report_overwrite(path: Path, signature: str = SIGNATURE) -> None:
    """Raises RunFolderError if the path exists and is not a file of a report, or of the verb with this signature."""
    if path.exists() and not is_report_file(path, signature):
        raise RunFolderError(
            f"{path} exists, and {signature} did not write it",
            expected="a free name, or an older report to replace",
            do="--output with another file, or move this one away",
        )


def find_pngs(output: Path) -> list[Path]:
    """The pictures of an existing report; [] without one."""
    page = output.read_text() if is_report_file(output) else ""
    return [_png(output, key) for key in re.findall(r'<figure id="([^"]+)"', page)]


def _png(output: Path, key: str) -> Path:
    return output.with_name(f"{output.stem}-{key}.png")


def is_report_file(path: Path, signature: str = SIGNATURE) -> bool:
    """Whether the verb with this signature wrote this file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return signature.encode() in file.read(4096)


def _shorten(value: object) -> str:
    text = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)).strip()
    more = len(text) - MOST_LETTERS
    return text if more <= 0 else f"{text[:MOST_LETTERS]} [... {more:,} letters more]"


def _breakable(name: str) -> Markup:
    """A name in which a line may break after a slash or an underscore; `join` escapes the parts."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_])", escape_controls(name)))


def _duration(seconds: object) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else (f"{minutes} min {rest} s" if minutes else f"{rest} s")


def find_report_trouble(error: OSError) -> DpokitError | None:
    """The error for a disk that is full, read-only and so on, where a report is written; None for any other error."""
    trouble = find_disk_trouble(error)
    if trouble is None:
        return None
    return RunFolderError(
        trouble.seen, expected="a folder that a report can be written to", do="--output with another path"
    )
