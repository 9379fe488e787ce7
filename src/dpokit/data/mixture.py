"""Chooses the pairs of each source of a mixture, whole or streamed. A single source is a mixture of one.

The same settings choose the same pairs on every machine: by `random.Random(...).random()`, whose numbers Python keeps.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets

from dpokit.data.columns import count_tokens, hash_pair, hash_pairs
from dpokit.data.encode_rows import check_reading, refuse_empty
from dpokit.data.tally import Tally
from dpokit.data.tokens import Encoder
from dpokit.errors import DataError
from dpokit.settings.mixture import DataSource

STREAM_BATCH_ROWS = 256


@dataclass(frozen=True)
class MixtureRules:
    """The rules by which pairs are left out, in the order of the attributes.

    Attributes:
        most_length_gap: the most tokens by which the answers of a pair differ; None for any number.
        drops_duplicates: whether a pair with the prompt and answers of an earlier pair is left out; the first source of
            the list wins.
        most_per_source: the most pairs of a source; None for all.
        balances: whether each source gives as many pairs as the smallest one.
        seed: decides which pairs of a source are taken.
    """

    most_length_gap: int | None = None
    drops_duplicates: bool = False
    most_per_source: int | None = None
    balances: bool = False
    seed: int = 0


@dataclass
class Part:
    """The usable pairs of one source.

    Attributes:
        pairs: as `encode_rows` returns them.
        tally: the counts of the source.
    """

    source: DataSource
    pairs: Dataset
    tally: Tally


@dataclass
class StreamPart:
    """The rows of one source, which are encoded while they are read."""

    source: DataSource
    rows: IterableDataset
    encoder: Encoder
    tally: Tally


@dataclass
class Mixture:
    """The chosen pairs of all sources.

    Attributes:
        pairs: those of the first source, then those of the second one, ...
        origins: the number of each pair's source.
        shared: the number of pairs whose prompt and answers are also in an earlier source.
    """

    pairs: Dataset
    origins: list[int]
    shared: int = 0


def mix_pairs(parts: Sequence[Part], rules: MixtureRules) -> Mixture:
    """Chooses the pairs of each source, and counts the others in the tallies of the sources.

    Raises: DataError if a source has no pair left, or fewer than its `count`.
    """
    usable = []
    owners: dict[bytes, int] = {}
    shared = 0
    for number, part in enumerate(parts):
        kept: Sequence[int] = range(len(part.pairs))
        if rules.most_length_gap is not None:
            chosen, rejected = (count_tokens(part.pairs, (f"{side}_ids",)) for side in ("chosen", "rejected"))
            short = [pair for pair in kept if abs(chosen[pair] - rejected[pair]) <= rules.most_length_gap]
            part.tally.drop("length_gap", len(kept) - len(short))
            kept = short
        if rules.drops_duplicates or len(parts) > 1:
            keys = hash_pairs(part.pairs)
            first = [pair for pair in kept if owners.setdefault(keys[pair], number) == number]
            shared += len(kept) - len(first)
            if rules.drops_duplicates:
                by_key: dict[bytes, int] = {}
                for pair in first:
                    by_key.setdefault(keys[pair], pair)
                part.tally.drop("duplicate_pair", len(kept) - len(by_key))
                kept = list(by_key.values())
        if not kept:
            raise refuse_empty(part.tally)
        usable.append(kept)
    for (part, kept), size in zip(zip(parts, usable, strict=True), _find_sizes(parts, usable, rules), strict=True):
        capped = min(len(kept), rules.most_per_source or len(kept))
        part.tally.drop("over_source_cap", len(kept) - capped)
        part.tally.drop("over_share", capped - size)
    chosen_pairs = []
    for number, (part, kept) in enumerate(zip(parts, usable, strict=True)):
        size = part.tally.kept
        if not size:
            raise refuse_empty(part.tally)
        kept = _sample(kept, size, f"{rules.seed} {number}")
        chosen_pairs.append(part.pairs if size == len(part.pairs) else part.pairs.select(kept))
    origins = [number for number, pairs in enumerate(chosen_pairs) for _ in range(len(pairs))]
    whole = chosen_pairs[0] if len(chosen_pairs) == 1 else concatenate_datasets(chosen_pairs)
    return Mixture(whole, origins, 0 if rules.drops_duplicates else shared)


def _find_sizes(parts: Sequence[Part], usable: Sequence[Sequence[int]], rules: MixtureRules) -> list[int]:
    """Returns the number of pairs that each source gives."""
    sizes = [min(len(kept), rules.most_per_source or len(kept)) for kept in usable]
    shares = [1.0 if rules.balances else part.source.fraction or 0.0 for part in parts]
    if all(shares):
        # As in TRL, the mixture is the largest one in which no source gives more pairs than it has.
        weights = [share / sum(shares) for share in shares]
        total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        return [min(size, round(weight * total)) for size, weight in zip(sizes, weights, strict=True)]
    for number, part in enumerate(parts):
        source, size = part.source, sizes[number]
        if source.count is not None and source.count > size:
            raise _refuse_count(part.tally, source.count, size)
        sizes[number] = source.count or (size if source.weight is None else round(source.weight * size))
    return sizes


def _refuse_count(tally: Tally, count: int, size: int) -> DataError:
    """Returns the error for a source with fewer usable pairs than its count."""
    return DataError(
        f"{tally.source} gives {size:,} usable pairs, and its count is {count:,}",
        expected="a count that the source can give, after duplicates and caps",
        do=f"lower count to {size:,}, or leave it out",
    )


def _sample(pairs: Sequence[int], size: int, seed: str) -> list[int]:
    """Returns `size` of the pairs, in their order; a larger sample with the same seed has all pairs of a smaller."""
    if size == len(pairs):
        return list(pairs)
    generator = random.Random(seed)
    ranks = [generator.random() for _ in pairs]
    taken = sorted(range(len(pairs)), key=ranks.__getitem__)[:size]
    return [pairs[place] for place in sorted(taken)]


def mix_streams(
    parts: Sequence[StreamPart], rules: MixtureRules, tally: Tally
) -> Callable[[], Iterator[dict[str, Any]]]:
    """Returns a function that yields the pairs of all streams, in the same order at each call.

    A seeded choice decides which source gives the next pair: in proportion to their fractions until one source ends,
    and without fractions each source equally often until all have ended. A `count` is the most that a source gives, a
    `weight` the probability of each of its pairs, and of duplicates the one that is read first is kept.

    Args:
        tally: the counts of the whole split; each row counts once, however often the streams are read.

    Raises: DataError while the streams are read: at the end of a source that gave no pair, or fewer than its `count`.
    """
    balanced = rules.balances or parts[0].source.fraction is not None
    encoded = [_encode_stream(part) for part in parts]

    def read_part(number: int, earlier: set[bytes]) -> Iterator[dict[str, Any]]:
        part, generator = parts[number], random.Random(f"{rules.seed} {number}")
        most = min(filter(None, (part.source.count, rules.most_per_source)), default=None)
        taken = 0
        for position, row in enumerate(check_reading(encoded[number], part.tally.source)):
            dropped, cut, notes = row.pop("dropped"), row.pop("cut"), row.pop("notes")
            key = row.pop("prompt_key")
            del row["whole_tokens"]
            if not dropped:
                dropped = _judge(row, key, rules, earlier) or ""
            if not dropped and part.source.weight is not None and generator.random() >= part.source.weight:
                dropped = "over_share"
            if position >= part.tally.rows:
                part.tally.add(dropped, cut, notes)
                if len(parts) > 1:
                    tally.add(dropped, cut, notes)
            if not dropped:
                taken += 1
                yield row
                if taken == most:
                    break
        if not taken:
            raise refuse_empty(part.tally)
        if part.source.count is not None and taken < part.source.count:
            raise _refuse_count(part.tally, part.source.count, taken)

    def read_all() -> Iterator[dict[str, Any]]:
        earlier: set[bytes] = set()
        streams = {number: read_part(number, earlier) for number in range(len(parts))}
        generator = random.Random(rules.seed)
        while streams:
            number = _draw(generator, {number: parts[number].source.fraction or 1.0 for number in streams})
            row = next(streams[number], None)
            if row is not None:
                yield row
            elif balanced:
                return
            else:
                del streams[number]

    return read_all


def _judge(row: dict[str, Any], prompt_key: bytes, rules: MixtureRules, earlier: set[bytes]) -> str | None:
    """Returns the reason for leaving a pair of a stream out, if any; and adds the pair to the earlier ones."""
    gap = abs(len(row["chosen_ids"]) - len(row["rejected_ids"]))
    if rules.most_length_gap is not None and gap > rules.most_length_gap:
        return "length_gap"
    if rules.drops_duplicates:
        pair = hash_pair(prompt_key, row["chosen_ids"], row["rejected_ids"])
        if pair in earlier:
            return "duplicate_pair"
        earlier.add(pair)
    return None


def _draw(generator: random.Random, weights: dict[int, float]) -> int:
    """Returns one of the keys, each with a probability in proportion to its value."""
    if len(weights) == 1:
        return next(iter(weights))
    rest = generator.random() * sum(weights.values())
    for key, weight in weights.items():
        rest -= weight
        if rest < 0:
            return key
    return key


def _encode_stream(part: StreamPart) -> IterableDataset:
    names = list(next(iter(check_reading(part.rows, part.tally.source))))
    size = STREAM_BATCH_ROWS
    return part.rows.map(part.encoder, batched=True, batch_size=size, with_indices=True, remove_columns=names)
