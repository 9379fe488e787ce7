"""Connections to the page's server: how many an address may have, and how long each may keep it waiting. No torch."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dpokit.serve.request_limits import Network, find_party, is_within

MOST = 512  # of everybody
PER_ADDRESS = 256  # 32 browsers behind one address, which open up to six each while the page is loaded
REQUEST_SECONDS = 20.0  # from one request's end to the next one's: headers and body
WRITE_SECONDS = 20.0  # that a reader may leave what was sent to it
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nretry-after: 20\r\nconnection: close\r\n\r\n"
COMPLETE = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)


class Connections:
    """Counts connections.

    Args:
        proxies: whose connections are those of many, and which bound them themselves.
    """

    def __init__(self, proxies: Sequence[Network] = ()) -> None:
        self._proxies, self._held = proxies, Counter[str]()

    def enter(self, address: str) -> bool:
        """Counts one more, and says whether it may stay."""
        party = find_party(address)
        self._held[party] += 1
        is_proxy = is_within(address, self._proxies)
        return self._held.total() <= MOST and (is_proxy or self._held[party] <= PER_ADDRESS)

    def leave(self, address: str) -> None:
        """One less."""
        party = find_party(address)
        self._held[party] -= 1
        if not self._held[party]:
            del self._held[party]


def build_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, with bounds.

    h11, as it bounds the headers; a connection is closed when a request is not there in time, whatever trickles in,
    and when its reader takes nothing.
    """

    class BoundedProtocol(H11Protocol):
        _request_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # what is not taken at once is waited for, and timed
            self._address = self.client[0] if self.client else ""
            if not connections.enter(self._address):
                self.logger.warning("Refused a connection: there are too many.")
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
            """Times a request until it is there; what comes of it meanwhile wins no time."""
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
