"""Limits of connections to the page's server: their number for each client, and their waiting times. No torch."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dpokit.serve.request_limits import Network, find_client, is_within

MOST = 512  # connections of all clients
PER_ADDRESS = 256  # 32 browsers behind one address, with up to six connections each while the page loads
REQUEST_SECONDS = 20.0  # from the end of one request to the end of the next, headers and body
WRITE_SECONDS = 20.0  # how long a client may leave sent data unread
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 20\r\nconnection: close\r\n\r\n"
COMPLETE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)


class Connections:
    """Counts the open connections of each client.

    Args:
        proxies: the proxies that carry the connections of many clients, and limit them themselves.
    """

    def __init__(self, proxies: Sequence[Network] = ()) -> None:
        self._proxies, self._held = proxies, Counter[str]()

    def enter(self, address: str) -> bool:
        """Counts a new connection; True if it is within the limits."""
        client = find_client(address)
        self._held[client] += 1
        is_proxy = is_within(address, self._proxies)
        return self._held.total() <= MOST and (is_proxy or self._held[client] <= PER_ADDRESS)

    def leave(self, address: str) -> None:
        """Counts a closed connection."""
        client = find_client(address)
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]


def build_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """Uvicorn's h11 protocol with limits on the number of connections and on waiting times.

    h11 itself limits the size of the headers. A connection is closed if a request is not complete in time, even while
    some bytes arrive, and if the client does not read.
    """

    class BoundedProtocol(H11Protocol):
        _request_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # pause_writing is called as soon as data stays unread
            self._address = self.client[0] if self.client else ""
            if not connections.enter(self._address):
                self.logger.warning("Refused a connection: too many are open.")
                transport.write(BUSY)
                transport.close()
                return
            self._time_request()

        def connection_lost(self, exc: Exception | None) -> None:
            connections.leave(self._address)
            for timer in (self._request_timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            self._time_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._time_request()

        def _time_request(self) -> None:
            """Starts the timer of an incomplete request; bytes that arrive meanwhile do not restart it."""
            if self.conn.their_state in COMPLETE:
                if self._request_timer is not None:
                    self._request_timer.cancel()
                    self._request_timer = None
            elif self._request_timer is None:
                self._request_timer = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._write_timer is None:
                self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

    return BoundedProtocol
