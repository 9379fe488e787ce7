"""Checks every request before Gradio gets it: password, route, size and body. No torch.

Gradio has routes for uploads, for files and for fetching other addresses. A page of text needs none of them, so the
guard forwards only the routes that the page uses. Gradio also fetches a file that a request names in place of a text,
so the guard forwards only plain values. An unknown function number or an unnamed session raises inside Gradio, so the
guard forwards only bodies of the form that the page itself sends.
"""

import base64
import binascii
import hmac
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from dpokit.serve.forms import CANCEL, JOIN, NAME, RESET, Forms, is_name
from dpokit.serve.request_limits import RateLimit, find_client
from dpokit.serve.sessions import STREAMS, Session, Sessions

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

FILE = r"[\w.-]+"
MOST_PATH = 250  # characters: below the system's limit for file names
DATA, HEARTBEAT = "/gradio_api/queue/data", "/gradio_api/heartbeat/"
READ = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/({FILE}/)*{FILE}"
    rf"|/gradio_api/(info|app_id|startup-events|queue/status)|{DATA}|{HEARTBEAT}{NAME.pattern}",
    re.ASCII,
)
SESSION = re.compile(f"session_hash=({NAME.pattern})", re.ASCII)  # the complete query of a stream
WRITE = re.compile("|".join((JOIN, CANCEL, RESET)))
MOST_BODY_BYTES = 2**18
MOST_HEADER_BYTES = 2**14
POSTS_PER_QUESTION = 10  # joining, voting, stopping, and the page's own requests
LEAST_POSTS = 600  # per minute: several pages behind one address poll every few seconds whether the models are loaded
LOGINS_PER_MINUTE = 20
MOST_AT_ONCE = 256  # open requests of one client, streams included: half of the server's connections
HEADERS = {
    # Gradio's scripts write styles and evaluate templates; the browser may reach no other origin.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


class Credentials:
    """User and password; the repr shows neither."""

    def __init__(self, user: str, password: str) -> None:
        self._expected = f"{user}:{password}".encode()

    def __repr__(self) -> str:
        return "Credentials(***)"

    def match(self, header: str) -> bool:
        """Whether an Authorization header (Basic) has this user and password."""
        kind, _, encoded = header.partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            credentials = base64.b64decode(encoded.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(credentials, self._expected)


class Guard:
    """An ASGI application that checks requests and forwards them to the page's application.

    Args:
        page: the page's application.
        hosts: the allowed values of the Host header; None for any. A foreign page whose name points to this machine
            (DNS rebinding) sends another.
        credentials: the user and password that are required; None for a page without a password.
        per_minute: the number of questions that one client may ask in a minute.
        forms: the forms of body that are forwarded; None forwards any body of plain values.
        sessions: the sessions of the open pages, which the guard updates.

    After LOGINS_PER_MINUTE wrong passwords within a minute, a client is refused until the first of them is a minute
    old, even with the right password; otherwise nothing would slow down guessing. This also refuses others behind the
    same address, but nobody mistypes that often.
    """

    def __init__(
        self,
        page: Asgi,
        *,
        hosts: set[str] | None,
        credentials: Credentials | None,
        per_minute: int,
        forms: Forms | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        self._page, self._hosts, self._credentials = page, hosts, credentials
        self._forms, self._sessions, self._open_requests = forms, sessions or Sessions(), Counter[str]()
        self._posts, self._logins = (
            RateLimit(max(LEAST_POSTS, per_minute * POSTS_PER_QUESTION)),
            RateLimit(LOGINS_PER_MINUTE),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._page(scope, receive, send)
            return
        if scope["type"] != "http":  # the page uses no websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        address = find_client(str((scope.get("client") or ("",))[0]))
        refusal = self._find_refusal(scope, address)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        self._open_requests[address] += 1
        try:
            await self._forward(scope, receive, send, address)
        finally:
            self._open_requests[address] -= 1
            if not self._open_requests[address]:
                del self._open_requests[address]  # so that the table does not grow with each client

    async def _forward(self, scope: Scope, receive: Receive, send: Send, address: str) -> None:
        """Forwards a request in the form that the page expects, and refuses any other."""
        path, query = str(scope["path"]), scope.get("query_string", b"")
        scope["query_string"] = b""  # only a stream needs a query
        if scope["method"] == "POST":
            await self._forward_body(scope, receive, send, address)
        elif path.startswith(HEARTBEAT):
            session = await self._sessions.admit(path.removeprefix(HEARTBEAT), address)
            await self._forward_stream(scope, receive, send, session)
        elif path == DATA:
            match = SESSION.fullmatch(query.decode("latin-1"))
            session = self._sessions.find(match[1]) if match else None
            if session is None or not session.joined:
                await _refuse(send, 404, "There is no such session.", {})
                return
            scope["query_string"] = query
            await self._forward_stream(scope, receive, _note_reads(send, session), session)
        else:
            await self._page(scope, receive, _with_headers(send))

    async def _forward_body(self, scope: Scope, receive: Receive, send: Send, address: str) -> None:
        body = await _read_body(receive)
        fields = None if body is None else _read_plain(body)
        if body is None or fields is None or (self._forms is not None and not self._forms.fits(scope["path"], fields)):
            await _refuse(send, 400, "The page sends no such request.", {})
            return
        if scope["path"] == JOIN and is_name(fields.get("session_hash")):
            session = await self._sessions.admit(fields["session_hash"], address)
            if session is None or not session.ask():
                await _refuse(send, 429, "The server is busy; try again in a minute.", {"retry-after": "60"})
                return
        await self._page(scope, _replay(body, receive), _with_headers(send))

    async def _forward_stream(self, scope: Scope, receive: Receive, send: Send, session: Session | None) -> None:
        if session is None or session.streams >= STREAMS:
            await _refuse(send, 429, "The server is busy; try again in a minute.", {"retry-after": "60"})
            return
        session.streams += 1
        try:
            await self._page(scope, receive, _with_headers(send))
        finally:
            session.streams -= 1

    def _find_refusal(self, scope: Scope, address: str) -> tuple[int, str, dict[str, str]] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            return 431, "The headers are too large.", {}
        if self._hosts is not None and _strip_port(host) not in self._hosts:
            return 421, "This page is not served under this host name.", {}
        if self._credentials is not None and self._logins.is_spent(address):
            return 429, "Too many attempts; please wait a minute.", {"retry-after": "60"}
        if self._credentials is not None and not self._credentials.match(headers.get("authorization", "")):
            if "authorization" in headers:
                self._logins.allows(address)
            return 401, "A user and a password are needed.", {"www-authenticate": 'Basic realm="dpokit"'}
        path, method = str(scope["path"]), str(scope["method"])
        routes = {"GET": READ, "HEAD": READ, "POST": WRITE}.get(method)
        if routes is None or not routes.fullmatch(path) or ".." in path or len(path) > MOST_PATH:
            return 404, "Not found.", {}
        if self._open_requests[address] >= MOST_AT_ONCE:
            return 429, "The server is busy; try again in a minute.", {"retry-after": "60"}
        if method == "POST":
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                return 403, "The request comes from another page.", {}
            if not headers.get("content-length", "").isdecimal() or int(headers["content-length"]) > MOST_BODY_BYTES:
                return 413, "The body is too large, or its length is missing.", {}
            if not self._posts.allows(address):
                return 429, "The server is busy; try again in a minute.", {"retry-after": "60"}
        return None


def _strip_port(host: str) -> str:
    return re.sub(r":\d+$", "", host).lower()


async def _read_body(receive: Receive) -> bytes | None:
    """The complete body; None if it breaks off or is too large.

    The server already enforces the content-length; the limit here covers whatever it lets through.
    """
    body = b""
    while len(body) <= MOST_BODY_BYTES:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body") or b""
        if not message.get("more_body"):
            return body if len(body) <= MOST_BODY_BYTES else None
    return None


def _read_plain(body: bytes) -> dict[str, Any] | None:
    """The body as a JSON object; None if it is not one, or `data` has values other than str, number, bool, null."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    data = fields.get("data", []) if isinstance(fields, dict) else None
    is_plain = isinstance(data, list) and all(
        value is None or isinstance(value, bool | int | float | str) for value in data
    )
    return fields if is_plain else None


def _note_reads(send: Send, session: Session) -> Send:
    """A `send` that notes each message that the client has read: the server waits until its data is sent."""

    async def send_and_note(message: MutableMapping[str, Any]) -> None:
        await send(message)
        session.take()

    return send_and_note


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body read before, then the messages after it."""
    remaining = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> MutableMapping[str, Any]:
        return remaining.pop() if remaining else await receive()

    return read


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return send_with_headers


async def _refuse(send: Send, status: int, text: str, headers: dict[str, str]) -> None:
    body = text.encode()
    all_headers = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body)), **HEADERS, **headers}
    encoded_headers = [(name.encode(), value.encode()) for name, value in all_headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded_headers})
    await send({"type": "http.response.body", "body": body})
