"""Repeats failed requests to the Hub: which failures are temporary, and how long to wait after them."""

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

from dpokit.bounded_http import find_wait, read_retry_after
from dpokit.console import say
from dpokit.errors import HubError

T = TypeVar("T")

RETRY_STATUSES = (408, 429)
# By default hf_xet retries for minutes without output; with these limits it fails soon, and `call` tries again.
XET_LIMITS = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3", "HF_XET_CLIENT_RETRY_MAX_DURATION": "30s"}
XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
QUERY = re.compile(r"\?[^\s'\"]+")  # of a signed upload address, which lets anyone write there


@dataclass(frozen=True)
class Failure:
    """The reason why a call failed.

    Attributes:
        reason: the second half of a sentence that begins with "the Hub".
        status: the answer's HTTP status; None without an answer.
        is_temporary: whether another try may succeed.
        retry_after_seconds: the wait that the Hub asks for; None if it asks for none.
    """

    reason: str
    status: int | None = None
    is_temporary: bool = False
    retry_after_seconds: float | None = None


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a failed call is repeated.

    Attributes:
        tries: tries of each call. In some calls huggingface_hub itself tries up to six times.
        first_wait_seconds: wait before the second try; it doubles with each further try.
        most_wait_seconds: longest wait between two tries, unless the Hub asks for more.
        most_retry_after_seconds: longest wait that the Hub can ask for (Retry-After, RateLimit).
        silence_seconds: a connection that carries no byte for so long is closed.
    """

    tries: int = 6
    first_wait_seconds: float = 2.0
    most_wait_seconds: float = 60.0
    most_retry_after_seconds: float = 600.0
    silence_seconds: float = 180.0

    def call(self, name: str, function: Callable[[], T]) -> T:
        """Returns the function's result. Tries again after 5xx, 408 and 429, and after lost and silent connections.

        Args:
            name: the call's name in messages.
            function: safe to repeat: an answer can be lost after the Hub has carried out the request.

        Raises:
            HubError: the Hub kept failing.
            Exception: a permanent error, as huggingface_hub raises it; `find_failure` reads it.
        """
        for failed in range(self.tries):
            try:
                with self._bounded():
                    return function()
            except Exception as error:
                failure = find_failure(error)
                if failure is None or not failure.is_temporary:
                    raise
                problem, cause = f"{name}: the Hub {failure.reason}", error
            if failed == self.tries - 1:
                break
            wait = find_wait(
                failed,
                first_seconds=self.first_wait_seconds,
                most_seconds=self.most_wait_seconds,
                requested_seconds=failure.retry_after_seconds,
                most_requested_seconds=self.most_retry_after_seconds,
            )
            say(f"{problem}; trying again in {wait:.3g} s ({failed + 2} of {self.tries})")
            time.sleep(wait)
        raise HubError(
            f"{problem}, {self.tries} times in a row" if self.tries > 1 else problem,
            expected="a Hub that answers",
            do="try again later (https://status.huggingface.co)",
        ) from cause

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Sets a time limit for silent connections, and removes signed addresses from huggingface_hub's log lines."""
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
    """The failure behind an error of huggingface_hub, its HTTP client or hf_xet; None for other errors.

    Reads the error's causes too: a failed upload raises a RuntimeError without a message.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _read_response(cause.response)
        if isinstance(cause, httpx2.TimeoutException):
            return Failure("gave no answer in time", is_temporary=True)
        if isinstance(cause, (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)):
            return _describe_lost_connection(cause)
        if isinstance(cause, JSONDecodeError):
            # A proxy's page: huggingface_hub parses the body before it checks the status.
            return Failure("gave an answer that is not its own", is_temporary=True)
        if isinstance(cause, (ConnectionError, TimeoutError)):  # hf_xet raises these for every problem
            if status := XET_STATUS.search(str(cause)):
                return _read_status(int(status[1]), "the upload")
            return _describe_lost_connection(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _describe_lost_connection(error: BaseException) -> Failure:
    text = f"{type(error).__name__}: {shorten_error(error)}"
    return Failure(f"could not be reached, or the connection broke ({text})", is_temporary=True)


def _read_response(response: httpx2.Response) -> Failure:
    request = response.request
    limit = parse_ratelimit_headers(response.headers)
    wait = read_retry_after(response.headers)
    if wait is None and limit is not None and limit.remaining == 0:
        wait = float(limit.reset_in_seconds)
    return _read_status(response.status_code, f"{request.method} {request.url.path}", wait)


def _read_status(status: int, request: str, retry_after_seconds: float | None = None) -> Failure:
    is_temporary = status in RETRY_STATUSES or status >= 500
    return Failure(f"answered {status} to {request}", status, is_temporary, retry_after_seconds)


def shorten_error(error: BaseException) -> str:
    """The error's text as one line of at most 300 letters, without the queries of signed addresses."""
    return QUERY.sub("", " ".join(str(error).split()))[:300]


def _without_queries(record: logging.LogRecord) -> bool:
    record.msg, record.args = QUERY.sub("", record.getMessage()), ()
    return True
