"""The Markdown tables of a GPU day, from the content of day.json."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Dense bf16 TFLOP/s of NVIDIA's data sheets; the first name that a GPU's name contains counts.
DATA_SHEETS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}
Cases = dict[str, dict[str, Any]]


def render(day: dict[str, Any]) -> str:
    """All tables, each with the machine, the date and the command under it."""
    machine = day.get("machine", {})
    stages = day["stages"]
    title = f"GPU day: {machine.get('gpu') or 'no GPU'}, {day.get('at', '')[:10]}"
    parts = [f"# {title}", write_stages(stages)]
    peak = stages.get("machine", {}).get("cases", {}).get("matrix peak", {}).get("best")
    sheet = next((value for name, value in DATA_SHEETS.items() if name in machine.get("gpu", "")), None)
    for name, stage in stages.items():
        cases = {case: values for case, values in stage["cases"].items() if is_shown(values)}
        if not cases:
            continue
        if name.startswith("steps-"):
            parts += [f"## {name}", write_steps(cases, peak, sheet)]
        elif name in WRITERS:
            parts += [f"## {name}", WRITERS[name](cases)]
    return "\n\n".join([*parts, describe(day)])


def describe(day: dict[str, Any]) -> str:
    """The date, the machine, the versions and the command of the numbers."""
    machine = day.get("machine", {})
    gpu, driver, commit = (machine.get(name) or "none" for name in ("gpu", "driver", "commit"))
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    option = " --dry-run" if day.get("identity", {}).get("dry run") else ""
    command = f"`bash tests/gpu/day.sh{option} --minutes {day.get('minutes', 12):g}`"
    return f"{day.get('at', '')[:10]}; GPU: {gpu}, driver {driver}; {versions}; commit {commit}. Command: {command}."


def is_shown(values: dict[str, Any]) -> bool:
    """Whether a case has numbers; those that lacked something or failed without a number are in the first table."""
    return bool(values.keys() - {"began", "error", "lacked", "took_seconds"})


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def show(number: float | None, digits: int = 2) -> str:
    return "-" if number is None else f"{number:,.{digits}f}"


def write_stages(stages: dict[str, Any]) -> str:
    """A row a stage: its state, seconds, cases, the GPU while it ran, and what failed or lacked."""
    rows = []
    for name, stage in stages.items():
        cases = stage["cases"]
        passed = sum(not values.keys() & {"began", "error", "lacked"} for values in cases.values())
        notes = [stage.get("reason") or ""]
        for case, values in cases.items():
            trouble = values.get("error") or values.get("lacked") or ("cut" if "began" in values else "")
            notes += [f"{case}: {trouble}"] if trouble else []
        gpu = stage.get("gpu", {})
        used = f"{show(gpu['watts']['mean'], 0)} W, {show(gpu['percent']['mean'], 0)} %" if "watts" in gpu else "-"
        most = show(gpu["gib"]["most"], 1) if "gib" in gpu else "-"
        note = "; ".join(note for note in notes if note)[:600]
        rows.append([name, stage["state"], show(stage.get("seconds"), 0), f"{passed}/{len(cases)}", used, most, note])
    return table(["stage", "state", "s", "cases", "mean power, use", "most GiB", "notes"], rows)


def write_machine(cases: Cases) -> str:
    facts = cases.get("versions", {})
    rows = [[name, value] for name, value in facts.items() if name != "took_seconds"]
    if peak := cases.get("matrix peak"):
        rows.append([f"matrix peak, {peak['dtype']}", f"{peak['best']:.1f} TFLOP/s (median {peak['median']:.1f})"])
    return table(["", ""], rows)


def write_equality(cases: Cases) -> str:
    """Nats a token / share of the gradient, from padded rows in fp32."""

    def show_both(values: dict[str, Any], name: str) -> str:
        return " / ".join(f"{value:.1e}" for value in values[name]) if name in values else "-"

    names = ["fp32", "autocast, padded", "autocast, packed", "bf16, padded", "bf16, packed"]
    rows = [
        [
            *(family, *(show_both(values, name) for name in names), f"{values.get('wrong mask', 0):.1e}"),
            f"{values.get('autocast, flash calls', 0)} + {values.get('bf16, flash calls', 0)}",
        ]
        for family, values in cases.items()
    ]
    head = ["family", "fp32, packed", *names[1:], "wrong mask", "flash calls"]
    return f"{table(head, rows)}\n\nDistance from padded rows in fp32: nats a token / share of the gradient."


def write_tests(cases: Cases) -> str:
    rows = [[name, values.get("outcome", "failed"), values.get("why", "")] for name, values in cases.items()]
    return table(["test", "outcome", "why"], rows)


def write_steps(cases: Cases, peak: float | None, sheet: float | None) -> str:
    """Rates of each side, and ratios to TRL's side with the same kind of reference.

    Args:
        peak: measured TFLOP/s of matrix products.
        sheet: TFLOP/s of the data sheet.
    """
    seconds = {case: statistics.median(values["seconds"]) for case, values in cases.items() if "seconds" in values}
    bases = {case.partition(", ")[2]: value for case, value in seconds.items() if case.startswith("TRL")}
    bases["kept reference"] = bases.get("precomputed reference")
    rows = []
    for case, median in seconds.items():
        values, base = cases[case], bases.get(case.partition(", ")[2])
        rate = values["flops"] / median / 1e12
        live = bases.get("live reference")
        rows.append(
            [
                *(case, show(median, 3), show(values["pairs"] / median, 1), show(values["row_tokens"] / median, 0)),
                *(show(base and base / median, 2), show(live and live / median, 2)),
                *(show(peak and 100 * rate / peak, 1), show(sheet and 100 * rate / sheet, 1)),
                *(show(values.get("peak_gib"), 1), show(values.get("reserved_gib"), 1)),
                show(values["ready_seconds"], 1),
            ]
        )
    head = ["case", "s a step", "pairs/s", "tokens/s", "against TRL", "against TRL, live", "% of the measured peak"]
    head += ["% of the data sheet", "peak GiB", "reserved GiB", "start, s"]
    notes = ["Tokens are those of both rows of a pair, without padding. A share counts each prompt once."]
    sums = [values["logps/chosen"] for values in cases.values() if "logps/chosen" in values]
    if len(sums) > 1:
        share = (max(sums) - min(sums)) / abs(sums[0])
        notes.append(f"The chosen answers' mean log-probs are equal to {100 * share:.2g} %.")
    return table(head, rows) + "\n\n" + " ".join(notes)


def write_run(cases: Cases) -> str:
    names = ["state", "shared_prefix", "steps", "first_loss", "last_loss", "gpu_power_watts", "gpu_memory_gib"]
    names.append("gpu_utilisation_percent")

    def show_value(value: object) -> object:
        return f"{value:.4g}" if isinstance(value, float) else value

    rows = [[case, *(show_value(values.get(name, "-")) for name in names)] for case, values in cases.items()]
    return table(["run", *(name.replace("_", " ") for name in names)], rows)


def write_memory(cases: Cases) -> str:
    names = ["predicted_gib", "measured_gib", "difference_percent", "measured_as"]
    rows = [[case, *(values.get(name, "-") for name in names)] for case, values in cases.items()]
    return table(["model", "predicted GiB", "measured GiB", "difference, %", "measured as"], rows)


def write_placements(cases: Cases) -> str:
    """The GPU columns of the table in docs/placements.md."""
    kinds = ["full", "LoRA", "QLoRA"]
    outcomes: dict[str, dict[str, str]] = {}
    for case, values in cases.items():
        placement, _, kind = case.rpartition(", ")
        outcomes.setdefault(placement, {})[kind] = values.get("outcome", "FAILS")
    rows = [[placement, *(found.get(kind, "not run") for kind in kinds)] for placement, found in outcomes.items()]
    return table(["placement", *(f"GPU, {kind}" for kind in kinds)], rows)


WRITERS: dict[str, Callable[[Cases], str]] = {
    "machine": write_machine,
    "equality": write_equality,
    "tests": write_tests,
    "run": write_run,
    "memory": write_memory,
    "placements": write_placements,
}
