"""Prints the plan as a table."""

import sys
from typing import Any

from rich.markup import escape
from rich.table import Table

from dpokit.plan.devices import GIB
from dpokit.plan.placements import PARTS
from dpokit.plan.plan import SOURCES, Plan, describe_method
from dpokit.safe_console import SafeConsole

SHORT = {"arithmetic": "arith.", "measured": "meas.", "assumed": "assum."}
LEGEND = {
    "GPU": "arith.: from shapes and shares; traced: a step on tensors without data; assum.: assumed, not measured",
    "CPU": "arith.: from shapes; traced: a step on tensors without data; meas.: this process before training",
}
HEADS = {"gradients": "grads", "optimizer": "optim.", "reference": "ref.", "activations": "activ."}


def print_plan(plan: Plan, check: dict[str, Any] | None) -> None:
    """Prints the plan on stdout in about twenty lines, for a screen of 80 columns or more."""
    console = SafeConsole(file=sys.stdout, highlight=False, soft_wrap=False)
    settings = plan.request.settings
    numbers = plan.blueprint
    trained = 100 * numbers.trained_parameters / (numbers.parameters + numbers.adapter_parameters)
    console.print(
        f"[bold]{escape(str(settings.model.model_name_or_path))}[/bold]: {numbers.parameters:,} parameters, "
        f"{describe_method(settings)}: {numbers.trained_parameters:,} trained ({trained:.3g} %)"
    )
    console.print(escape(_describe_steps(plan)))
    console.print(
        escape(
            f"memory of one device in GiB, at the peak of a step with {plan.train.pairs} pairs of "
            f"{plan.train.row_tokens:,} tokens (-: none); for {plan.request.devices.describe()}"
        )
    )
    console.print(_build_table(plan))
    console.print(f"[dim]{LEGEND[plan.request.devices.kind]}[/dim]")
    for note in plan.notes:
        console.print(escape(f"- {note}"))
    if check is not None:
        console.print(escape(describe_check(check)))
    if plan.command is not None:
        console.print("\n[bold]run[/bold]")
        console.print(escape(f"  {plan.command}"), soft_wrap=True)
    else:
        console.print("\n[bold]nothing fits[/bold]; to lower the peak:")
        for line in plan.advice:
            console.print(escape(f"  {line}"))


def _describe_steps(plan: Plan) -> str:
    steps = plan.steps
    if steps.pairs is None:
        total = f"{steps.total_steps:,} steps" if steps.total_steps else "steps unknown"
        return f"{total} of {steps.global_batch_pairs:,} pairs; tokens unknown"
    about = "" if steps.how == "exact" else "about "
    tokens = "" if steps.tokens_per_epoch is None else f", {about}{steps.tokens_per_epoch:,} tokens"
    padding = "" if steps.padding_share is None else f" ({steps.padding_share:.0%} more is padding)"
    longest = "" if steps.longest_row_tokens is None else f"; longest row {steps.longest_row_tokens:,} tokens"
    return (
        f"{about}{steps.pairs:,} pairs, {steps.global_batch_pairs:,} a step: {steps.total_steps:,} steps, "
        f"{steps.steps_per_epoch:,} an epoch{tokens}{padding}{longest}"
    )


def _build_table(plan: Plan) -> Table:
    with_host = any(estimate.host for estimate in plan.estimates)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("placement", max_width=12)
    for part in (*PARTS, "total"):
        table.add_column(HEADS.get(part, part), justify="right", no_wrap=True)
    if with_host:
        table.add_column("host", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    on_cpu = plan.request.devices.kind == "CPU"  # a prediction good to some tens of percent has one decimal
    for estimate in plan.estimates:
        cells = [_format_gib(estimate.parts[part], rough=on_cpu) for part in PARTS]
        cells += [f"[bold]{'about ' * on_cpu}{_format_gib(estimate.total, rough=on_cpu)}[/bold]"]
        cells += [_format_gib(estimate.host)] if with_host else []
        chosen = plan.recommended is not None and estimate is plan.recommended
        verdict = "refused" if estimate.refused else "yes" if estimate.fits else "no"
        table.add_row(f"[bold]{estimate.placement}[/bold]" if chosen else estimate.placement, *cells, verdict)
    sources = SOURCES[plan.request.devices.kind]
    table.add_row("known by", *(SHORT.get(sources[part], sources[part]) for part in PARTS), "", *[""] * with_host)
    return table


def _format_gib(size_bytes: int, *, rough: bool = False) -> str:
    gib = size_bytes / GIB
    if size_bytes == 0:
        return "-"
    return f"{gib:.0f}" if gib >= 100 else f"{gib:.1f}" if rough else f"{gib:.2f}"


def describe_check(check: dict[str, Any]) -> str:
    """`peak: predicted about 4.9 GiB, measured 5.04 GiB in real steps of the longest rows (-2.2 %)`."""
    return (
        f"peak: predicted about {check['predicted_gib']:.1f} GiB, measured {check['measured_gib']:.2f} GiB in real "
        f"steps of the longest rows ({check['difference_percent']:+.1f} %)"
    )
