"""The table of `dpokit data check` on the screen, for 80 columns. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from dpokit.data.doctor.kinds import NO_RENSA
from dpokit.data.doctor.shortcuts import FAMILIES
from dpokit.data.tally import describe_reason
from dpokit.safe_console import SafeConsole

SHORTCUTS = frozenset({*FAMILIES, "opening", "all_shortcuts"})  # kinds with a table of their own


def print_check(record: Mapping[str, Any]) -> None:
    """Prints counts, checks, and what to do about each finding, on stdout."""
    console = SafeConsole(highlight=False)
    for split in record["splits"]:
        console.print(f"{name_split(split)}: {describe_split(split)}", markup=False)
        for reason, count in split["dropped"].items():
            console.print(f"  {count:,} dropped as {reason}: {describe_reason(reason)}", markup=False)
    console.print(_build_table(record["findings"]))
    console.print(_build_shortcuts(record))
    console.print(
        "  A shortcut is a look of the answers that alone tells which one is preferred.\n"
        "  decides: the share of pairs whose answers differ in it.\n"
        "  right there: how often it then points to the preferred answer."
    )
    if record["limits"]:
        console.print(_build_limits(record["limits"]))
    for line in record["not_checked"]:
        console.print(f"  not checked: {line}", markup=False)
    console.print(f"\n{describe_findings(record)}", markup=False)
    for finding in record["findings"]:
        if finding["is_problem"]:
            detail = f" ({finding['detail']})" if finding["detail"] else ""
            console.print(f"\n! {finding['title']}{detail}", markup=False)
            console.print(f"  {finding['why']}", markup=False)
            console.print(f"  do this: {finding['do']}", markup=False)
            for example in finding["examples"][:1]:
                console.print(f"  for example {example['source']}", markup=False)


def _build_table(findings: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, title="\nchecks", title_justify="left")
    for name in ("", "check", "count", "share", "of"):
        table.add_column(name, justify="right" if name in ("count", "share") else "left", no_wrap=name != "of")
    for finding in findings:
        if finding["kind"] in SHORTCUTS:
            continue
        share = f"{finding['count'] / finding['total']:.1%}" if finding["total"] else "-"
        of = f"{finding['total']:,} {finding['unit']}"
        mark = "!" if finding["is_problem"] else ""
        table.add_row(mark, escape(finding["title"]), f"{finding['count']:,}", share, escape(of))
    return table


def _build_shortcuts(record: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, title="\nshortcuts (chance is 50 %)", title_justify="left")
    for name in ("", "shortcut", "accuracy", "decides", "right there"):
        table.add_column(name, justify="left" if name in ("", "shortcut") else "right")
    for row in list_shortcuts(record):
        table.add_row(*row)
    return table


def _build_limits(limits: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, title="\nwhat length limits cut", title_justify="left")
    for name in ("--max_length", "pairs", "tokens of prompts", "tokens of answers"):
        table.add_column(name, justify="right")
    for row in limits:
        table.add_row(f"{row['max_length']:,}", *(f"{row[name]:.1%}" for name in ("cut", "prompt", "answer")))
    return table


def list_shortcuts(record: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """For each shortcut a mark of a finding, its name, accuracy, share of decided pairs, and accuracy on these."""
    findings = {finding["kind"]: finding for finding in record["findings"]}
    return [
        (
            "!" if name in findings and findings[name]["is_problem"] else "",
            findings[name]["title"] if name in findings else "always the longer answer",
            f"{entry['accuracy']:.1%}",
            f"{entry['decided'] / max(entry['pairs'], 1):.0%}",
            f"{entry['accuracy_where_decided']:.1%}" if entry["decided"] else "-",
        )
        for name, entry in record["shortcuts"].items()
    ]


def describe_findings(record: Mapping[str, Any]) -> str:
    """One sentence on all findings."""
    findings = record["findings"]
    names = [finding["title"] for finding in findings if finding["is_problem"]]
    if names:
        verb = "has" if len(names) == 1 else "have"
        return f"{len(names)} of {len(findings)} checks {verb} a finding: {', '.join(names)}."
    if not passes(record):
        return (
            f"{len(findings)} checks, and no finding; but nearly equal texts were not searched, so --strict ends with "
            "exit code 2: pip install 'dpokit[data]'"
        )
    return f"{len(findings)} checks, and no finding."


def passes(record: Mapping[str, Any]) -> bool:
    """Whether `--strict` ends with exit code 0: no finding, and every search that the extra `data` is needed for."""
    return not any(finding["is_problem"] for finding in record["findings"]) and NO_RENSA not in record["not_checked"]


def name_split(split: Mapping[str, Any]) -> str:
    """Whether a split is trained on, and where it is from."""
    return f"{'held out' if split['held_out'] else 'training'}: {split['source']}"


def describe_split(split: Mapping[str, Any]) -> str:
    """The counts of a split."""
    return f"{split['rows']:,} rows ({split['format']}), {split['kept']:,} kept"
