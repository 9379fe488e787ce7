"""Reads the rows of a source as training does: the same splits, layouts and reasons for dropping a row."""

import json
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset

from dpokit.data.columns import IDS
from dpokit.data.doctor.kinds import MOST_EXAMPLES
from dpokit.data.doctor.texts import mask, mask_values, shorten
from dpokit.data.formats import Pair
from dpokit.data.layouts import Layout
from dpokit.data.messages import UnusableError
from dpokit.data.rendering import Renderer, check_texts
from dpokit.data.shorten import LengthLimits
from dpokit.data.source_rows import SourceRows, choose_rows, load_sources
from dpokit.data.tally import Tally
from dpokit.data.tokens import Encoder
from dpokit.errors import DataError
from dpokit.settings.flags import DataArguments

BATCH_ROWS = 500


@dataclass(frozen=True)
class Usable:
    """A pair that training would keep.

    Attributes:
        row: its row in the split, from 0.
        place: which pair of the row it is, from 0.
        tokens: of the prompt, the chosen and the rejected answer before they are cut; () without a tokenizer.
    """

    pair: Pair
    row: int
    place: int
    tokens: tuple[int, ...]


@dataclass
class SplitRows:
    """A split of a source.

    Attributes:
        is_held_out: whether training would evaluate on it.
        rows, layout: as training reads them.
        tally: counts of kept and dropped pairs; complete once `read_pairs` is read to its end.
        dropped: examples of dropped rows by reason.
        cut_pairs: kept pairs that the length limits cut.
    """

    name: str
    is_held_out: bool
    rows: Dataset
    layout: Layout
    tally: Tally
    dropped: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    cut_pairs: int = 0

    def read_pair(self, row: int, place: int) -> Pair:
        """Reads a kept pair again."""
        pair = self.layout.to_pairs(self.rows[row])[place]
        assert isinstance(pair, Pair)
        return pair


def load_parts(data: DataArguments, *, has_test_flag: bool) -> list[SplitRows]:
    """Loads the training splits of the sources of the flags, and their held-out splits.

    Args:
        data: the flags of training.
        has_test_flag: whether the user named the held-out split, so that it must be there.

    Raises: DataError as in training.
    """
    data = copy(data)
    if data.dataset_streaming and data.max_train_samples is None:
        raise DataError(
            f"--dataset_streaming: {data.describe()} has no end that a check could wait for",
            expected="a number of rows to check",
            do="add --max_train_samples 10000, or leave --dataset_streaming out",
        )
    if data.dataset_streaming and data.max_eval_samples is None:
        data.max_eval_samples = data.max_train_samples
    loaded = load_sources(data, streaming=data.dataset_streaming)
    parts = [_build_part(rows, is_held_out=False) for rows in choose_rows(data, loaded, training=True)]
    has_split = any(source.test_split for source, _ in loaded) or all(
        data.dataset_test_split in splits for _, splits in loaded
    )
    if data.eval_fraction is None and (has_test_flag or has_split):
        parts += [_build_part(rows, is_held_out=True) for rows in choose_rows(data, loaded, training=False)]
    return parts


def _build_part(source: SourceRows, *, is_held_out: bool) -> SplitRows:
    rows = source.rows
    if isinstance(rows, IterableDataset):
        rows = Dataset.from_list(list(rows), on_mixed_types="use_json")
    return SplitRows(source.tally.source, is_held_out, rows, source.layout, source.tally)


def read_pairs(part: SplitRows, renderer: Renderer | None, limits: LengthLimits) -> Iterator[list[Usable]]:
    """Yields the kept pairs of a split in batches, and counts all pairs in its tally.

    Args:
        part: the split.
        renderer: of the model; None counts only the reasons that no model is needed for.
        limits: the length limits of training.
    """
    encoder = whole_encoder = None
    if renderer is not None:
        encoder = Encoder(renderer, part.layout, limits)
        whole_encoder = Encoder(renderer, part.layout, LengthLimits())
    first = 0
    for batch in part.rows.iter(batch_size=BATCH_ROWS):
        size = len(next(iter(batch.values())))
        rows = [{name: values[number] for name, values in batch.items()} for number in range(size)]
        several = map(part.layout.to_pairs, rows)
        pairs = [(number, place, pair) for number, row in enumerate(several) for place, pair in enumerate(row)]
        if encoder is None or whole_encoder is None:
            columns = whole = {"dropped": [_find_reason(pair) for _, _, pair in pairs]}
        else:
            columns = whole = encoder(batch, range(first, first + size))
            if any(columns["cut"]):
                whole = whole_encoder(batch, range(first, first + size))
        kept: list[Usable] = []
        for at, (number, place, pair) in enumerate(pairs):
            reason, cut, notes = (columns[name][at] if name in columns else "" for name in ("dropped", "cut", "notes"))
            if not part.tally.add(reason, cut, notes):
                _keep_example(part, reason, first + number, rows[number])
                continue
            assert isinstance(pair, Pair)
            part.cut_pairs += bool(cut)
            tokens = tuple(len(whole[name][at]) for name in IDS) if encoder else ()
            kept.append(Usable(pair, first + number, place, tokens))
        first += size
        yield kept


def _find_reason(pair: Pair | UnusableError) -> str:
    """Returns why a pair is dropped without a model, or ""."""
    try:
        if isinstance(pair, UnusableError):
            raise pair
        check_texts(pair)
        if pair.chosen == pair.rejected:
            return "equal_answers"
    except UnusableError as error:
        return str(error)
    return ""


def _keep_example(part: SplitRows, reason: str, row: int, values: dict[str, Any]) -> None:
    examples = part.dropped.setdefault(reason.partition(" (")[0], [])
    if len(examples) < MOST_EXAMPLES:
        try:
            text = json.dumps(mask_values(values), ensure_ascii=False)
        except (ValueError, RecursionError):
            text = "a row that cannot be shown"
        place = f"{part.name}, row {row + 1:,}"
        examples.append({"source": place, "reason": mask(reason), "row": shorten(text)})
