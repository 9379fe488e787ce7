"""Prints an evaluation."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from dpokit.metrics import MEASURED
from dpokit.safe_console import SafeConsole


def print_evaluation(record: Mapping[str, Any]) -> None:
    """Prints base and tuned with 95 % intervals, the groups and the verdict; on stdout, in 80 columns."""
    console = SafeConsole(file=sys.stdout, highlight=False)
    base, tuned = record.get("base", {}), record["tuned"]
    console.print(f"{record['data']['pairs']:,} held-out pairs of {escape(record['data']['name'])}, 95 % intervals")
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for side in ("base", "tuned") if base else ("tuned",):
        table.add_column(side, justify="right", no_wrap=True)
    if base:
        table.add_column("p", justify="right", no_wrap=True)
    for name, measure in MEASURED.items():
        if name not in tuned:
            continue
        cells = [escape(_cell(name, side.get(name))) for side in ((base, tuned) if base else (tuned,))]
        p = record["difference"].get(name, {}).get("p") if base else None
        p_cell = [""] if base else []
        if base and p is not None and name != "loss":
            p_cell = ["<.001" if p < 0.001 else f"{p:.3f}"]
        table.add_row(measure.title, *cells, *p_cell)
    console.print(table)
    if "kl_per_token" in tuned:
        console.print(f"KL is measured on {tuned['kl_per_token']['pairs']:,} of the pairs")
    console.print(
        f"accuracy of always choosing the longer answer: {escape(_cell('accuracy', record['always_longer']))}"
    )
    for kind, groups in record.get("groups", {}).items():
        parts = [
            f"{group['name'] or 'none'}: {group['accuracy']['value']:.1%} of {group['pairs']:,}" for group in groups
        ]
        console.print(escape(f"reward accuracy by {kind}: {'; '.join(parts)}"))
    if "answers" in record:
        console.print(_build_answers(record["answers"]))
    if "judge" in record:
        judge = record["judge"]
        console.print(
            f"judged by {escape(judge['model'])}: {judge['wins']} won, {judge['ties']} tied, {judge['losses']} lost, "
            f"{judge['unclear']} unclear; win rate {escape(_cell('accuracy', judge['win_rate']))}"
        )
    if "verdict" in record:
        if base:
            console.print("[dim]p: probability of a difference at least this large if the models are equal[/dim]")
        console.print(f"\n[bold]{escape(record['verdict']['text'])}[/bold]")


def _build_answers(answers: Mapping[str, Any]) -> Table:
    """Returns the table of the sampled answers' statistics."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in (f"{answers['settings']['prompts']} sampled answers", "base", "tuned"):
        table.add_column(title, justify="left" if not table.columns else "right", no_wrap=True)
    titles = {"mean_tokens": "tokens", "repetition": "repeated 4-grams", "distinct_1": "distinct tokens"}
    titles |= {"distinct_2": "distinct 2-grams", "ended": "ended by the model"}
    for name, title in titles.items():
        form = ".1f" if name == "mean_tokens" else ".1%"
        table.add_row(title, *(f"{answers[side][name]:{form}}" for side in ("base", "tuned")))
    return table


def _cell(name: str, value: Mapping[str, Any] | None) -> str:
    if value is None or value["value"] is None:
        return ""
    share = name in MEASURED and MEASURED[name].is_share
    numbers = [100 * value[key] if share else value[key] for key in ("value", "low", "high") if key in value]
    digits = 1 if share or abs(numbers[0]) >= 10 else 3
    middle, *ends = (f"{number:.{digits}f}" for number in numbers)
    bounds = f" [{', '.join(ends)}]" if len(set(ends)) > 1 else ""
    return f"{middle}{'%' if share else ''}{bounds}"
