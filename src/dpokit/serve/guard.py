"""What stands before the page: who may come in, which routes there are, and how much may be sent. No torch.

Gradio has routes for uploads, for files and for fetching other addresses. A page of text needs none of them, so only
those that it does need are let through. It fetches whatever stands where a file may stand, too, even for a box of
text: only plain values are let through. A number of a function that is not there, or a session without a name, is an
error inside it: only what the page itself sends is let through.
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
from dpokit.serve.request_limits import Rate, find_party
from dpokit.serve.sessions import STREAMS, Session, Sessions

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

FILE = r"[\w.-]+"
MOST_PATH = 250  # letters: the system has no longer name for a file
DATA, HEARTBEAT = "/gradio_api/queue/data", "/gradio_api/heartbeat/"
READ = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/({FILE}/)*{FILE}"
    rf"|/gradio_api/(info|app_id|startup-events|queue/status)|{DATA}|{HEARTBEAT}{NAME.pattern}",
    re.ASCII,
)
SESSION = re.compile(f"session_hash=({NAME.pattern})", re.ASCII)  # the whole query of a stream
WRITE = re.compile("|".join((JOIN, CANCEL, RESET)))
MOST_BODY_BYTES = 2**18
MOST_HEADER_BYTES = 2**14
POSTS_PER_QUESTION = 10  # joining, voting, stopping, and the page's own
LEAST_POSTS = 600  # in a minute: several pages behind one address ask every few seconds whether the models are loaded
LOGINS_PER_MINUTE = 20
MOST_AT_ONCE = 256  # requests of one address, streams among them: half of what the server takes
HEADERS = {
    # Gradio's scripts write styles and evaluate templates; nothing may come from, or go to, anywhere else.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; object-src 'none'; base-uri 'self'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
}


class Credentials:
    """User and password; neither is ever shown."""

    def __init__(self, user: str, password: str) -> None:
        self._expected = f"{user}:{password}".encode()

    def __repr__(self) -> str:
        return "Credentials(***)"

    def fit(self, header: str) -> bool:
        """Whether an Authorization header (Basic) carries them."""
        kind, _, packed = header.partition(" ")
        if kind.lower() != "basic":
            return False
        try:
            given = base64.b64decode(packed.strip(), validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(given, self._expected)


class Guard:
    """An ASGI application around the page's.

    Args:
        page: the application.
        hosts: names by which it may be asked for; None for any. A page elsewhere that has its own name point to this
            machine (DNS rebinding) comes with another.
        credentials: who may come in; None for everyone who reaches it.
        per_minute: questions from one address.
        forms: the bodies that are let through; None for any of plain values.
        sessions: those of the pages, which are kept up to date here.

    An address that gave LOGINS_PER_MINUTE wrong passwords within a minute waits until the first of them is a minute
    old, with the right one, too: else nothing slows down who tries them. Others behind the same address wait with it;
    nobody mistypes that often.
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
        self._forms, self._sessions, self._at_once = forms, sessions or Sessions(), Counter[str]()
        self._posts, self._logins = Rate(max(LEAST_POSTS, per_minute * POSTS_PER_QUESTION)), Rate(LOGINS_PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._page(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no use for websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        address = find_party(str((scope.get("client") or ("",))[0]))
        refusal = self._find_refusal(scope, address)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        self._at_once[address] += 1
        try:
            await self._let_in(scope, receive, send, address)
        finally:
            self._at_once[address] -= 1
            if not self._at_once[address]:
                del self._at_once[address]  # addresses are many
            if not self._at_once[address]:
                del self._at_once[address]

    async def _let_in(self, scope: Scope, receive: Receive, send: Send, address: str) -> None:
        """Hands the page what it expects, and refuses everything else."""
        path, query = str(scope["path"]), scope.get("query_string", b"")
        scope["query_string"] = b""  # only a stream has use for one
        if scope["method"] == "POST":
            await self._hand_body(scope, receive, send, address)
        elif path.startswith(HEARTBEAT):
            session = await self._sessions.admit(path.removeprefix(HEARTBEAT), address)
            await self._stream(scope, receive, send, session)
        elif path == DATA:
            asked = SESSION.fullmatch(query.decode("latin-1"))
            session = self._sessions.find(asked[1]) if asked else None
            if session is None or not session.joined:
                await _refuse(send, 404, "There is no such session.", {})
                return
            scope["query_string"] = query
            await self._stream(scope, receive, _noting(send, session), session)
        else:
            await self._page(scope, receive, _with_headers(send))

    async def _hand_body(self, scope: Scope, receive: Receive, send: Send, address: str) -> None:
        body = await _read_body(receive)
        sent = None if body is None else _read_plain(body)
        if body is None or sent is None or (self._forms is not None and not self._forms.fits(scope["path"], sent)):
            await _refuse(send, 400, "That is not what the page sends.", {})
            return
        if scope["path"] == JOIN and is_name(sent.get("session_hash")):
            session = await self._sessions.admit(sent["session_hash"], address)
            if session is None or not session.ask():
                await _refuse(send, 429, "All is busy; please wait a minute.", {"retry-after": "60"})
                return
        await self._page(scope, _replay(body, receive), _with_headers(send))

    async def _stream(self, scope: Scope, receive: Receive, send: Send, session: Session | None) -> None:
        if session is None or session.streams >= STREAMS:
            await _refuse(send, 429, "All is busy; please wait a minute.", {"retry-after": "60"})
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
            return 431, "That is too much.", {}
        if self._hosts is not None and _strip_port(host) not in self._hosts:
            return 421, "This page is not served under that name.", {}
        if self._credentials is not None and self._logins.is_spent(address):
            return 429, "Too many attempts; please wait a minute.", {"retry-after": "60"}
        if self._credentials is not None and not self._credentials.fit(headers.get("authorization", "")):
            if "authorization" in headers:
                self._logins.allows(address)
            return 401, "A user and a password are needed.", {"www-authenticate": 'Basic realm="dpokit"'}
        path, method = str(scope["path"]), str(scope["method"])
        routes = {"GET": READ, "HEAD": READ, "POST": WRITE}.get(method)
        if routes is None or not routes.fullmatch(path) or ".." in path or len(path) > MOST_PATH:
            return 404, "There is nothing here.", {}
        if self._at_once[address] >= MOST_AT_ONCE:
            return 429, "All is busy; please wait a minute.", {"retry-after": "60"}
        if method == "POST":
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                return 403, "Another page asked.", {}
            if not headers.get("content-length", "").isdecimal() or int(headers["content-length"]) > MOST_BODY_BYTES:
                return 413, "That is too much.", {}
            if not self._posts.allows(address):
                return 429, "All is busy; please wait a minute.", {"retry-after": "60"}
        return None


def _strip_port(host: str) -> str:
    return re.sub(r":\d+$", "", host).lower()


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None where it breaks off. The server has held the sender to its content-length; the bound is for
    whatever it lets through."""
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
    """The JSON object; None where it is none, or its `data` holds more than texts, numbers, truths and nothings."""
    try:
        sent = json.loads(body)
    except (ValueError, RecursionError):
        return None
    data = sent.get("data", []) if isinstance(sent, dict) else None
    is_plain = isinstance(data, list) and all(
        value is None or isinstance(value, bool | int | float | str) for value in data
    )
    return sent if is_plain else None


def _noting(send: Send, session: Session) -> Send:
    """Notes what the reader took: the server waits until it has handed on what it was given."""

    async def tell(message: MutableMapping[str, Any]) -> None:
        await send(message)
        session.take()

    return tell


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body that was read, then what comes after it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> MutableMapping[str, Any]:
        return left.pop() if left else await receive()

    return read


def _with_headers(send: Send) -> Send:
    async def tell(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return tell


async def _refuse(send: Send, status: int, text: str, headers: dict[str, str]) -> None:
    body = text.encode()
    shown = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body)), **HEADERS, **headers}
    packed = [(name.encode(), value.encode()) for name, value in shown.items()]
    await send({"type": "http.response.start", "status": status, "headers": packed})
    await send({"type": "http.response.body", "body": body})
