"""Keeps the token ids of the latest texts, so that a text that comes again is not encoded again. No torch."""

from array import array
from typing import Any

# A text needs a byte a letter or more, its ids about as much: about 30 MiB in each process.
MOST_LETTERS = 8 << 20


class TextCache:
    """Token ids by text and kind of encoding, of at most `MOST_LETTERS` letters; a full cache starts anew.

    Copies of it in other processes, and in the hash of what `datasets` computes, are empty.
    """

    def __init__(self) -> None:
        self._ids: dict[tuple[str, bool], array[int]] = {}
        self._letters = 0

    def __reduce__(self) -> Any:
        return TextCache, ()

    def get(self, text: str, *, special: bool) -> list[int] | None:
        """Returns the ids of a text; None if they are not kept."""
        ids = self._ids.get((text, special))
        return None if ids is None else ids.tolist()

    def add(self, text: str, ids: list[int], *, special: bool) -> None:
        """Keeps the ids of a text that is not kept yet."""
        if self._letters + len(text) > MOST_LETTERS:
            self._ids.clear()
            self._letters = 0
        if len(text) <= MOST_LETTERS:
            self._ids[text, special] = array("I", ids)
            self._letters += len(text)
