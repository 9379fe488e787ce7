"""Reads columns of tokenised splits; the token ids stay in Arrow files, so memory does not grow with the split."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
# For each token of an answer, 1 if it is scored and 0 if it is of a user's or a tool's turn; empty if all are scored.
MASKS = ("chosen_mask", "rejected_mask")
FEATURES = Features(
    {name: List(Value("int32")) for name in IDS}
    | {name: List(Value("int8")) for name in MASKS}
    # Of the pair before it was cut: a hash of its prompt's ids, and the tokens of the prompt and the longer answer.
    | {"prompt_key": Value("binary"), "whole_tokens": Value("int32")}
    | {"row": Value("int64"), "dropped": Value("string"), "cut": Value("string"), "notes": Value("string")}
)
BATCH_ROWS = 10_000
_FINGERPRINTS: WeakKeyDictionary[Dataset, str] = WeakKeyDictionary()  # by the object: its rows never change


def read_column(split: Dataset, name: str) -> list[Any]:
    """Returns a column as a list of Python values; for columns that fit in memory."""
    return [value for batch in _batches(split, name) for value in batch[name].to_pylist()]


def fingerprint_ids(splits: Sequence[Dataset]) -> str:
    """Returns the sha256 of all token ids and masks of the splits in order.

    Empty masks and missing columns of masks do not change it. The hash of each split is kept for later calls.
    """
    if len(splits) == 1 and splits[0] in _FINGERPRINTS:
        return _FINGERPRINTS[splits[0]]
    whole = hashlib.sha256()
    for number, split in enumerate(splits):
        digests = [whole] if number == 0 else [whole, hashlib.sha256()]
        masks = [name for name in MASKS if name in split.column_names]
        for batch in _batches(split, *IDS, *masks):
            for name in (*IDS, *masks):
                lengths, flat = _read_ids(batch[name])
                if name in masks and not flat.size:
                    continue
                for digest in digests:
                    digest.update((name.encode() if name in masks else b"") + lengths.tobytes() + flat.tobytes())
        _FINGERPRINTS[split] = digests[-1].hexdigest()
    return whole.hexdigest()


def hash_ids(ids: Sequence[int]) -> bytes:
    """Returns 16 bytes that are equal for equal token ids."""
    return _hash(np.asarray(ids, "<i4"))


def hash_prompts(split: Dataset) -> list[bytes]:
    """Returns a key for each pair's prompt; keys are equal if the prompts' token ids are, before they were cut.

    Of a split without the column `prompt_key`, the ids are those of the prompts as they are.
    """
    keys: list[bytes] = []
    if "prompt_key" in split.column_names:
        return read_column(split, "prompt_key")
    for batch in _batches(split, "prompt_ids"):
        lengths, flat = _read_ids(batch["prompt_ids"])
        ends = np.cumsum(lengths)
        keys += [_hash(flat[end - size : end]) for end, size in zip(ends, lengths, strict=True)]
    return keys


def hash_pairs(split: Dataset) -> list[bytes]:
    """Returns a key for each pair; keys are equal if the uncut prompts and the answers as they are trained are."""
    keys: list[bytes] = []
    for batch in _batches(split, "prompt_key", "chosen_ids", "rejected_ids"):
        sides = []
        for name in ("chosen_ids", "rejected_ids"):
            lengths, flat = _read_ids(batch[name])
            sides.append([flat[end - size : end] for end, size in zip(np.cumsum(lengths), lengths, strict=True)])
        prompts = batch["prompt_key"].to_pylist()
        keys += [hash_pair(*pair) for pair in zip(prompts, *sides, strict=True)]
    return keys


def hash_pair(prompt_key: bytes, chosen: Sequence[int], rejected: Sequence[int]) -> bytes:
    """Returns the key of one pair, as `hash_pairs`."""
    sides = [np.asarray(ids, "<i4").tobytes() for ids in (chosen, rejected)]
    return hashlib.blake2b(b"|".join((prompt_key, str(len(chosen)).encode(), *sides)), digest_size=16).digest()


def _hash(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def count_tokens(split: Dataset, columns: Sequence[str] = IDS) -> list[int]:
    """Returns the number of tokens of each pair, or of these columns of it; the prompt counts once."""
    counts: list[int] = []
    for batch in _batches(split, *columns):
        # Only the ends of the rows are read, not the ids.
        lengths = [np.asarray(batch[name].combine_chunks().value_lengths()) for name in columns]
        counts += np.sum(lengths, axis=0).tolist()
    return counts


def _batches(split: Dataset, *names: str) -> Iterator[pa.Table]:
    return iter(split.select_columns(list(names)).with_format("arrow").iter(batch_size=BATCH_ROWS))


def _read_ids(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lengths of the rows, and the ids of all rows in one array; both `<i4`."""
    values = column.combine_chunks()
    return np.asarray(values.value_lengths()).astype("<i4"), np.asarray(values.flatten()).astype("<i4")
