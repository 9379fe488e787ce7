"""The sessions of open pages: their clients, and whether the page still reads its messages. No torch.

Gradio creates a session for any name that it receives, and keeps the messages for each session until the page reads
them. Here each client has a limited number of sessions, and each unread session a limited number of requests.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

PER_ADDRESS = 64  # about two school classes behind one address
MOST_SESSIONS = 1000  # sessions of all clients
STREAMS = 4  # open streams of one session: a page has two, and opens new ones before it closes the old ones
MOST_UNREAD = 16  # requests of a session that does not read its messages
# A session whose stream has read nothing for this long after a request counts as closed.
UNREAD_SECONDS = 20.0


@dataclass
class Session:
    """The session of a page.

    Attributes:
        address: the client that started it.
        streams: the number of its open streams.
        unread: the number of requests since its stream last read a message.
        joined: whether it has sent any request.
        taken: when its stream last read a message, or when a request last gave it time to open a stream.
    """

    address: str
    streams: int = 0
    unread: int = 0
    joined: bool = False
    taken: float = field(default_factory=time.monotonic)

    def ask(self) -> bool:
        """Counts a request; False if too many requests are unread."""
        if self.unread >= MOST_UNREAD:
            return False
        if not self.unread or not self.is_read:
            self.taken = time.monotonic()  # the page opens a stream now; further requests do not extend its time
        self.unread, self.joined = self.unread + 1, True
        return True

    def take(self) -> None:
        """Records that its stream has read a message."""
        self.unread, self.taken = 0, time.monotonic()

    @property
    def is_read(self) -> bool:
        return time.monotonic() - self.taken < UNREAD_SECONDS

    @property
    def is_live(self) -> bool:
        """Whether its page is open: it has an open stream, or opens one soon."""
        return self.streams > 0 or (self.unread > 0 and self.is_read)


async def _forget_nothing(name: str) -> None:
    """Does nothing; the default of `Sessions.forget`."""


class Sessions:
    """All sessions of the server. Every method is called from the server's one thread.

    Attributes:
        forget: called with the name of each session that is dropped, to drop its data elsewhere.
    """

    def __init__(self) -> None:
        self.forget: Callable[[str], Awaitable[None]] = _forget_nothing
        self._all: dict[str, Session] = {}  # in the order of last use

    async def admit(self, name: str, address: str) -> Session | None:
        """The session of that name, created if it is new; None if the client or the server has too many.

        At a limit, the new session replaces the least recently used one without an open page: of the same client at
        the client's limit, of any client at the server's.
        """
        session = self._all.pop(name, None)
        if session is None:
            from_address = [other for other, kept in self._all.items() if kept.address == address]
            if len(from_address) >= PER_ADDRESS:
                dropped = self._find_dead(from_address)
            elif len(self._all) >= MOST_SESSIONS:
                dropped = self._find_dead(list(self._all))
            else:
                dropped = ""
            if dropped is None:
                return None
            session = Session(address)
            if dropped:
                del self._all[dropped]
                self._all[name] = session
                await self.forget(dropped)
                return session
        self._all[name] = session
        return session

    def _find_dead(self, names: list[str]) -> str | None:
        return next((name for name in names if not self._all[name].is_live), None)

    def find(self, name: str) -> Session | None:
        """The session of that name; None if there is no such session."""
        return self._all.get(name)

    def is_read(self, name: str) -> bool:
        """Whether the session's page reads its messages."""
        session = self._all.get(name)
        return session is not None and session.is_read
