"""Finds texts that are nearly equal, by MinHash signatures (the package rensa) and bands of them. No torch.

Two texts are alike if their sets of 7 letters in a row are: their Jaccard similarity is the share of equal members of
two MinHash signatures (Broder, "On the resemblance and containment of documents", 1997). Texts are compared only if
one of 32 bands of 8 members is equal (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3): of texts
with a similarity of 0.8, that misses 0.3 %.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import numpy as np

LETTERS = 7  # in a row; with fewer, long texts of one language would look alike
MEMBERS = 256  # of a signature; the similarity is estimated to 0.025
BAND_MEMBERS = 8  # one byte each, so a band is one 64-bit number
LEAST_SIMILARITY = 0.75  # two standard deviations below 0.8
PART_LETTERS = 2_000_000  # are hashed at once; 16 MB of hashes
CHUNK = 20_000  # comparisons at once; 10 MB
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MIXER = np.uint64(0xBF58476D1CE4E5B9)


def can_sign() -> bool:
    """Whether the package rensa is installed."""
    return find_spec("rensa") is not None


def _hash_shingles(text: str, salt: int) -> np.ndarray:
    """Returns a 64-bit hash of each 7 letters of a text, which ignore upper case and the amount of white space."""
    letters = " ".join(text.lower().split()).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(letters, "<u4").astype(np.uint64)
    count = max(len(codes) - LETTERS + 1, 1)
    hashes = np.full(count, salt, np.uint64)
    for place in range(min(LETTERS, len(codes))):
        hashes = hashes * MULTIPLIER + codes[place : place + count]
    hashes ^= hashes >> np.uint64(29)
    hashes *= MIXER
    return hashes ^ (hashes >> np.uint64(32))


def sign_texts(rows: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns the signatures of rows of texts, (rows, MEMBERS) of uint8.

    The first texts of two rows are compared with each other, the second ones, and so on. A member is the low byte of a
    MinHash: two different ones are equal in 1 of 256 cases ("b-bit minwise hashing", Li and Koenig, 2010).
    """
    parts, first, letters = [np.zeros((0, MEMBERS), np.uint8)], 0, 0
    for number, row in enumerate(rows):
        letters += sum(map(len, row))
        if letters >= PART_LETTERS or number == len(rows) - 1:
            parts.append(_sign_part(rows[first : number + 1]))
            first, letters = number + 1, 0
    return np.concatenate(parts)


def _sign_part(rows: Sequence[Sequence[str]]) -> np.ndarray:
    from rensa import RMinHash

    hashes = [np.concatenate([_hash_shingles(text, salt) for salt, text in enumerate(row, 1)]) for row in rows]
    ends = np.zeros(len(rows) + 1, np.uint64)
    ends[1:] = np.cumsum([len(row) for row in hashes])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), ends, MEMBERS, 0)
    return np.asarray(matrix.to_rows(), np.uint32).astype(np.uint8)


def compare(signatures: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the estimated similarity of pairs of rows, 0 to 1."""
    parts = [
        (signatures[first[at : at + CHUNK]] == signatures[second[at : at + CHUNK]]).mean(axis=1)
        for at in range(0, len(first), CHUNK)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def find_twins(
    signatures: np.ndarray,
    others: int | None = None,
    also: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Returns for each row an earlier row that is nearly equal, or -1.

    Args:
        signatures: of `sign_texts`.
        others: compare only rows from this one on, and only with rows before it; None compares all.
        also: another similarity of two arrays of rows, which must be as high.
    """
    rows = np.arange(len(signatures))
    twins = np.full(len(signatures), -1)
    for first, second in _list_candidates(np.ascontiguousarray(signatures), others):
        is_new = (twins[second] < 0) & (first < second)
        is_new &= True if others is None else (first < others) & (rows[second] >= others)
        first, second = first[is_new], second[is_new]
        is_near = compare(signatures, first, second) >= LEAST_SIMILARITY
        if also is not None:
            is_near[is_near] = also(first[is_near], second[is_near]) >= LEAST_SIMILARITY
        twins[second[is_near]] = first[is_near]
    return twins


def _list_candidates(signatures: np.ndarray, others: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields for each band two arrays of rows that have it in common, the earlier row first.

    Each row is compared with the first one of a band, with the one before it, and with the last one before `others`:
    comparing all with all would take hours if half of the rows had one template.
    """
    for band in signatures.view(np.uint64).T:
        order = np.argsort(band, kind="stable")
        sorted_band = band[order]
        is_head = np.r_[True, sorted_band[1:] != sorted_band[:-1]]
        places = np.arange(len(order))
        heads = np.maximum.accumulate(np.where(is_head, places, 0))
        partners = [heads, np.where(is_head, places, places - 1)]
        if others is not None:
            partners.append(np.maximum(np.maximum.accumulate(np.where(order < others, places, 0)), heads))
        for partner in partners:
            yield order[partner], order
