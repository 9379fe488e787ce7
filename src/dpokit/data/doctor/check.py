"""Checks the pairs of one or several sources, and writes down all findings. No torch, but transformers."""

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpokit.data.doctor.conflicts import MOST_LOOPS, find_conflicts
from dpokit.data.doctor.kinds import MOST_EXAMPLES, NO_RENSA, Finding
from dpokit.data.doctor.lengths import LIMITS, count_bins, measure_cuts
from dpokit.data.doctor.near import compare, find_twins
from dpokit.data.doctor.pairs import PairTable
from dpokit.data.doctor.rows import SplitRows, load_parts, read_pairs
from dpokit.data.doctor.shortcuts import FAMILIES, Accuracy, measure_scores, measure_shortcuts, rank_openings
from dpokit.data.doctor.texts import PATTERNS, mask, show_text
from dpokit.data.prepare import find_limits
from dpokit.data.rendering import Renderer
from dpokit.data.shorten import LengthLimits
from dpokit.data.tally import find_remedies
from dpokit.settings.flags import DataArguments
from dpokit.settings.mixture import SHARES

NO_MODEL = "numbers of tokens (--model_name_or_path names the model whose tokenizer counts them)"
NO_HELD_OUT = "leaks into held-out pairs (there is no held-out split; --dataset_test_split names one)"
HELD_OUT_BY_PROMPT = (
    "leaks into held-out pairs (--eval_fraction keeps all pairs of one prompt on one side, but of two nearly equal "
    "prompts, one may be trained on and the other held out)"
)
SHOWN_OPENINGS = 10


def check_data(
    sources: Sequence[str],
    data: DataArguments,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    has_test_flag: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Returns the content of data-check.json: counts, findings and measures of the pairs that training would get.

    Args:
        sources: Hub ids, files or folders; their training splits are checked together. [] for the sources of `data`.
        data: the flags of training; with `sources`, those that name datasets are not read.
        tokenizer: of the model; None counts no tokens, and misses reasons that only a model has.
        max_length: most tokens of prompt and answer.
        has_test_flag: whether the user named the held-out split.
        on_progress: gets the number of pairs of each batch.

    Raises: DataError as `prepare_data`, except that no usable pair is a finding.
    """
    named = [_name_source(data, source) for source in sources] or [data]
    parts = [part for each in named for part in load_parts(each, has_test_flag=has_test_flag)]
    parts.sort(key=lambda part: part.is_held_out)
    renderer = None
    if tokenizer is not None:
        renderer = Renderer(tokenizer, data.template_date, data.prompt_format)
    limits = find_limits(data, max_length)
    table = PairTable(parts)
    for number, part in enumerate(parts):
        for batch in read_pairs(part, renderer, limits):
            table.add(number, batch)
            if on_progress is not None:
                on_progress(len(batch))
    table.finish()
    training = np.flatnonzero(~table.is_held_out)
    shortcuts = _measure_shortcuts(table, training)
    findings = [
        *_list_dropped(parts),
        *_list_repeated(table, training),
        *_list_conflicts(table, training),
        *_list_leaks(table),
        *_list_shortcuts(shortcuts),
        *(_list_cut(parts) if tokenizer is not None and limits != LengthLimits() else []),
        *_list_characters(table),
    ]
    missing = [] if table.signs else [NO_RENSA]
    missing += [] if tokenizer is not None else [NO_MODEL]
    if not any(part.is_held_out for part in parts):
        missing.append(NO_HELD_OUT if data.eval_fraction is None else HELD_OUT_BY_PROMPT)
    if settings := _list_later_settings(named):
        missing.append(f"what {', '.join(settings)} would leave out (all usable pairs are counted here)")
    tokens = table.tokens[training] if len(table.tokens) else table.tokens
    lengths = tokens if len(tokens) else table.letters[training]
    return {
        "sources": list(sources) or [source.title for source in data.sources()],
        "splits": [
            part.tally.record() | {"dropped": dict(_count_dropped([part])), "held_out": part.is_held_out}
            for part in parts
        ],
        "findings": [finding.record() for finding in findings],
        "not_checked": missing,
        "shortcuts": {
            name: {
                "accuracy": round(accuracy.value, 4),
                "pairs": accuracy.pairs,
                "decided": accuracy.decided,
                "accuracy_where_decided": round(accuracy.where_decided, 4),
            }
            for name, accuracy in shortcuts.items()
        },
        "openings": _rank_openings(table, training),
        "lengths": {
            "unit": "tokens" if len(tokens) else "characters",
            "texts": count_bins(dict(zip(("prompt", "chosen", "rejected"), lengths.T, strict=True))),
            "difference": count_bins({"chosen minus rejected": lengths[:, 1] - lengths[:, 2]}),
        },
        "limits": [
            measure_cuts(tokens, replace(limits, total_tokens=limit))
            for limit in sorted({*LIMITS, max_length or LIMITS[0]})
            if len(tokens)
        ],
    }


def _name_source(data: DataArguments, source: str) -> DataArguments:
    """Returns the flags with this source as the only one."""
    data = copy(data)
    data.dataset_name, data.datasets, data.dataset_mixer = source, None, None
    return data


def _list_later_settings(named: Sequence[DataArguments]) -> list[str]:
    """Returns the settings that leave out usable pairs in training, which a check does not."""
    flags = ("drop_duplicates", "max_length_gap", "max_pairs_per_source", "balance_sources")
    settings = [f"--{name}" for name in flags if getattr(named[0], name) not in (None, False)]
    sources = [source for data in named for source in data.sources()]
    shares = [name for name in SHARES if any(getattr(source, name) is not None for source in sources)]
    return settings + [f"the {name} of a source" for name in shares]


def _count_dropped(parts: Sequence[SplitRows]) -> Counter[str]:
    """Returns the number of dropped rows by reason, the most frequent first; a reason may quote a row."""
    dropped: Counter[str] = Counter()
    for part in parts:
        for reason, count in part.tally.dropped.most_common():
            dropped[mask(reason)] += count
    return Counter(dict(dropped.most_common()))


def _list_dropped(parts: Sequence[SplitRows]) -> list[Finding]:
    dropped = _count_dropped(parts)
    examples = [example for part in parts for several in part.dropped.values() for example in several[:1]]
    detail = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    total = sum(part.tally.rows for part in parts)
    return [Finding("dropped", dropped.total(), total, "rows", detail, examples, find_remedies(dropped))]


def _list_repeated(table: PairTable, training: np.ndarray) -> list[Finding]:
    """Returns the findings of equal and nearly equal pairs and prompts of the training splits."""
    keys = np.stack([table.prompts, table.chosen, table.rejected], axis=1)[training]
    _, first, inverse, counts = np.unique(keys, axis=0, return_index=True, return_inverse=True, return_counts=True)
    earlier = training[first[inverse]]
    repeated = training[earlier != training]
    most = int(counts.max(initial=0))
    prompts = len(np.unique(table.prompts[training]))
    detail = f"{len(first):,} different pairs, {prompts:,} different prompts; one pair is there {most:,} times"
    earlier_of = dict(zip(training.tolist(), earlier.tolist(), strict=True))
    findings = [
        Finding(
            "repeated_pairs",
            len(repeated),
            len(training),
            detail=detail if len(repeated) else "",
            examples=[table.show(row, equal_to=table.name_row(earlier_of[row])) for row in repeated[:MOST_EXAMPLES]],
        )
    ]
    if not table.signs:
        return findings
    unique = np.sort(training[first])  # the first row of each pair
    twins = _find_near_pairs(table, unique)
    rows = np.flatnonzero(twins >= 0)
    examples = [table.show(unique[row], similar_to=table.name_row(unique[twins[row]])) for row in rows[:MOST_EXAMPLES]]
    findings.append(Finding("near_pairs", len(rows), len(unique), "different pairs", examples=examples))
    numbers, first_rows = np.unique(table.prompt_numbers[training], return_index=True)
    twins = find_twins(table.prompt_signatures[numbers])
    rows = np.flatnonzero(twins >= 0)
    pairs = [(training[first_rows[row]], training[first_rows[twins[row]]]) for row in rows[:MOST_EXAMPLES]]
    examples = [table.show(later, similar_to=table.name_row(earlier)) for later, earlier in pairs]
    return [*findings, Finding("near_prompts", len(rows), len(numbers), "different prompts", examples=examples)]


def _find_near_pairs(table: PairTable, rows: np.ndarray) -> np.ndarray:
    """Returns for each row the place of an earlier one whose answers and prompt are nearly equal to its own, or -1."""

    def is_same_prompt(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        numbers = table.prompt_numbers[rows]
        return compare(table.prompt_signatures, numbers[first], numbers[second])

    return find_twins(table.answer_signatures[rows], also=is_same_prompt)


def _list_conflicts(table: PairTable, training: np.ndarray) -> list[Finding]:
    columns = (table.prompts[training], table.chosen[training], table.rejected[training])
    opposites, loops = find_conflicts(*(column.tolist() for column in columns))
    shown = [(training[later], table.name_row(training[earlier])) for earlier, later in opposites[:MOST_EXAMPLES]]
    examples = [table.show(row, opposite_of=other) for row, other in shown]
    loop_examples = [
        table.show(training[rows[0]], loop_with="; ".join(table.name_row(training[row]) for row in rows[1:6]))
        for rows in loops[:MOST_EXAMPLES]
    ]
    detail = f"the search ended at {MOST_LOOPS} loops" if len(loops) >= MOST_LOOPS else ""
    return [
        Finding("opposite_pairs", len(opposites), len(training), examples=examples),
        Finding("loops", len(loops), len(training), "pairs, one of each loop", detail, loop_examples),
    ]


def _list_leaks(table: PairTable) -> list[Finding]:
    held_out, training = np.flatnonzero(table.is_held_out), np.flatnonzero(~table.is_held_out)
    if not len(held_out):
        return []
    trained = table.prompts[training]
    leaked = held_out[np.isin(table.prompts[held_out], trained)]
    findings = [
        Finding(
            "leaked_prompts",
            len(leaked),
            len(held_out),
            "held-out pairs",
            examples=[
                table.show(row, trained_in=table.name_row(training[np.argmax(trained == table.prompts[row])]))
                for row in leaked[:MOST_EXAMPLES]
            ],
        )
    ]
    if not table.signs:
        return findings
    # Prompts are numbered in the order of the splits, so those that only held-out pairs have come last.
    number_of_trained = int(table.prompt_numbers[training].max(initial=-1)) + 1
    twins = find_twins(table.prompt_signatures, others=number_of_trained)
    near = held_out[twins[table.prompt_numbers[held_out]] >= 0]
    examples = []
    for row in near[:MOST_EXAMPLES]:
        twin = twins[table.prompt_numbers[row]]
        earlier = training[np.argmax(table.prompt_numbers[training] == twin)]
        examples.append(table.show(row, similar_to=table.name_row(earlier)))
    return [*findings, Finding("near_leaked_prompts", len(near), len(held_out), "held-out pairs", examples=examples)]


def _measure_shortcuts(table: PairTable, training: np.ndarray) -> dict[str, Accuracy]:
    """Returns the accuracy of always taking the longer answer, and of each family of features."""
    longer = measure_scores(np.sign(table.letters[training, 1] - table.letters[training, 2]))
    _, chosen, rejected = table.list_openings(training)
    families = measure_shortcuts(table.differences[training], (chosen, rejected), table.prompts[training])
    return {"always_longer": longer} | families


def _list_shortcuts(shortcuts: dict[str, Accuracy]) -> list[Finding]:
    findings = []
    for kind in (*FAMILIES, "opening", "all_shortcuts"):
        accuracy = shortcuts[kind]
        detail = f"right in {accuracy.where_decided:.1%} of them"
        if kind == "length":
            detail += f"; always the longer one is right in {shortcuts['always_longer'].value:.1%} of all pairs"
        count, total = accuracy.decided, accuracy.pairs
        findings.append(Finding(kind, count, total, "pairs decided", detail, is_certain=accuracy.is_certain))
    return findings


def _rank_openings(table: PairTable, training: np.ndarray) -> list[dict[str, Any]]:
    ranked = rank_openings(*table.list_openings(training))[:SHOWN_OPENINGS]
    return [{"opening": show_text(text), "chosen": wins, "rejected": losses} for text, wins, losses in ranked]


def _list_cut(parts: Sequence[SplitRows]) -> list[Finding]:
    kept = sum(part.tally.kept for part in parts if not part.is_held_out)
    cuts: Counter[str] = Counter()
    for part in parts:
        cuts.update(part.tally.shortened if not part.is_held_out else {})
    detail = ", ".join(f"{count:,} lose {name}" for name, count in cuts.most_common())
    return [Finding("cut", sum(part.cut_pairs for part in parts if not part.is_held_out), kept, detail=detail)]


def _list_characters(table: PairTable) -> list[Finding]:
    findings = []
    for kind in (*PATTERNS, "invisible_answers"):
        rows = table.kinds.get(kind, ())
        examples = [table.show(row, kind) for row in rows[:MOST_EXAMPLES]]
        findings.append(Finding(kind, len(rows), len(table), examples=examples))
    return findings
