"""Sections of a card: training, limits and samples. No torch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from dpokit.card.escape import escape, escape_lines, last_name
from dpokit.card.front_matter import is_hub_id
from dpokit.card.origin import Lineage
from dpokit.report.page import list_facts
from dpokit.report.read import Run, finite, mapping
from dpokit.report.tables import Table, interval, number
from dpokit.settings.flag_facts import is_public

CUTS = {"turns": "whole turns of the prompt", "prompt": "the start of the prompt", "answer": "the end of an answer"}


def list_training(run: Run) -> list[tuple[str, object]]:
    """(name, value) of each fact of the training: state, time, machine, versions."""
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
    """The table of settings without private ones, and with paths shortened to their last part."""
    local = local_names(run)
    rows = []
    for name, value, origin in table.rows:
        if not is_public(name):
            continue
        is_path = value in local or (name.endswith(("_dir", "_file", "_path")) and name != "model_name_or_path")
        is_path = is_path or not (is_hub_id(value) or value.startswith(("[", "{")))  # `Mask` handles lists and mappings
        rows.append([name, last_name(value) if is_path and "/" in value else value, origin])
    title = f"Settings left at their defaults ({len(rows)})" if table.folded else table.title
    return replace(table, title=title, rows=rows)


def local_names(run: Run) -> set[object]:
    """Names of models and data that were local files."""
    local = run.record.get("local")
    if not isinstance(local, list):
        return set()
    names = {name for name in local if isinstance(name, str)}
    return {run.setting(name) for name in names} | names.intersection(run.data_names())


def list_limits(run: Run, lineage: Lineage, *, language: Sequence[str], is_evaluated: bool) -> list[str]:
    """Sentences on the limits of the model and its evaluation, the most important first."""
    sentences = [
        "A preferred answer need not be true: the pairs only record which of two answers somebody preferred. Truth, "
        "safety and bias were not measured.",
        "The model keeps the gaps and errors of its base model, and the terms of the base model's licence still apply.",
    ]
    not_compared = ["The model was not compared with its base on held-out pairs."]
    sentences += _list_evaluation_limits(run, lineage) if is_evaluated else not_compared
    sentences += _list_data_limits(run)
    if language:
        sentences.append(
            f"Languages of the data: {', '.join(language)}. Other languages were neither trained nor measured."
        )
    else:
        sentences.append("The language of the data was not stated. In other languages the model was not measured.")
    bits = next((name for name in ("4", "8") if run.setting(f"load_in_{name}bit")), None)
    if bits is not None:
        sentences.append(
            f"The adapter was trained on a base in {bits} bits, whose weights differ from those in 16 bits."
        )
    if run.record.get("state") != "finished":
        sentences.append(f"The run had not finished: its state was {run.record.get('state') or 'unknown'}.")
    return sentences


def _list_evaluation_limits(run: Run, lineage: Lineage) -> list[str]:
    pairs = run.pairs or {}
    data, tuned = mapping(pairs.get("data")), mapping(pairs.get("tuned"))
    count = data.get("pairs")
    count = f"{count:,}" if isinstance(count, int) else "held-out"
    name = " and ".join(source.name for source in lineage.measured_on) or "the data"
    sentences = [f"The results are from {count} pairs of {name}; other kinds of prompts were not measured."]
    low = finite(mapping(tuned.get("accuracy")).get("low"))
    longer = pairs.get("always_longer")
    always = finite(mapping(longer).get("value") if isinstance(longer, dict) else longer)
    if low is not None and always is not None and low <= always:
        sentences.append(
            "The evaluation does not show that its reward accuracy is above that of always choosing the longer answer "
            f"({interval(longer)})."
        )
    return sentences


def _list_data_limits(run: Run) -> list[str]:
    data = run.data or {}
    train = mapping(data.get("train"))
    cut = mapping(train.get("shortened"))
    sentences = [str(finding) + "." for finding in data.get("findings") or []]
    kept = train.get("kept")
    cuts = [f"{CUTS[part]} in {cut[part]:,}" for part in CUTS if cut.get(part)]
    if isinstance(kept, int) and cuts:
        listed = " and ".join(filter(None, [", ".join(cuts[:-1]), cuts[-1]]))
        sentences.append(
            f"Of {kept:,} training pairs, the length limits cut {listed}: the model was not trained on longer texts."
        )
    if isinstance(kept, int) and kept < 1000:
        sentences.append(f"{kept:,} training pairs are few: the model may not generalise beyond them.")
    return sentences


MOST_LETTERS = 700  # of a prompt or an answer


def show_sample(sample: dict[str, Any]) -> Markup:
    """A sample as one line of HTML: the prompt, then the answers side by side, all text escaped."""
    answers = [answer for answer in sample["answers"] if answer["side"] != "chosen"]
    heads = Markup("").join(Markup("<th>{}</th>").format(answer["side"]) for answer in answers)
    cells = Markup("").join(
        Markup('<td valign="top"><code>{}</code>{}</td>').format(
            escape_lines(_shorten(answer["text"])), " (cut off at the length limit)" if answer["cut"] else ""
        )
        for answer in answers
    )
    return Markup(
        "<details><summary>{}</summary><p><b>Prompt</b><br><code>{}</code></p>"
        "<table><thead><tr>{}</tr></thead><tbody><tr>{}</tr></tbody></table></details>"
    ).format(_make_title(sample["prompt"]), escape_lines(_shorten(sample["prompt"], end=True)), heads, cells)


def _make_title(prompt: str) -> Markup:
    """The start of the prompt's last line with text, as a sample's title."""
    lines = [line for line in prompt.splitlines() if line.strip() and not line.strip().endswith("Assistant:")]
    title = " ".join((lines or ["a prompt"])[-1].removeprefix("Human:").split())
    return escape(title if len(title) <= 80 else f"{title[:77]}...")


def _shorten(text: str, *, end: bool = False) -> str:
    """The text, shortened to MOST_LETTERS from its start, or with `end` to its last letters."""
    more = len(text) - MOST_LETTERS
    if more <= 0:
        return text
    return f"[{more:,} letters ...] {text[-MOST_LETTERS:]}" if end else f"{text[:MOST_LETTERS]} [... {more:,} letters]"
