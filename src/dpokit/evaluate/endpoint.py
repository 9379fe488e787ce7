"""Client of a chat-completions endpoint: bounded tries, waits and replies, and a key that is never shown. No torch."""

import random
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event, Lock
from types import TracebackType
from typing import Any

import httpx
from anyio.from_thread import start_blocking_portal

from dpokit.apikey import ApiKey, check_url
from dpokit.bounded_http import (
    EXCERPT_BYTES,
    ReplyError,
    build_client,
    find_wait,
    mend_halves,
    post,
    read_count,
    read_json,
    read_retry_after,
    read_text,
)
from dpokit.errors import JudgeError
from dpokit.terminal import one_line

TRIES = 5
MOST_WAIT_SECONDS = 60.0
MOST_REPLY_BYTES = 2**20
# Statuses that concern one request alone (too long, against the server's rules): the next one may succeed.
REFUSALS = (400, 413, 422)


@dataclass(frozen=True)
class Reply:
    """An endpoint's reply to one request.

    Attributes:
        text: the message; if the endpoint refused the request, its reason.
        tokens: of request and reply, as the endpoint counts them; 0 if it reports none.
        refused: the endpoint refused this request.
    """

    text: str
    tokens: int = 0
    refused: bool = False


@dataclass(frozen=True)
class _Response:
    status: int
    headers: httpx.Headers
    body: bytes = b""
    excerpt: str = ""


class Endpoint:
    """Client of `{url}/chat/completions`; inside its context any number of threads may call `ask`.

    Args:
        url: as OpenAI's clients take it, usually ending in /v1.
        api_key: sent with each request.
        timeout_seconds: longest time until a reply is complete.
        max_requests: most requests sent in all, repeated tries included; None for no limit.
        first_wait_seconds: wait before the second try; each further wait is twice as long.

    Attributes:
        sent: how many requests were sent.

    Raises:
        SettingsError: a malformed URL, or one that contains a secret.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: ApiKey,
        timeout_seconds: float,
        max_requests: int | None = None,
        first_wait_seconds: float = 1.0,
    ) -> None:
        self.url = check_url(url)
        self.sent = 0
        self._key, self._most, self._first_wait = api_key, max_requests, first_wait_seconds
        self._timeout = timeout_seconds
        self._stopped, self._lock = Event(), Lock()
        self._resources = ExitStack()
        self._client = build_client(
            self.url,
            api_key,
            tls=httpx.create_ssl_context(),
            silence_seconds=timeout_seconds,
            connect_seconds=timeout_seconds,
        )

    def __enter__(self) -> "Endpoint":
        # The requests run in an event loop of their own thread: only there can a request be cancelled at any point.
        self._portal = self._resources.enter_context(start_blocking_portal())
        self._resources.callback(self._portal.call, self._client.aclose)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._resources.__exit__(kind, error, at)

    def stop(self) -> None:
        """Prevents further requests, and ends the waits between tries."""
        self._stopped.set()

    def ask(self, body: Mapping[str, Any]) -> Reply | None:
        """Returns the reply; None if `stop` was called or `max_requests` is reached.

        Too many requests (429), server errors (5xx), a lost connection and a timeout are tried again, after the wait
        that the server asks for, at most `MOST_WAIT_SECONDS`.

        Raises:
            JudgeError: the endpoint cannot be reached, rejects the key, lacks the model, or fails `TRIES` times.
        """
        failure = ""
        for past in range(TRIES):
            if not self._may_send():
                return None
            requested_seconds = None
            try:
                response = self._portal.call(self._post, body)
            except httpx.ConnectError as error:
                raise self._error(f"cannot be reached ({error})", "check the URL, and that the server runs") from None
            except httpx.TimeoutException:
                failure = f"gave no reply within {self._timeout:g} s"
            except ReplyError as error:
                raise self._error(f"does not reply as chat/completions do: it {error}", "check the URL") from None
            except httpx.RequestError as error:
                reason = self._key.hide(one_line(f"{type(error).__name__}: {error}"))[:200]  # may quote the reply
                failure = f"broke off its reply ({reason})"
            else:
                if response.status != 429 and response.status < 500:
                    return self._read(response, str(body.get("model")))
                failure = f"answers {self._show(response)}"
                requested_seconds = read_retry_after(response.headers)
            if past < TRIES - 1:
                self._stopped.wait(self._find_wait(past, requested_seconds))
        raise self._error(
            f"{failure}, {TRIES} times in a row",
            "try again later; replies so far are kept and not requested again",
        )

    def _may_send(self) -> bool:
        with self._lock:
            if self._stopped.is_set() or (self._most is not None and self.sent >= self._most):
                return False
            self.sent += 1
            return True

    async def _post(self, body: Mapping[str, Any]) -> _Response:
        url = f"{self.url}/chat/completions"
        bounds: Any = {"most_seconds": self._timeout, "most_bytes": MOST_REPLY_BYTES}
        async with post(self._client, url, body, **bounds) as reply:
            if 200 <= reply.status < 300:
                return _Response(reply.status, reply.headers, await reply.read())
            return _Response(reply.status, reply.headers, excerpt=await reply.read_excerpt())

    def _find_wait(self, past: int, requested_seconds: float | None) -> float:
        return find_wait(
            past,
            # Random, so that threads that failed at the same time do not all try again at the same time.
            first_seconds=self._first_wait * random.uniform(0.5, 1.0),
            most_seconds=MOST_WAIT_SECONDS,
            requested_seconds=requested_seconds,
            most_requested_seconds=MOST_WAIT_SECONDS,
        )

    def _read(self, response: _Response, model: str) -> Reply:
        status, shown = response.status, self._show(response)
        if status in REFUSALS:
            return Reply(shown, refused=True)
        if status in (401, 403):
            key = f"the key in {self._key.variable}" if self._key else f"a request without a key ({self._key.variable})"
            raise self._error(f"does not accept {key}: {shown}", f"export {self._key.variable} with a valid key")
        if status == 404:
            raise self._error(f"has no chat/completions for {model}: {shown}", "check the URL and the model's name")
        if not 200 <= status < 300:
            raise self._error(f"answers {shown}", "check the URL, and the account that the key belongs to")
        try:
            record = read_json(response.body)
            text = mend_halves(read_text(record["choices"][0]["message"].get("content")))
            tokens = read_count((record.get("usage") or {}).get("total_tokens"))
            return Reply(self._key.hide(text), tokens)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._error(f"does not reply as chat/completions do: {shown}", "check the URL") from None

    def _show(self, response: _Response) -> str:
        excerpt = response.excerpt or one_line(response.body[:EXCERPT_BYTES].decode(errors="replace"))
        return f"{response.status} {self._key.hide(excerpt)[:300]}"

    def _error(self, failure: str, do: str) -> JudgeError:
        return JudgeError(
            f"the judge at {self.url} {self._key.hide(failure)}",
            expected="an OpenAI-compatible endpoint, such as https://api.openai.com/v1",
            do=do,
        )
