"""Keeps numbers about each pair in typed arrays, some 700 bytes a pair; its texts are read again for examples.

No torch.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from dpokit.data.doctor.near import can_sign, sign_texts
from dpokit.data.doctor.rows import SplitRows, Usable
from dpokit.data.doctor.shortcuts import FEATURES, MOST_OPENINGS, read_features, read_opening, read_scripts
from dpokit.data.doctor.texts import find_kinds, join_texts, show_pair

MOST_OPENINGS_COUNTED = 100_000


def hash_text(text: str) -> int:
    """Returns 64 bits that are equal for texts that differ in white space at their ends alone."""
    return int.from_bytes(blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class PairTable:
    """The numbers of all kept pairs of several splits, training splits first.

    Attributes:
        parts: the splits.
        part, row, place: where each pair is from: its split, its row and its place in the row.
        prompts, chosen, rejected: a hash of each text.
        letters: of prompt, chosen and rejected answer, (pairs, 3); tokens likewise, (0, 3) without a tokenizer.
        differences: of the features of the chosen and of the rejected answer, (pairs, FEATURES).
        kinds: the rows with each kind of finding about characters.
        prompt_numbers: for each pair the row of its prompt in `prompt_signatures`.
        prompt_signatures, answer_signatures: MinHash signatures of each different prompt, and of each pair's answers.
    """

    def __init__(self, parts: Sequence[SplitRows]) -> None:
        self.parts = parts
        self._part, self._row, self._place = array("i"), array("q"), array("i")
        self._hashes = array("Q")
        self._letters, self._tokens = array("i"), array("i")
        self._differences = array("f")
        self._openings = array("i")
        self._opening_numbers: dict[str, int] = {}
        self._prompt_rows: dict[int, int] = {}
        self._prompt_numbers = array("i")
        self._prompt_signatures: list[np.ndarray] = []
        self._answer_signatures: list[np.ndarray] = []
        self.kinds: dict[str, array[int]] = {}
        self.signs = can_sign()

    def __len__(self) -> int:
        return len(self._row)

    def add(self, part: int, batch: Sequence[Usable]) -> None:
        """Adds the pairs of a batch of one split."""
        new_prompts: list[tuple[str]] = []
        answers: list[tuple[str, str]] = []
        for usable in batch:
            prompt, chosen, rejected = list_pair_texts(usable)
            number = len(self)
            self._part.append(part)
            self._place.append(usable.place)
            self._row.append(usable.row)
            key = hash_text(prompt)
            self._hashes.extend((key, hash_text(chosen), hash_text(rejected)))
            self._letters.extend((len(prompt), len(chosen), len(rejected)))
            self._tokens.extend(usable.tokens)
            scripts = read_scripts(prompt)
            features = zip(read_features(chosen, scripts), read_features(rejected, scripts), strict=True)
            self._differences.extend(better - worse for better, worse in features)
            self._openings.extend(map(self._number_opening, (chosen, rejected)))
            for kind in find_kinds(prompt, chosen, rejected):
                self.kinds.setdefault(kind, array("q")).append(number)
            if key not in self._prompt_rows:
                self._prompt_rows[key] = len(self._prompt_rows)
                new_prompts.append((prompt,))
            self._prompt_numbers.append(self._prompt_rows[key])
            answers.append((chosen, rejected))
        if self.signs:
            self._prompt_signatures.append(sign_texts(new_prompts))
            self._answer_signatures.append(sign_texts(answers))

    def finish(self) -> None:
        """Turns the arrays into those of numpy, once all pairs are added."""
        self.part, self.row = np.asarray(self._part, np.int32), np.asarray(self._row, np.int64)
        hashes = np.asarray(self._hashes, np.uint64).reshape(-1, 3)
        self.prompts, self.chosen, self.rejected = hashes.T
        self.letters = np.asarray(self._letters, np.int64).reshape(-1, 3)
        self.tokens = np.asarray(self._tokens, np.int64).reshape(-1, 3)
        self.differences = np.asarray(self._differences, np.float32).reshape(-1, len(FEATURES))
        self.prompt_numbers = np.asarray(self._prompt_numbers, np.int64)
        if self.signs:
            self.prompt_signatures = _join(self._prompt_signatures)
            self.answer_signatures = _join(self._answer_signatures)
        self._prompt_rows = {}
        held_out = [number for number, part in enumerate(self.parts) if part.is_held_out]
        self.is_held_out = np.isin(self.part, held_out)

    def list_openings(self, rows: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Returns the most frequent openings, and for each of these rows the number of its two openings; -1: rare."""
        numbers = np.asarray(self._openings, np.int64).reshape(-1, 2)[rows]
        counts = Counter(numbers[numbers >= 0].tolist())
        frequent = [number for number, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        frequent = frequent[:MOST_OPENINGS]
        places = np.full(len(self._opening_numbers) + 1, -1)
        places[frequent] = np.arange(len(frequent))
        texts = list(self._opening_numbers)
        chosen, rejected = places[numbers].T
        return [texts[number] for number in frequent], chosen, rejected

    def name_row(self, number: int) -> str:
        """Returns where a pair is from, for a reader."""
        return f"{self.parts[self._part[number]].name}, row {self._row[number] + 1:,}"

    def show(self, number: int, kind: str = "", **more: str) -> dict[str, str]:
        """Returns a pair as an example of a kind of finding."""
        pair = self.parts[self._part[number]].read_pair(self._row[number], self._place[number])
        texts = (join_texts(pair.prompt), join_texts(pair.chosen), join_texts(pair.rejected))
        return show_pair(self.name_row(number), texts, kind, **more)

    def _number_opening(self, text: str) -> int:
        opening = read_opening(text)
        if opening not in self._opening_numbers and len(self._opening_numbers) >= MOST_OPENINGS_COUNTED:
            return -1
        return self._opening_numbers.setdefault(opening, len(self._opening_numbers))


def _join(signatures: list[np.ndarray]) -> np.ndarray:
    """Returns one array, and empties the list, so that no more than one of them is in memory twice."""
    joined = np.concatenate([sign_texts([]), *signatures])
    signatures.clear()
    return joined


def list_pair_texts(usable: Usable) -> tuple[str, str, str]:
    """Returns the texts of a pair's prompt, its chosen and its rejected answer."""
    pair = usable.pair
    return join_texts(pair.prompt), join_texts(pair.chosen), join_texts(pair.rejected)
