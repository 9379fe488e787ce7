"""How a model was trained: settings, time, machine; nothing that names a person's places. No torch."""

import re
from dataclasses import replace

from dpokit.card.escape import last_name
from dpokit.card.front_matter import is_hub_id
from dpokit.report.page import list_facts
from dpokit.report.read import Run, mapping
from dpokit.report.tables import Table, number

# Settings that name a person's places rather than say how the model was trained.
PRIVATE = re.compile(r"(hub|trackio)_|(run_name|run_group|run_tags|project|logging_dir)$")


def list_training(run: Run) -> list[tuple[str, object]]:
    """State, time, machine and versions, each with its name."""
    facts = {name: value for name, value in list_facts(run) if name not in ("model", "data")}
    machine, best = mapping(run.record.get("machine")), mapping(run.record.get("best"))
    if best:
        facts["weights kept"] = f"of step {best.get('step')}, {best.get('metric')} {number(best.get('value'))}"
    facts["starts"] = str(len(run.starts) or 1)
    if run.settings():
        facts["precision"] = next((name for name in ("bf16", "fp16") if run.setting(name)), "fp32")
    facts |= {name: str(machine[name]) for name in ("device", "nodes") if machine.get(name)}
    _, memory = run.series("gpu_memory_gib")
    peaks = [value for value in memory if value is not None]
    if peaks:
        facts["GPU memory at most"] = f"{max(peaks):.1f} GiB"
    return [(name, facts.pop(name)) for name in ("device", "nodes") if name in facts] + list(facts.items())


def show_settings(run: Run, table: Table) -> Table:
    """Settings without those that name a person's places, paths by their last name."""
    local = local_names(run)
    rows = []
    for name, value, origin in table.rows:
        if PRIVATE.match(name):
            continue
        is_path = value in local or (name.endswith(("_dir", "_file", "_path")) and name != "model_name_or_path")
        is_path = is_path or not (is_hub_id(value) or value.startswith(("[", "{")))  # the mask looks into those
        rows.append([name, last_name(value) if is_path and "/" in value else value, origin])
    title = f"Settings left at their defaults ({len(rows)})" if table.folded else table.title
    return replace(table, title=title, rows=rows)


def local_names(run: Run) -> set[object]:
    """Names of model and data that were files of the machine."""
    local = run.record.get("local")
    return {run.setting(name) for name in local if isinstance(name, str)} if isinstance(local, list) else set()
