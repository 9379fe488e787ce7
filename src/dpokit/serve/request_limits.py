"""What one question may ask for, and how often: checked here, whatever the page allows. No torch."""

import ipaddress
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Any

MOST_SEED = 2**31 - 1
MOST_TEMPERATURE = 2.0
MOST_ADDRESSES = 10_000  # whose last minute is remembered
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class RefusedError(Exception):
    """A question that is not answered; the argument is a sentence for the one who asked."""


@dataclass(frozen=True)
class Limits:
    """The most of everything.

    Attributes:
        prompt_characters: of a question.
        conversation_characters: of a question with all that was said before it.
        new_tokens: of an answer.
        waiting: questions that wait for their turn; one more is told that all is busy.
        per_minute: questions from one address.
    """

    prompt_characters: int = 8_000
    conversation_characters: int = 64_000
    new_tokens: int = 512
    waiting: int = 16
    per_minute: int = 60


@dataclass(frozen=True)
class Sampling:
    """How an answer is sampled; temperature 0 is greedy, and the seed repeats it."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 0


def read_sampling(temperature: Any, top_p: Any, max_new_tokens: Any, seed: Any, *, limits: Limits) -> Sampling:
    """What a page, or whoever speaks for one, sent. Raises: RefusedError for what is no number or beyond its limits."""
    return Sampling(
        _number(temperature, "temperature", 0.0, MOST_TEMPERATURE),
        _number(top_p, "top-p", 0.01, 1.0),
        _whole(max_new_tokens, "the length of an answer", 1, limits.new_tokens),
        _whole(seed, "seed", 0, MOST_SEED),
    )


def read_question(text: Any, limits: Limits) -> str:
    """The question without outer space. Raises: RefusedError for none, too long a one, or what is no text."""
    if not isinstance(text, str):
        raise RefusedError("A question is a text.")
    if len(text) > limits.prompt_characters:
        raise RefusedError(
            f"The question has {len(text):,} characters; at most {limits.prompt_characters:,} are taken."
        )
    if any(not (letter.isprintable() or letter.isspace()) and ord(letter) < 0x100 for letter in text):
        raise RefusedError("The question holds control characters; only text is taken.")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):  # halves of characters, which UTF-8 cannot carry
        raise RefusedError("The question holds halves of characters; only whole text is taken.")
    if not text.strip():
        raise RefusedError("There is no question yet.")
    return text.strip()


def _number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RefusedError(f"{name.capitalize()} is not a number.")
    if not low <= value <= high:
        raise RefusedError(f"{name.capitalize()} is {value:g}; it goes from {low:g} to {high:g}.")
    return float(value)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    found = _number(value, name, low, high)
    if found != int(found):
        raise RefusedError(f"{name.capitalize()} is {found:g}; it is a whole number.")
    return int(found)


def find_party(address: str) -> str:
    """Who counts as one: an IPv4 address, or an IPv6 network of 64 bits, which one household or host has whole."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), 64), strict=False))


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Whether the address belongs to one of the networks; no name of a host does."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(found in network for network in networks)


class Rate:
    """How often each address may come in any minute.

    Args:
        per_minute: the most.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock, self._lock = per_minute, clock, Lock()
        self._seen: OrderedDict[str, deque[float]] = OrderedDict()

    def allows(self, address: str) -> bool:
        """Whether it may come now; it is counted where it may."""
        now = self._clock()
        with self._lock:
            times = self._seen.setdefault(address, deque())
            self._seen.move_to_end(address)
            _forget(times, now)
            if len(self._seen) > MOST_ADDRESSES:
                self._seen.popitem(last=False)
            if len(times) >= self._most:
                return False
            times.append(now)
            return True

    def is_spent(self, address: str) -> bool:
        """Whether it may not come now; nothing is counted."""
        with self._lock:
            times = self._seen.get(address, deque())
            _forget(times, self._clock())
            return len(times) >= self._most


def _forget(times: deque[float], now: float) -> None:
    while times and now - times[0] >= 60:
        times.popleft()
