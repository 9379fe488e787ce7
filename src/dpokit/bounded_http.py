"""Requests to a chat-completions server that nobody trusts: its reply is bounded in time, bytes and lines. No torch."""

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

# Of a line, of an event, and of JSON that is read as a whole: as objects of Python it takes some 30 times as much.
MOST_JSON_BYTES = 2**20
MOST_TOKENS = 2**53  # that a server may count
EXCERPT_BYTES, EXCERPT_SECONDS = 2**12, 5.0  # of a refusal, which is shown and not read
_BLOCK_BYTES = 2**16
_LINE_END = re.compile(rb"\r\n|\r|\n")
_ENCODINGS = ("gzip", "x-gzip", "deflate")


class ReplyError(Exception):
    """A reply beyond its bounds, or one that cannot be read; the argument says so behind the server's name."""


class BoundedReply:
    """A reply that is read as far as its bounds allow.

    Attributes:
        status: its code.
        headers: all of them.

    Args:
        response: whose body nobody has read yet.
        most_bytes: of the body, as it comes and as it is unpacked.
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
        """The beginning of the body in one printable line, as far as it is there within a moment."""
        body = bytearray()
        with suppress(httpx.HTTPError, ReplyError, TimeoutError):
            async with asyncio.timeout(EXCERPT_SECONDS):
                async for piece in self._pieces():
                    body += piece
                    if len(body) > EXCERPT_BYTES:
                        break
        return one_line(body.decode(errors="replace"))

    async def read_events(self) -> AsyncIterator[str]:
        """The data of each server-sent event (WHATWG HTML, 9.2.6), and of a last one that no blank line ends.

        Raises: ReplyError, UnicodeDecodeError, and as `post`.
        """
        events = _Events()
        async for piece in self._pieces():
            for data in events.feed(piece):
                yield data
        for data in events.feed(b"\n\n"):
            yield data

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The body, unpacked, in pieces of some 64 KiB at most."""
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
    """Cuts a stream into events."""

    def __init__(self) -> None:
        self._line = bytearray()  # as far as it is there
        self._data: list[str] = []  # of the event
        self._data_bytes = 0
        self._is_first, self._is_half_end = True, False

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that this piece ends."""
        if not piece:
            return
        # A line ends in \n, \r\n or \r. After \r it is over at once, and a \n that comes later was its other half.
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
    """Takes a body out of gzip or deflate, in small pieces: no server is asked for either, but some pack all the same.

    Raises: ReplyError for every other encoding, and for several on top of each other.
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
        """Raises: ReplyError where the body ended in the middle."""
        if self._inflate is not None and not self._inflate.eof:
            raise ReplyError("compresses its reply and breaks it off")


def build_client(
    url: str, api_key: ApiKey, *, tls: SSLContext, silence_seconds: float, connect_seconds: float
) -> httpx.AsyncClient:
    """A client for one server; it follows no redirect, because the key would go along.

    Args:
        url: of the server. A proxy of the environment is not used for one on this machine.
        api_key: sent with each request.
        tls: of `httpx.create_ssl_context`, which takes longer than a request.
        silence_seconds: most between two pieces of a reply.
        connect_seconds: most until there is a connection.
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
    """The reply to a request; the context, reading and all, ends in `most_seconds`.

    Raises: httpx.HTTPError where there is no whole reply, as ReadTimeout where the time is over.
    """
    try:
        async with asyncio.timeout(most_seconds), client.stream("POST", url, json=body) as response:
            yield BoundedReply(response, most_bytes=most_bytes)
    except TimeoutError:
        raise httpx.ReadTimeout(f"gave no whole reply within {most_seconds:g} s") from None


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of Retry-After, which may be a number or a date (RFC 9110, 10.2.3); None without a readable one.

    A date is held against the server's own clock, where it tells it.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    with suppress(ValueError, TypeError):
        until = parsedate_to_datetime(value)
        now = headers.get("date")
        return max(0.0, (until - (parsedate_to_datetime(now) if now else datetime.now(UTC))).total_seconds())
    return None


def read_json(data: bytes | str) -> Any:
    """Parses JSON. Raises: ValueError or RecursionError if it is broken, nested too deeply or not UTF-8."""
    return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data)


def read_text(value: Any) -> str:
    """The text of a message's content, which may be null. Raises: TypeError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("the content is no text")
    return value


def mend_halves(text: str) -> str:
    """The text with a character for each two halves (surrogates), and U+FFFD for a half alone: UTF-8 has no halves."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_count(value: Any) -> int:
    """A number of tokens; 0 for null. Raises: ValueError for any other value."""
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
