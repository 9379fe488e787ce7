"""What a card must not let its reader believe: sentences that follow from a run's own facts. No torch."""

from collections.abc import Sequence

from dpokit.card.origin import Lineage
from dpokit.report.read import Run, finite, mapping
from dpokit.report.tables import interval


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
