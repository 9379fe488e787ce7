"""A server on this machine that writes any bytes as its reply, with or without an end."""

import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, repeat

BLOCK = 2**16
DRIP_SECONDS = 0.02  # between two pieces of a reply that comes slowly

Reply = Iterable[bytes | None]  # the pieces; None among them waits for DRIP_SECONDS


@dataclass
class Heard:
    """What came to a server, and what went out.

    Attributes:
        url: of the endpoint.
        requests: as they came, head and body.
        sent: bytes of all replies.
    """

    url: str
    requests: list[bytes] = field(default_factory=list)
    sent: int = 0


@contextmanager
def serve(reply: Callable[[], Reply]) -> Iterator[Heard]:
    """A server that gives a new `reply()` to each request, and then closes the connection."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.02)
        heard = Heard(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")
        threads: list[threading.Thread] = []

        def accept() -> None:
            while not over.is_set():
                with suppress(TimeoutError):
                    connection, _ = listening.accept()
                    threads.append(threading.Thread(target=answer, args=(connection,)))
                    threads[-1].start()

        def answer(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.settimeout(60)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                heard.requests.append(read_request(connection))
                for piece in reply():
                    if piece is None:
                        over.wait(DRIP_SECONDS)
                    if over.is_set():
                        return
                    connection.sendall(piece or b"")
                    heard.sent += len(piece or b"")

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield heard
        finally:
            over.set()
            thread.join()
            for thread in threads:
                thread.join()


def read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += read_piece(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    fields = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    length = next(int(value) for name, _, value in fields if name == b"content-length")
    while len(body) < length:
        body += read_piece(connection)
    return head + b"\r\n\r\n" + body


def read_piece(connection: socket.socket) -> bytes:
    piece = connection.recv(BLOCK)
    if not piece:
        raise ConnectionError("the client is gone")
    return piece


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def slowly(pieces: Reply) -> Reply:
    """Each piece by itself, a moment after the one before."""
    return chain.from_iterable((piece, None) for piece in pieces)


def forever(piece: bytes) -> Reply:
    """The piece in blocks of 64 KiB without end."""
    return repeat(piece * max(1, BLOCK // len(piece)))


def pack_zeros(megabytes: int, head: bytes) -> bytes:
    """Deflate's blocks of zeros behind a head, without the end that a whole one has; made in a moment."""
    made = zlib.compressobj(9, wbits=-15)
    return head + (made.compress(bytes(2**20)) + made.flush(zlib.Z_FULL_FLUSH)) * megabytes
