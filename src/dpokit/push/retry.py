"""Asking the Hub again: which failures pass, how long to wait for them, and one line for each try."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from typing import TypeVar

import httpx2
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from dpokit.bounded_http import read_retry_after
from dpokit.console import say
from dpokit.errors import HubError

T = TypeVar("T")

TOO_EARLY = (408, 429)
# hf_xet goes on for minutes without a word unless told otherwise; what it gives up is tried again here.
XET_LIMITS = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3", "HF_XET_CLIENT_RETRY_MAX_DURATION": "30s"}
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
QUERY = re.compile(r"\?[^\s'\"]+")  # of an address that was signed for an upload: whoever has it may write there


@dataclass(frozen=True)
class Failure:
    """Why a call failed.

    Attributes:
        seen: in words, after "the Hub".
        status: of its answer; None where there was none.
        passes: whether it is worth another try.
        asked_seconds: how long the Hub wants to be left alone, where it says so.
    """

    seen: str
    status: int | None = None
    passes: bool = False
    asked_seconds: float | None = None


@dataclass(frozen=True)
class Patience:
    """Limits of trying again.

    Attributes:
        tries: of each call. huggingface_hub makes up to six tries of its own in some of them.
        first_wait_seconds: before the second try; it doubles from one to the next.
        most_wait_seconds: between two tries, unless the Hub asks for more.
        most_asked_seconds: that are granted where the Hub asks for time (Retry-After, RateLimit).
        silence_seconds: without a byte, after which a connection is given up.
    """

    tries: int = 6
    first_wait_seconds: float = 2.0
    most_wait_seconds: float = 60.0
    most_asked_seconds: float = 600.0
    silence_seconds: float = 180.0

    def ask(self, what: str, call: Callable[[], T]) -> T:
        """The call's answer. Server errors (5xx), 408, 429, lost and silent connections are tried again.

        Args:
            what: the call's name, for the line that says so.
            call: repeatable: an answer may be lost after the Hub has done what it was asked for.

        Raises:
            HubError: the Hub went on failing.
            Exception: what cannot pass, as huggingface_hub raises it; `find_failure` reads it.
        """
        for past in range(self.tries):
            try:
                with self._bounded():
                    return call()
            except Exception as error:
                failure = find_failure(error)
                if failure is None or not failure.passes:
                    raise
                seen, cause = f"{what}: the Hub {failure.seen}", error
            if past == self.tries - 1:
                break
            wait = min(self.first_wait_seconds * 2**past, self.most_wait_seconds)
            if failure.asked_seconds is not None:
                wait = min(max(wait, failure.asked_seconds), self.most_asked_seconds)
            say(f"{seen}; trying again in {wait:.3g} s ({past + 2} of {self.tries})")
            time.sleep(wait)
        raise HubError(
            f"{seen}, {self.tries} times in a row" if self.tries > 1 else seen,
            expected="a Hub that answers",
            do="try again later (https://status.huggingface.co)",
        ) from cause

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """huggingface_hub waits for ever on a connection that is silent; and its own lines show signed addresses."""
        for name, limit in XET_LIMITS.items():
            os.environ.setdefault(name, limit)
        session, logger = get_session(), logging.getLogger("huggingface_hub.utils._http")
        before, session.timeout = session.timeout, httpx2.Timeout(self.silence_seconds)
        logger.addFilter(_without_queries)
        try:
            yield
        finally:
            session.timeout = before
            logger.removeFilter(_without_queries)


def find_failure(error: BaseException) -> Failure | None:
    """What an error of huggingface_hub, its HTTP client or hf_xet says of the Hub; None where it is something else.

    An upload's failure is raised as a RuntimeError without words, so causes are read.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError):
            return _read_response(seen.response)
        if isinstance(seen, httpx2.TimeoutException):
            return Failure("gave no answer in time", passes=True)
        if isinstance(seen, (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)):
            return Failure(f"could not be reached, or broke off ({type(seen).__name__}: {plain(seen)})", passes=True)
        if isinstance(seen, JSONDecodeError):
            # A proxy's page, where huggingface_hub reads before it looks at the status.
            return Failure("gave an answer that is none of its own", passes=True)
        if isinstance(seen, (ConnectionError, TimeoutError)):  # hf_xet's, whatever the matter was
            if status := XET_STATUS.search(str(seen)):
                return _read_status(int(status[1]), "the upload")
            return Failure(f"could not be reached, or broke off ({type(seen).__name__}: {plain(seen)})", passes=True)
        seen = seen.__cause__ or seen.__context__
    return None


def _read_response(response: httpx2.Response) -> Failure:
    request = response.request
    limit = parse_ratelimit_headers(response.headers)
    asked = read_retry_after(response.headers)
    if asked is None and limit is not None and limit.remaining == 0:
        asked = float(limit.reset_in_seconds)
    return _read_status(response.status_code, f"{request.method} {request.url.path}", asked)


def _read_status(status: int, where: str, asked_seconds: float | None = None) -> Failure:
    passes = status in TOO_EARLY or status >= 500
    return Failure(f"answered {status} to {where}", status, passes, asked_seconds)


def plain(error: BaseException) -> str:
    """Its text in one line of at most 300 letters, without what would let others write to a signed address."""
    return QUERY.sub("", " ".join(str(error).split()))[:300]


def _without_queries(record: logging.LogRecord) -> bool:
    record.msg, record.args = QUERY.sub("", record.getMessage()), ()
    return True
