"""One connection of the local Hub: reads requests, answers them, and injects faults."""

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

PAGE = b"<html>this is a proxy's page, not the Hub's JSON</html>"


@dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD /path" matches.

    Attributes:
        match: regular expression.
        status: the reply's status; None drops the connection instead, after `cut_bytes` of the request's body.
        lost: handle the request before the connection is dropped, so only its answer is lost.
        hold: the answer waits until this event is set.
        seen: set when the request arrives.
    """

    match: str
    times: int = 1
    status: int | None = None
    headers: dict = field(default_factory=dict)
    cut_bytes: int = 1
    lost: bool = False
    hold: threading.Event | None = None
    seen: threading.Event = field(default_factory=threading.Event)


class Connection(BaseHTTPRequestHandler):
    """Handles the requests of one connection."""

    protocol_version = "HTTP/1.1"
    routes: tuple[tuple[str, str, Callable], ...] = ()  # method, pattern of the path, handler

    def log_message(self, *_) -> None:
        pass

    def reply(self, status: int = 200, body=b"", headers: dict | None = None, kind: str = "application/json") -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        usual = {"Content-Type": kind, "X-Request-Id": uuid.uuid4().hex, "Content-Length": len(body)}
        self.send_response(status)
        for name, value in (usual | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        self.body()
        named = {"X-Error-Code": code} if code else {}
        self.reply(status, {"error": message}, {"X-Error-Message": message} | named)

    def pieces(self) -> Iterator[bytes]:
        """The request's body, plain or chunked (as the client streams files); empty when it is read again."""
        if self.consumed:
            return
        self.consumed, left = True, int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        while left > 0:
            if not (data := self.rfile.read(min(left, 1 << 16))):
                raise ConnectionError("the client went away")
            left -= len(data)
            yield data

    def body(self) -> bytes:
        return b"".join(self.pieces())

    def any_method(self) -> None:
        path, self.consumed = unquote(urlsplit(self.path).path), False
        line = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(line)
            faults = self.server.faults
            fault = next((f for f in faults if f.times > 0 and re.search(f.match, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is None:
            self.answer(path, line)
        else:
            self.fail(fault, path, line)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = any_method  # noqa: N815 - the base class's names

    def fail(self, fault: Fault, path: str, line: str) -> None:
        fault.seen.set()
        if fault.hold is not None:
            fault.hold.wait(60)
        if fault.status is not None:
            self.body()
            return self.reply(fault.status, PAGE, fault.headers, "text/html")
        if fault.lost:
            self.wfile, out = open("/dev/null", "wb"), self.wfile  # noqa: SIM115 - closed below
            self.answer(path, line)
            self.wfile.close()
            self.wfile = out
        else:
            received = 0
            for data in self.pieces():
                if (received := received + len(data)) >= fault.cut_bytes:
                    break
        self.close_connection = True
        return self.connection.close()

    def answer(self, path: str, line: str) -> None:
        for method, pattern, route in self.routes:
            match = re.fullmatch(pattern, path)
            if match and method == {"HEAD": "GET"}.get(self.command, self.command):
                return route(self, **{name: value for name, value in match.groupdict().items() if value is not None})
        return self.refuse(404, f"no such route: {line}")
