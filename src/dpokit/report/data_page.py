"""Writes the page of `dpokit data check`: one self-contained HTML file beside data-check.json. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dpokit.atomic_files import write_json, write_whole
from dpokit.data.doctor.screen import SHORTCUTS, describe_findings, describe_split, list_shortcuts, name_split, passes
from dpokit.data.tally import describe_reason
from dpokit.figures import Figure, Line, draw
from dpokit.report.page import check_report_overwrite, find_report_trouble, render_page
from dpokit.report.tables import Table, number

CHECK_SIGNATURE = "dpokit data check"  # in both files, so that no other file is overwritten


@dataclass(frozen=True)
class CheckFiles:
    """The files of a check."""

    record: Path
    page: Path


def write_check(folder: Path, record: Mapping[str, Any]) -> CheckFiles:
    """Writes data-check.json and data-check.html, each atomically.

    Args:
        folder: is made if it does not exist.
        record: of `check_data`.

    Raises: RunFolderError for files that this verb did not write, or a disk error.
    """
    written = make_check_folder(folder)
    page = render_page(build_check_page(record), CHECK_SIGNATURE)
    try:
        write_json(written.record, {"made_by": CHECK_SIGNATURE} | dict(record))
        write_whole(written.page, page.encode(errors="replace"))  # a row may hold a lone surrogate
    except OSError as error:
        raise find_report_trouble(error) or error from None
    return written


def make_check_folder(folder: Path) -> CheckFiles:
    """Makes the folder, and returns the files to write. Raises: as `write_check`."""
    files = CheckFiles(folder / "data-check.json", folder / "data-check.html")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (files.record, files.page):
            check_report_overwrite(path, CHECK_SIGNATURE)
    except OSError as error:
        raise find_report_trouble(error) or error from None
    return files


def build_check_page(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the report's template. Only the figures' SVG is markup; all else is plain text."""
    findings = record["findings"]
    problems = [finding for finding in findings if finding["is_problem"]]
    drawings = [draw(figure, software=CHECK_SIGNATURE) for figure in _build_figures(record["lengths"])]
    samples = [sample for finding in (*problems, *findings) for sample in _list_samples(finding)]
    samples = [sample for number, sample in enumerate(samples) if sample not in samples[:number]]
    return {
        "title": f"Data check of {', '.join(record['sources'])}",
        "verdict": describe_findings(record),
        "proven": passes(record),
        "judgements": [],
        "facts": [(name_split(split), describe_split(split)) for split in record["splits"]],
        "notes": [f"{finding['title']}: {finding['why']} {finding['do']}" for finding in problems],
        "top": [_list_findings(findings)],
        "figures_title": "Lengths",
        "figures": [{"svg": Markup(d.svg), "alt": d.alt, "key": d.figure.key} for d in drawings],
        "explanation": f"Training pairs in each bin of {record['lengths']['unit']}; the extreme 1 % is cut off.",
        "below": [table for table in (_list_accuracies(record), _list_openings(record), _list_limits(record)) if table],
        "samples_title": "Examples",
        "samples_note": "Keys, e-mail addresses and phone numbers are masked, and long texts are shortened.",
        "samples": samples,
        "sample_count": len(samples),
        "end": [table for table in (_list_reasons(record),) if table],
        "footer": f"{CHECK_SIGNATURE}. Not checked: {'; '.join(record['not_checked']) or 'nothing was left out'}.",
    }


def _list_findings(findings: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            f"{'! ' if finding['is_problem'] else ''}{finding['title']}",
            number(finding["count"]),
            f"{number(finding['total'])} {finding['unit']}",
            finding["detail"] or "-",
        ]
        for finding in findings
        if finding["kind"] not in SHORTCUTS
    ]
    note = "An exclamation mark marks a finding, on which --strict ends with exit code 2."
    return Table("Checks", ["check", "count", "of", "detail"], rows, note=note)


def _list_accuracies(record: Mapping[str, Any]) -> Table:
    note = (
        "How often a model that sees only this part of the answers' look chooses the preferred one, on pairs that it "
        "was not fitted to. Pairs are split into 5 folds, by prompt unless most pairs have the same one. A pair that "
        "it does not decide counts as half. Chance is 50 %."
    )
    head = ["shortcut", "accuracy", "decides", "accuracy where it decides"]
    rows = [[f"{mark} {name}".strip(), *cells] for mark, name, *cells in list_shortcuts(record)]
    return Table("Shortcuts", head, rows, note=note)


def _list_openings(record: Mapping[str, Any]) -> Table | None:
    rows = [[f'"{row["opening"]}"', number(row["chosen"]), number(row["rejected"])] for row in record["openings"]]
    note = "The first two words of answers, the most uneven first."
    return Table("Openings", ["opening", "preferred", "not preferred"], rows, note=note) if rows else None


def _list_limits(record: Mapping[str, Any]) -> Table | None:
    rows = [
        [number(row["max_length"]), *(f"{row[name]:.2%}" for name in ("cut", "prompt", "answer"))]
        for row in record["limits"]
    ]
    head = ["--max_length", "pairs cut", "tokens of prompts lost", "tokens of answers lost"]
    return Table("What length limits cut", head, rows) if rows else None


def _list_reasons(record: Mapping[str, Any]) -> Table | None:
    rows = [
        [split["source"], reason, number(count), describe_reason(reason)]
        for split in record["splits"]
        for reason, count in split["dropped"].items()
    ]
    return Table("Dropped rows", ["split", "reason", "rows", "meaning"], rows) if rows else None


def _list_samples(finding: Mapping[str, Any]) -> list[dict[str, Any]]:
    samples = []
    for example in finding["examples"]:
        notes = [f"{name.replace('_', ' ')} {text}" for name, text in example.items() if name not in TEXTS]
        samples.append(
            {
                "title": "; ".join([finding["title"], example["source"], *notes]),
                "name": "prompt" if "prompt" in example else "row",
                "prompt": example.get("prompt", example.get("row", "")),
                "answers": [
                    {"side": side, "text": example[side], "cut": False}
                    for side in ("chosen", "rejected")
                    if side in example
                ],
            }
        )
    return samples


TEXTS = ("source", "prompt", "chosen", "rejected", "row")


def _build_figures(lengths: Mapping[str, Any]) -> list[Figure]:
    titles = {
        "texts": f"Pairs by length in {lengths['unit']}",
        "difference": "Pairs by length, chosen minus rejected",
    }
    return [
        Figure(
            f"lengths-{name}",
            title,
            [
                Line(label, lengths[name]["edges"], counts, style=style)
                for style, (label, counts) in enumerate(lengths[name]["counts"].items())
            ],
            across=lengths["unit"],
        )
        for name, title in titles.items()
        if lengths[name]
    ]
