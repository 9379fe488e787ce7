"""One self-contained HTML file, and a PNG of each figure beside it. No torch."""

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

from dpokit.errors import DpokitError, RunFolderError, find_disk_trouble
from dpokit.figures import Drawing, css, draw
from dpokit.report import tables
from dpokit.report.curves import build_figures, explain_figures, letter
from dpokit.report.read import EVAL_LOSS, Run, load_runs, mapping
from dpokit.report.verdict import check_metric, find_judgement, judge, judge_several, sort_runs
from dpokit.rundir import RunDir, write_whole
from dpokit.terminal import escape_controls

SIGNATURE = "dpokit report"  # in every file of ours, so that no other is overwritten
MOST_SAMPLES = 20
MOST_LETTERS = 4000  # of a prompt or an answer


@dataclass(frozen=True)
class Report:
    """What was written, and its verdict in words."""

    report: Path
    pngs: list[Path]
    verdict: str

    def record(self) -> dict[str, Any]:
        """JSON values, for `--json`."""
        return {"report": str(self.report), "pngs": [str(png) for png in self.pngs], "verdict": self.verdict}


def write_report(paths: Sequence[Path], *, output: Path | None = None, metric: str | None = None) -> Report:
    """Reads the folders, draws, and writes each file whole or not at all.

    Args:
        paths: run folders; one gives its own report, several are compared.
        output: the HTML file; without it RUN/report/report.html, or ./report.html for several runs.
        metric: what several runs are sorted by, and the best evaluation is chosen by; the lowest eval_loss without it.

    Raises:
        RunFolderError: a folder without a run, a file that is damaged or holds values of other types, a file of others
            in the way, a disk that refuses.
        SettingsError: a metric that a run does not have.
    """
    try:
        return _write_report(paths, output=output, metric=metric)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        # Whatever has the wrong type in JSON that is whole ends here: no file's every value is checked one by one.
        raise RunFolderError(
            f"a file in {', '.join(map(str, paths))} holds what no version of ours writes there: {error}",
            expected="the files of a run as training and `dpokit evaluate` left them",
            do="bring run.json, data.json and eval/ back from a copy of the folder",
        ) from error


def _write_report(paths: Sequence[Path], *, output: Path | None, metric: str | None) -> Report:
    for path in paths:
        RunDir(path).check_links()
    runs = load_runs(paths)
    if len(runs) > 1:
        runs = sort_runs(runs, metric or EVAL_LOSS)
    elif metric is not None:
        check_metric(runs, metric)
    if output is None:
        output = RunDir(runs[0].path).report / "report.html" if len(runs) == 1 else Path("report.html")
    drawings = [draw(figure, software=SIGNATURE) for figure in build_figures(runs)]
    page = build_page(runs, drawings, metric=metric or EVAL_LOSS)
    pngs = [_png(output, drawing.figure.key) for drawing in drawings]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in (output, *pngs):
            check_ours(path)
        for path, drawing in zip(pngs, drawings, strict=True):
            write_whole(path, drawing.png)
        for old in set(find_pngs(output)) - set(pngs):  # of metrics that the runs no longer have
            if is_ours(old):
                old.unlink()
        write_whole(output, render(page).encode(errors="replace"))  # a sample may hold half a letter
    except OSError as error:
        raise _find_trouble(error) or error from None
    return Report(output, pngs, page["verdict"])


def build_page(runs: Sequence[Run], drawings: Sequence[Drawing], *, metric: str) -> dict[str, Any]:
    """What the template shows, as plain values; the figures' SVG alone is markup."""
    several = len(runs) > 1
    first = runs[0]
    notes = [f"{run.name}: {note}" if several else note for run in runs for note in (*list_alarms(run), *run.notes)]
    notes += [] if several else [str(found) for found in (first.data or {}).get("findings") or []]
    told = [f"{letter(at)}: {text}" for at, run in enumerate(runs) if several and (text := find_judgement(run))]
    top = tables.compare_runs(runs, metric) if several else tables.list_pairs(first)[:1]
    below = [] if several else [*tables.list_pairs(first)[1:], tables.list_votes(first)]
    below += [] if several else [tables.list_evaluations(first, metric), tables.list_answers(first)]
    samples, count = ([], 0) if several else find_samples(first)
    end = [] if several else [*tables.list_data(first), tables.list_restarts(first), *tables.list_settings(first)]
    return {
        "title": f"{len(runs)} runs compared" if several else first.name,
        "verdict": judge_several(runs, metric) if several else judge(first, metric),
        "proven": not several and find_judgement(first) is not None,
        "judgements": told,
        "facts": [] if several else list_facts(first),
        "notes": notes,
        "top": top,
        "figures": [{"svg": Markup(d.svg), "alt": d.alt, "key": d.figure.key} for d in drawings],
        "explanation": explain_figures(runs),
        "below": [table for table in below if table is not None],
        "samples": samples,
        "sample_count": count,
        "end": [table for table in end if table is not None],
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def list_alarms(run: Run) -> list[str]:
    """What the evaluations during training said in plain words."""
    alarms = run.record.get("alarms")
    found = [alarm for alarm in alarms if isinstance(alarm, dict)] if isinstance(alarms, list) else []
    return [f"alarm at step {alarm.get('step')}: {alarm.get('text')}" for alarm in found]


def render(page: dict[str, Any]) -> str:
    """The page as HTML: every value is escaped by the template engine, but for the figures' SVG and our own CSS."""
    folder = files("dpokit.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    environment.finalize = lambda value: escape_controls(value) if type(value) is str else value
    template = environment.from_string((folder / "page.html").read_text())
    style = (folder / "page.css").read_text().replace("LIGHT;", css(0)).replace("DARK;", css(1))
    return template.render(page, style=Markup(style), signature=SIGNATURE)


def list_facts(run: Run) -> list[tuple[str, str]]:
    """What stands under the title: state, model, data, time, machine."""
    record = run.record
    state = str(record.get("state") or "not known")
    if state == "running":
        state = "running, or killed: nobody wrote an end"
    if record.get("why"):
        state += f" ({record['why']})"
    steps = "none logged yet" if run.last_step is None else f"{run.last_step:,}"
    versions = mapping(record.get("versions"))
    facts = {
        "state": state,
        "last step": steps,
        "model": run.setting("model_name_or_path"),
        "data": run.setting("dataset_name"),
        "recipe": record.get("recipe"),
        "time": _duration(run.metrics[-1].get("seconds")) if run.metrics else None,
        "placement": record.get("placement"),
        "processes": record.get("world_size"),
        "shared prompts": record.get("shared_prefix"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def find_samples(run: Run) -> tuple[list[dict[str, Any]], int]:
    """The first answers of base and tuned with their prompts, and how many there are in all."""
    samples = []
    for record in run.answers[:MOST_SAMPLES]:
        answers = []
        for side in ("chosen", "base", "tuned"):
            found = record.get(side)
            text = found.get("text") if isinstance(found, dict) else found
            cut = isinstance(found, dict) and found.get("ended") is False
            if text is not None:
                answers.append({"side": side, "text": _show(text), "cut": cut})
        samples.append({"prompt": _show(record.get("prompt", "")), "answers": answers})
    return samples, len(run.answers)


def check_ours(path: Path) -> None:
    """Raises RunFolderError where the path is taken by anything that is not a report of ours."""
    if path.exists() and not is_ours(path):
        raise RunFolderError(
            f"{path} is there, and is no report of this toolkit",
            expected="a free name, or an older report to be replaced",
            do="--output with another file, or move that one away",
        )


def find_pngs(output: Path) -> list[Path]:
    """The pictures beside a report that was written before; none where there is no report."""
    page = output.read_text() if is_ours(output) else ""
    return [_png(output, key) for key in re.findall(r'<figure id="([^"]+)"', page)]


def _png(output: Path, key: str) -> Path:
    return output.with_name(f"{output.stem}-{key}.png")


def is_ours(path: Path) -> bool:
    """Whether a report of this toolkit left this file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return SIGNATURE.encode() in file.read(4096)


def _show(value: object) -> str:
    text = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)).strip()
    more = len(text) - MOST_LETTERS
    return text if more <= 0 else f"{text[:MOST_LETTERS]} [... {more:,} letters more]"


def _breakable(name: str) -> Markup:
    """A long name that may be broken after a slash or an underscore; `join` escapes the parts."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_])", escape_controls(name)))


def _duration(seconds: object) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else (f"{minutes} min {rest} s" if minutes else f"{rest} s")


def _find_trouble(error: OSError) -> DpokitError | None:
    trouble = find_disk_trouble(error)
    if trouble is None:
        return None
    return RunFolderError(
        trouble.seen, expected="a folder that a report can be written to", do="--output with another file"
    )
