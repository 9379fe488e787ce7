"""A local server that replies with any bytes, also endlessly."""

import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, repeat

BLOCK = 2**16
DRIP_SECONDS = 0.02  # time between two pieces of a slow reply

Reply = Iterable[bytes | None]  # the pieces; None among them waits for DRIP_SECONDS


@dataclass
class Heard:
    """The traffic of a server.

    Attributes:
        url: the endpoint's URL.
        requests: all received requests, head and body.
        sent: number of bytes in all replies.
    """

    url: str
    requests: list[bytes] = field(default_factory=list)
    sent: int = 0


@contextmanager
def serve(reply: Callable[[], Reply]) -> Iterator[Heard]:
    """A server that answers each request with a new `reply()` and then closes the connection."""
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
        raise ConnectionError("the client closed the connection")
    return piece


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def slowly(pieces: Reply) -> Reply:
    """The pieces with a pause of DRIP_SECONDS after each."""
    return chain.from_iterable((piece, None) for piece in pieces)


def forever(piece: bytes) -> Reply:
    """The piece, repeated endlessly in blocks of 64 KiB."""
    return repeat(piece * max(1, BLOCK // len(piece)))


def pack_zeros(megabytes: int, head: bytes) -> bytes:
    """A head and compressed zeros, as a deflate stream without its end; quick to generate."""
    made = zlib.compressobj(9, wbits=-15)
    return head + (made.compress(bytes(2**20)) + made.flush(zlib.Z_FULL_FLUSH)) * megabytes
