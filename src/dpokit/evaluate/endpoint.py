"""A chat-completions endpoint, asked with care: bounded requests and waits, and a key that nobody sees. No torch."""

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
# What a server says to this one request (too long, against its rules), not to all of them.
REFUSALS = (400, 413, 422)


@dataclass(frozen=True)
class Reply:
    """What an endpoint said.

    Attributes:
        text: of its message; where it refused this request, its reason.
        tokens: of request and reply, as the endpoint counts them; 0 where it does not say.
        refused: this one request was not answered.
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
    """`{url}/chat/completions`, which any number of threads may ask inside of its context.

    Args:
        url: as OpenAI's clients take it, mostly with /v1 at its end.
        api_key: sent with each request.
        timeout_seconds: longest time for a reply to be there as a whole.
        max_requests: most requests that are ever sent, further tries included; None is no limit.
        first_wait_seconds: before the second try; it doubles from one to the next.

    Attributes:
        sent: how many requests were sent.

    Raises:
        SettingsError: a URL of another form, or one that carries a secret.
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
        # One event loop beside the threads: only there can a request be given up in the middle of anything.
        self._portal = self._resources.enter_context(start_blocking_portal())
        self._resources.callback(self._portal.call, self._client.aclose)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._resources.__exit__(kind, error, at)

    def stop(self) -> None:
        """No further request is sent, and no try is waited for any more."""
        self._stopped.set()

    def ask(self, body: Mapping[str, Any]) -> Reply | None:
        """The reply; None where no request is left to be sent.

        Too many requests (429), errors of the server (5xx), a lost connection and silence are tried again, after the
        wait that the server asks for, at most `MOST_WAIT_SECONDS`.

        Raises:
            JudgeError: it cannot be reached, rejects the key, knows no such model, or goes on failing.
        """
        seen = ""
        for past in range(TRIES):
            if not self._may_send():
                return None
            asked_seconds = None
            try:
                response = self._portal.call(self._post, body)
            except httpx.ConnectError as error:
                raise self._error(f"cannot be reached ({error})", "check the URL, and that the server runs") from None
            except httpx.TimeoutException:
                seen = f"gave no reply within {self._timeout:g} s"
            except ReplyError as error:
                raise self._error(f"does not reply as chat/completions do: it {error}", "check the URL") from None
            except httpx.RequestError as error:
                words = self._key.hide(one_line(f"{type(error).__name__}: {error}"))[:200]  # it may repeat what came
                seen = f"broke off its reply ({words})"
            else:
                if response.status != 429 and response.status < 500:
                    return self._read(response, str(body.get("model")))
                seen = f"answers {self._words(response)}"
                asked_seconds = read_retry_after(response.headers)
            if past < TRIES - 1:
                self._stopped.wait(self._find_wait(past, asked_seconds))
        raise self._error(
            f"{seen}, {TRIES} times in a row",
            "try again later, when it is less busy or works again: replies so far are kept, and not asked for anew",
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

    def _find_wait(self, past: int, asked_seconds: float | None) -> float:
        # Threads that were turned away together do not come back together.
        wait = self._first_wait * 2**past * random.uniform(0.5, 1.0)
        return min(wait if asked_seconds is None else asked_seconds, MOST_WAIT_SECONDS)

    def _read(self, response: _Response, model: str) -> Reply:
        status, words = response.status, self._words(response)
        if status in REFUSALS:
            return Reply(words, refused=True)
        if status in (401, 403):
            key = f"the key in {self._key.variable}" if self._key else f"a request without a key ({self._key.variable})"
            raise self._error(f"does not accept {key}: {words}", f"export {self._key.variable} with a valid key")
        if status == 404:
            raise self._error(f"has no chat/completions for {model}: {words}", "check the URL and the model's name")
        if not 200 <= status < 300:
            raise self._error(f"answers {words}", "check the URL, and the account behind the key")
        try:
            record = read_json(response.body)
            text = mend_halves(read_text(record["choices"][0]["message"].get("content")))
            tokens = read_count((record.get("usage") or {}).get("total_tokens"))
            return Reply(self._key.hide(text), tokens)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._error(f"does not reply as chat/completions do: {words}", "check the URL") from None

    def _words(self, response: _Response) -> str:
        excerpt = response.excerpt or one_line(response.body[:EXCERPT_BYTES].decode(errors="replace"))
        return f"{response.status} {self._key.hide(excerpt)[:300]}"

    def _error(self, seen: str, do: str) -> JudgeError:
        return JudgeError(
            f"the judge at {self.url} {self._key.hide(seen)}",
            expected="an OpenAI-compatible endpoint, as https://api.openai.com/v1",
            do=do,
        )
