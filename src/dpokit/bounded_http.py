"""Requests to an untrusted chat-completions server; time, bytes and line lengths of a reply are bounded. No torch."""

import asyncio
import ipaddress
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ssl import SSLContext
from typing import Any

import httpx

from dpokit.apikey import ApiKey
from dpokit.terminal import one_line

# Limit for a line, for an event, and for JSON that is parsed as a whole: Python objects take some 30 times as much.
MOST_JSON_BYTES = 2**20
MOST_TOKENS = 2**53  # the largest token count that is accepted from a server
EXCERPT_BYTES, EXCERPT_SECONDS = 2**12, 5.0  # of an error reply, which is shown and not parsed
_BLOCK_BYTES = 2**16
_LINE_END = re.compile(rb"\r\n|\r|\n")
_ENCODINGS = ("gzip", "x-gzip", "deflate")


class ReplyError(Exception):
    """A reply that exceeds its bounds or cannot be read; its message follows the server's name in a sentence."""


class BoundedReply:
    """A reply whose body is read up to a limit.

    Attributes:
        status: the HTTP status code.
        headers: all response headers.

    Args:
        response: its body is not read yet.
        most_bytes: limit for the body, both compressed and decompressed.
    """

    def __init__(self, response: httpx.Response, *, most_bytes: int) -> None:
        self.status, self.headers = response.status_code, response.headers
        self._response, self._most_bytes = response, most_bytes

    async def read(self) -> bytes:
        """The whole body. Raises: ReplyError, and as `post`."""
        body = bytearray()
        async for piece in self._pieces():
            body += piece
        return bytes(body)

    async def read_excerpt(self) -> str:
        """The beginning of the body in one printable line, as far as it arrives within EXCERPT_SECONDS."""
        body = bytearray()
        with suppress(httpx.HTTPError, ReplyError, TimeoutError):
            async with asyncio.timeout(EXCERPT_SECONDS):
                async for piece in self._pieces():
                    body += piece
                    if len(body) > EXCERPT_BYTES:
                        break
        return one_line(body.decode(errors="replace"))

    async def read_events(self) -> AsyncIterator[str]:
        """The data of each server-sent event (WHATWG HTML, 9.2.6), also of a last event without a blank line after it.

        Raises: ReplyError, UnicodeDecodeError, and as `post`.
        """
        events = _Events()
        async for piece in self._pieces():
            for data in events.feed(piece):
                yield data
        for data in events.feed(b"\n\n"):
            yield data

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The decompressed body, in pieces of some 64 KiB at most."""
        unpack = _Unpacking(self.headers)
        packed_bytes = plain_bytes = 0
        async for packed in self._response.aiter_raw():
            packed_bytes += len(packed)
            for piece in unpack.feed(packed):
                plain_bytes += len(piece)
                if max(packed_bytes, plain_bytes) > self._most_bytes:
                    raise ReplyError(f"sends more than {self._most_bytes:,} bytes")
                yield piece
        unpack.close()


class _Events:
    """Splits a stream into server-sent events."""

    def __init__(self) -> None:
        self._line = bytearray()  # the part of the current line that has arrived
        self._data: list[str] = []  # data lines of the current event
        self._data_bytes = 0
        self._is_first, self._is_half_end = True, False

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that this piece ends."""
        if not piece:
            return
        # A line ends with \n, \r\n or \r. A line is complete at \r; a \n at the start of the next piece belongs to it.
        first, *lines = _LINE_END.split(piece[1:] if self._is_half_end and piece[:1] == b"\n" else piece)
        self._is_half_end = piece[-1:] == b"\r"
        self._line += first
        if lines:
            whole, self._line = bytes(self._line), bytearray(lines.pop())
            lines.insert(0, whole.removeprefix(BOM_UTF8) if self._is_first else whole)
            self._is_first = False
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line.removeprefix(b"data:").removeprefix(b" ").decode())
                self._data_bytes += len(line)
            elif not line and self._data:
                yield "\n".join(self._data)
                self._data, self._data_bytes = [], 0
        if len(self._line) + self._data_bytes > MOST_JSON_BYTES:
            raise ReplyError(f"sends more than {MOST_JSON_BYTES:,} bytes in one event")


class _Unpacking:
    """Decompresses a gzip or deflate body in small pieces; requests ask for neither, but some servers compress anyway.

    Raises: ReplyError for any other encoding, and for several encodings applied to one body.
    """

    def __init__(self, headers: httpx.Headers) -> None:
        names = headers.get_list("content-encoding", split_commas=True)
        encodings = [name for name in map(str.lower, map(str.strip, names)) if name not in ("", "identity")]
        if encodings and (len(encodings) > 1 or encodings[0] not in _ENCODINGS):
            shown = one_line(", ".join(encodings)[:60])
            raise ReplyError(f"compresses its reply ({shown}), which it was asked not to")
        self._inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS + 32) if encodings else None  # + 32: gzip or zlib

    def feed(self, packed: bytes) -> Iterator[bytes]:
        if self._inflate is None:
            yield packed
            return
        is_full = True
        while packed or is_full:
            try:
                piece = self._inflate.decompress(packed, _BLOCK_BYTES)
            except zlib.error as error:
                raise ReplyError(f"compresses its reply in a way that cannot be read ({error})") from None
            packed, is_full = self._inflate.unconsumed_tail, len(piece) == _BLOCK_BYTES
            yield piece

    def close(self) -> None:
        """Raises ReplyError if the compressed body is incomplete."""
        if self._inflate is not None and not self._inflate.eof:
            raise ReplyError("compresses its reply and breaks it off")


def build_client(
    url: str, api_key: ApiKey, *, tls: SSLContext, silence_seconds: float, connect_seconds: float
) -> httpx.AsyncClient:
    """A client for one server; it follows no redirect, because a redirect would receive the key.

    Args:
        url: the server's URL. The environment's proxy is not used for a server on this machine.
        api_key: sent with each request.
        tls: the result of `httpx.create_ssl_context`, which takes longer than a request.
        silence_seconds: time-out between two pieces of a reply.
        connect_seconds: time-out for the connection.
    """
    return httpx.AsyncClient(
        headers={"Accept-Encoding": "identity", **api_key.headers()},
        timeout=httpx.Timeout(silence_seconds, connect=connect_seconds),
        verify=tls,
        trust_env=not _is_loopback(httpx.URL(url).host),
        follow_redirects=False,
    )


@asynccontextmanager
async def post(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any], *, most_seconds: float, most_bytes: int
) -> AsyncIterator[BoundedReply]:
    """The reply to a POST request; the whole context, reading included, ends after at most `most_seconds`.

    Raises: httpx.HTTPError if the reply is not complete; ReadTimeout, a subclass, after `most_seconds`.
    """
    try:
        async with asyncio.timeout(most_seconds), client.stream("POST", url, json=body) as response:
            yield BoundedReply(response, most_bytes=most_bytes)
    except TimeoutError:
        raise httpx.ReadTimeout(f"gave no whole reply within {most_seconds:g} s") from None


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of Retry-After, which may be a number or a date (RFC 9110, 10.2.3); None if it is missing or unreadable.

    A date is compared with the server's own clock if the reply has a Date header.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    with suppress(ValueError, TypeError):
        until = parsedate_to_datetime(value)
        now = headers.get("date")
        return max(0.0, (until - (parsedate_to_datetime(now) if now else datetime.now(UTC))).total_seconds())
    return None


def find_wait(
    failures: int,
    *,
    first_seconds: float,
    most_seconds: float,
    requested_seconds: float | None,
    most_requested_seconds: float,
) -> float:
    """Returns the seconds until the next try: twice as many after each failure, or what the server asks for if more.

    Args:
        failures: how many tries failed before the last one.
        first_seconds, most_seconds: the wait after the first failure, and the longest one.
        requested_seconds: the server's Retry-After; None without one.
        most_requested_seconds: the longest wait that the server can ask for.
    """
    wait = min(first_seconds * 2**failures, most_seconds)
    return wait if requested_seconds is None else min(max(wait, requested_seconds), most_requested_seconds)


def read_json(data: bytes | str) -> Any:
    """Parses JSON. Raises: ValueError if it is malformed or not UTF-8; RecursionError if it is nested too deeply."""
    return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)


def read_text(value: Any) -> str:
    """The text of a message's content; "" for null. Raises: TypeError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("the content is no text")
    return value


def mend_halves(text: str) -> str:
    """The text with each surrogate pair joined to one character, and U+FFFD for a lone surrogate, which UTF-8 lacks."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_count(value: Any) -> int:
    """A number of tokens; 0 for null. Raises: ValueError for a value that is no such number."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_TOKENS:
        raise ValueError("no number of tokens")
    return int(value)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
