"""Sessions of pages: which there are, whose, and whether anybody reads what is told to them. No torch.

Gradio makes a session of any name that is sent to it, and keeps what it tells each one until somebody reads it. Here
an address has a bounded number of them, and one that nobody reads is bounded, too.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

PER_ADDRESS = 64  # a class room behind one address, twice
MOST_SESSIONS = 1000  # of all addresses
STREAMS = 4  # of one session: a page has two, and opens new ones before it has closed the old ones
MOST_UNREAD = 16  # requests of a session that reads nothing
# A session that has asked, and whose stream took nothing for so long, is not read by anybody.
UNREAD_SECONDS = 20.0


@dataclass
class Session:
    """What is known of one.

    Attributes:
        address: who began it.
        streams: how many of its streams are open.
        unread: requests since its stream last took something.
        joined: it has asked for something, ever.
        taken: when its stream last took something; before that, when it last asked.
    """

    address: str
    streams: int = 0
    unread: int = 0
    joined: bool = False
    taken: float = field(default_factory=time.monotonic)

    def ask(self) -> bool:
        """Notes a request; False where too many were not read."""
        if self.unread >= MOST_UNREAD:
            return False
        if not self.unread or not self.is_read:
            self.taken = time.monotonic()  # a stream is about to be opened; further requests win it no time
        self.unread, self.joined = self.unread + 1, True
        return True

    def take(self) -> None:
        """Notes that its stream took something."""
        self.unread, self.taken = 0, time.monotonic()

    @property
    def is_read(self) -> bool:
        return time.monotonic() - self.taken < UNREAD_SECONDS

    @property
    def is_live(self) -> bool:
        """Whether it has a page: a stream that is open, or one that is about to be."""
        return self.streams > 0 or (self.unread > 0 and self.is_read)


async def _forget_nothing(name: str) -> None:
    """Where nothing is kept elsewhere."""


class Sessions:
    """All of them. Everything is called from the server's one thread.

    Attributes:
        forget: gets the name of each that is dropped, to drop what is kept of it elsewhere.
    """

    def __init__(self) -> None:
        self.forget: Callable[[str], Awaitable[None]] = _forget_nothing
        self._all: dict[str, Session] = {}  # the one that was used last comes last

    async def admit(self, name: str, address: str) -> Session | None:
        """The session, a new one where there is none of that name; None where the address or all have too many.

        A new one takes the place of the oldest that has no page any more, of the address's own first.
        """
        session = self._all.pop(name, None)
        if session is None:
            own = [other for other, kept in self._all.items() if kept.address == address]
            if len(own) >= PER_ADDRESS:
                dropped = self._find_dead(own)
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
        """The one of that name; None where there is none."""
        return self._all.get(name)

    def is_read(self, name: str) -> bool:
        """Whether somebody reads what is told to it."""
        session = self._all.get(name)
        return session is not None and session.is_read
