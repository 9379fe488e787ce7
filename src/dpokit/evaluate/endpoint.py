"""A chat-completions endpoint, asked with care: bounded requests and waits, and a key that nobody sees. No torch."""

import json
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from types import TracebackType
from typing import Any

import httpx

from dpokit.apikey import ApiKey, check_url
from dpokit.errors import JudgeError

TRIES = 5
MOST_WAIT_SECONDS = 60.0
MOST_REPLY_BYTES = 2**22
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
    text: str


class Endpoint:
    """`{url}/chat/completions`, which any number of threads may ask.

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
        self._client = httpx.Client(timeout=timeout_seconds, headers=api_key.headers())

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

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
                response = self._post(body)
            except httpx.ConnectError as error:
                raise self._error(f"cannot be reached ({error})", "check the URL, and that the server runs") from None
            except httpx.TimeoutException:
                seen = f"gave no reply within {self._timeout:g} s"
            except httpx.RequestError as error:
                seen = f"broke off its reply ({type(error).__name__}: {error})"
            else:
                if response.status != 429 and response.status < 500:
                    return self._read(response, str(body.get("model")))
                seen = f"answers {self._words(response)}"
                asked_seconds = _read_wait(response)
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

    def _post(self, body: Mapping[str, Any]) -> _Response:
        # The client's own time-out is for each piece of a reply, so a server that drips would never meet it.
        end = time.monotonic() + self._timeout
        data = b""
        with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
            for piece in response.iter_bytes():
                data += piece
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the reply is not whole")
                if len(data) > MOST_REPLY_BYTES:
                    raise httpx.ReadError(f"more than {MOST_REPLY_BYTES:,} bytes")
        return _Response(response.status_code, response.headers, data.decode(errors="replace"))

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
            record = json.loads(response.text)
            text = record["choices"][0]["message"].get("content") or ""
            tokens = (record.get("usage") or {}).get("total_tokens") or 0
            return Reply(self._key.hide(str(text)), int(tokens))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._error(f"does not reply as chat/completions do: {words}", "check the URL") from None

    def _words(self, response: _Response) -> str:
        return f"{response.status} {self._key.hide(' '.join(response.text.split()))[:300]}"

    def _error(self, seen: str, do: str) -> JudgeError:
        return JudgeError(
            f"the judge at {self.url} {self._key.hide(seen)}",
            expected="an OpenAI-compatible endpoint, as https://api.openai.com/v1",
            do=do,
        )


def _read_wait(response: _Response) -> float | None:
    """Seconds of Retry-After, which may be a number or a date (RFC 9110, 10.2.3); None where there is none."""
    value = response.headers.get("retry-after", "")
    with suppress(ValueError):
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else None
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None
