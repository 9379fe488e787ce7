"""Limits of questions and their rate, checked on the server whatever the page sends. No torch."""

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
MOST_ADDRESSES = 10_000  # addresses whose last minute is stored
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class RefusedError(Exception):
    """A question that is refused; the argument is a sentence for the user."""


@dataclass(frozen=True)
class RequestLimits:
    """The limits of requests.

    Attributes:
        prompt_characters: the most characters of a question.
        conversation_characters: the most characters of a conversation with its question.
        new_tokens: the most tokens of an answer.
        waiting: the most questions that wait; one more is refused as busy.
        per_minute: the most questions from one client in a minute.
    """

    prompt_characters: int = 8_000
    conversation_characters: int = 64_000
    new_tokens: int = 512
    waiting: int = 16
    per_minute: int = 60


@dataclass(frozen=True)
class SamplingSettings:
    """How an answer is sampled; temperature 0 is greedy, and an equal seed repeats the answer."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 0


def read_sampling(
    temperature: Any, top_p: Any, max_new_tokens: Any, seed: Any, *, limits: RequestLimits
) -> SamplingSettings:
    """The sampling settings of a request. Raises: RefusedError for a value that is no number or outside its limits."""
    return SamplingSettings(
        _read_number(temperature, "temperature", 0.0, MOST_TEMPERATURE),
        _read_number(top_p, "top-p", 0.01, 1.0),
        _read_whole_number(max_new_tokens, "the length of an answer", 1, limits.new_tokens),
        _read_whole_number(seed, "seed", 0, MOST_SEED),
    )


def read_question(text: Any, limits: RequestLimits) -> str:
    """The question without outer whitespace. Raises: RefusedError if it is empty, too long, or not text."""
    if not isinstance(text, str):
        raise RefusedError("The question is not a text.")
    if len(text) > limits.prompt_characters:
        raise RefusedError(
            f"The question has {len(text):,} characters; at most {limits.prompt_characters:,} are allowed."
        )
    if any(not (letter.isprintable() or letter.isspace()) and ord(letter) < 0x100 for letter in text):
        raise RefusedError("The question contains control characters, which are not allowed.")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):  # lone surrogates, which UTF-8 cannot encode
        raise RefusedError("The question contains incomplete characters (lone surrogates).")
    if not text.strip():
        raise RefusedError("The question is empty.")
    return text.strip()


def _read_number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RefusedError(f"{name.capitalize()} is not a number.")
    if not low <= value <= high:
        raise RefusedError(f"{name.capitalize()} is {value:g}; it must be from {low:g} to {high:g}.")
    return float(value)


def _read_whole_number(value: Any, name: str, low: int, high: int) -> int:
    number = _read_number(value, name, low, high)
    if number != int(number):
        raise RefusedError(f"{name.capitalize()} is {number:g}; it must be a whole number.")
    return int(number)


def find_client(address: str) -> str:
    """The client that an address counts as: an IPv4 address, or the /64 network of an IPv6 address.

    One household or host usually has a complete /64 network.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False))


def is_within(address: str, networks: Iterable[Network]) -> bool:
    """Whether the address belongs to one of the networks; False for a host name."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


class RateLimit:
    """Limits how often each address may do something in any minute.

    Args:
        per_minute: the limit.
        clock: returns the time in seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock, self._lock = per_minute, clock, Lock()
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def allows(self, address: str) -> bool:
        """Whether the address is below its limit now; if so, this call counts."""
        now = self._clock()
        with self._lock:
            times = self._times.setdefault(address, deque())
            self._times.move_to_end(address)
            _forget(times, now)
            if len(self._times) > MOST_ADDRESSES:
                self._times.popitem(last=False)
            if len(times) >= self._most:
                return False
            times.append(now)
            return True

    def is_spent(self, address: str) -> bool:
        """Whether the address has reached its limit; this call does not count."""
        with self._lock:
            times = self._times.get(address, deque())
            _forget(times, self._clock())
            return len(times) >= self._most


def _forget(times: deque[float], now: float) -> None:
    while times and now - times[0] >= 60:
        times.popleft()
