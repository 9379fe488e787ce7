"""Sections of a card: how the model was trained, what its reader must not believe, samples. No torch."""

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
        if not is_public(name):
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


def list_limits(run: Run, lineage: Lineage, *, language: Sequence[str], is_evaluated: bool) -> list[str]:
    """Sentences, the weightiest first."""
    told = [
        "A preferred answer is not a true one: the pairs say which of two answers somebody liked better. Truth, safety "
        "and bias were not measured here.",
        "What the base model knows, misses or gets wrong, this model does, too; so do its licence's terms go on.",
    ]
    told += _of_evaluation(run, lineage) if is_evaluated else ["It was not compared with its base on held-out pairs."]
    told += _of_data(run)
    if language:
        told.append(f"The data is in: {', '.join(language)}. Other languages were neither trained nor measured.")
    else:
        told.append("Nobody stated the language of the data; in any other one, nothing is known of the model.")
    bits = next((name for name in ("4", "8") if run.setting(f"load_in_{name}bit")), None)
    if bits is not None:
        told.append(f"The adapter was trained on a base of {bits} bits; on a base of 16 bits it meets other weights.")
    if run.record.get("state") != "finished":
        told.append(f"The run had not finished: its state was {run.record.get('state') or 'not known'}.")
    return told


def _of_evaluation(run: Run, lineage: Lineage) -> list[str]:
    pairs = run.pairs or {}
    data, tuned = mapping(pairs.get("data")), mapping(pairs.get("tuned"))
    count = data.get("pairs")
    count = f"{count:,}" if isinstance(count, int) else "held-out"
    name = lineage.measured_on[0].name if lineage.measured_on else "the data"
    told = [f"Its numbers are of {count} pairs of {name}, and say nothing of other kinds of prompts."]
    low = finite(mapping(tuned.get("accuracy")).get("low"))
    longer = pairs.get("always_longer")
    always = finite(mapping(longer).get("value") if isinstance(longer, dict) else longer)
    if low is not None and always is not None and low <= always:
        told.append(
            "Its reward accuracy is not shown to be above that of whoever always takes the longer answer "
            f"({interval(longer)})."
        )
    return told


def _of_data(run: Run) -> list[str]:
    data = run.data or {}
    train = mapping(data.get("train"))
    cut = mapping(train.get("shortened"))
    told = [str(found) + "." for found in data.get("findings") or []]
    kept = train.get("kept")
    if isinstance(kept, int) and (cut.get("prompt") or cut.get("answer")):
        told.append(
            f"Of {kept:,} training pairs, {cut.get('prompt', 0):,} lost the head of their prompt and "
            f"{cut.get('answer', 0):,} the end of an answer to the length limits: longer texts were not learnt from."
        )
    if isinstance(kept, int) and kept < 1000:
        told.append(f"{kept:,} training pairs are few: much of what they taught may be theirs alone.")
    return told


MOST_LETTERS = 700  # of a prompt or an answer


def show_sample(sample: dict[str, Any]) -> Markup:
    """One line of HTML: the prompt, then the answers side by side; no text can leave its cell."""
    answers = [one for one in sample["answers"] if one["side"] != "chosen"]
    heads = Markup("").join(Markup("<th>{}</th>").format(one["side"]) for one in answers)
    cells = Markup("").join(
        Markup('<td valign="top"><code>{}</code>{}</td>').format(
            escape_lines(_cut(one["text"])), "" if not one["cut"] else " (cut off at the length limit)"
        )
        for one in answers
    )
    return Markup(
        "<details><summary>{}</summary><p><b>Prompt</b><br><code>{}</code></p>"
        "<table><thead><tr>{}</tr></thead><tbody><tr>{}</tr></tbody></table></details>"
    ).format(_first_words(sample["prompt"]), escape_lines(_cut(sample["prompt"], end=True)), heads, cells)


def _first_words(prompt: str) -> Markup:
    """Of the prompt's last question, for the line that unfolds a sample."""
    asked = [line for line in prompt.splitlines() if line.strip() and not line.strip().endswith("Assistant:")]
    words = " ".join((asked or ["a prompt"])[-1].removeprefix("Human:").split())
    return escape(words if len(words) <= 80 else f"{words[:77]}...")


def _cut(text: str, *, end: bool = False) -> str:
    """The text, or of a long one the head; its end where that matters, as in a prompt."""
    more = len(text) - MOST_LETTERS
    if more <= 0:
        return text
    return f"[{more:,} letters ...] {text[-MOST_LETTERS:]}" if end else f"{text[:MOST_LETTERS]} [... {more:,} letters]"
