"""Models of an OpenAI-compatible server, whose answers are streamed. No torch."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from dpokit.apikey import ApiKey, check_url
from dpokit.bounded_http import (
    ReplyError,
    build_client,
    mend_halves,
    post,
    read_count,
    read_json,
    read_text,
)
from dpokit.data.messages import Messages
from dpokit.rundir import RunDir
from dpokit.serve.models import ModelReply
from dpokit.serve.request_limits import RefusedError, SamplingSettings
from dpokit.terminal import one_line

SILENCE_SECONDS, CONNECT_SECONDS = 120.0, 5.0
ANSWER_SECONDS = 1800.0  # the most time from the question to the end of the answer
MOST_ANSWER_BYTES = 2**24  # of the stream: about 300 bytes a token
LOOK_SECONDS = 0.1  # between two checks whether the answer was stopped
MOST_LETTERS = 2**20
WITH_USAGE = {"stream_options": {"include_usage": True}}


@dataclass
class _ReceivedReply:
    """The part of an answer that was received so far.

    Attributes:
        began: whether an event had a choice, which every chat completion has.
    """

    text: str = ""
    tokens: int = 0
    ended: bool = False
    began: bool = False
    _half: str = ""

    def add(self, event: Mapping[str, Any]) -> bool:
        """Adds an event of the stream; True if it has text."""
        self.tokens = read_count((event.get("usage") or {}).get("completion_tokens")) or self.tokens
        piece = self._half
        for choice in (event.get("choices") or [])[:1]:
            self.began = True
            piece += read_text((choice.get("delta") or {}).get("content"))
            self.ended = self.ended or choice.get("finish_reason") == "stop"
        # Servers with UTF-16 strings may send the two surrogates of a character in two events.
        self._half = piece[-1:] if "\ud800" <= piece[-1:] <= "\udbff" else ""
        piece = mend_halves(piece.removesuffix(self._half))
        self.text += piece
        return bool(piece)

    def reply(self) -> ModelReply:
        return ModelReply(self.text.strip(), self.tokens, self.ended)


class RemoteModels:
    """One or two models of a server, by name.

    Attributes:
        workers: the number of questions that are sent to the server at once.

    Args:
        url: the URL as for OpenAI's clients, usually with /v1 at its end.
        tuned: the name of the tuned model on the server.
        base: the name of the base model; None without one.
        api_key: the key that each request sends.

    Raises: SettingsError: the URL has another form, or contains a secret.
    """

    workers = 16

    def __init__(self, url: str, *, tuned: str, base: str | None, api_key: ApiKey) -> None:
        self.url, self._key = check_url(url), api_key
        self.names: Mapping[str, str] = {"tuned": tuned} if base is None else {"base": base, "tuned": tuned}
        self.run: RunDir | None = None
        self._tls = httpx.create_ssl_context()

    def load(self) -> None:
        """Does nothing: the server loads the models, and may start later."""

    def find_rewards(self, messages: Messages, replies: Mapping[str, ModelReply]) -> dict[str, float] | None:
        """None: a server that streams answers does not score other models' answers."""
        return None

    def answer(
        self,
        side: str,
        messages: Messages,
        sampling: SamplingSettings,
        *,
        on_text: Callable[[ModelReply], None],
        is_stopped: Callable[[], bool],
    ) -> ModelReply:
        """As for `Models`; the number of tokens is the server's, 0 if it reports none or the answer was stopped.

        Raises: RefusedError if the server is unreachable, refuses, or does not follow the protocol.
        """
        body = {
            "model": self.names[side],
            "messages": messages,
            "stream": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": sampling.seed,
        }
        received = _ReceivedReply()

        def must_end() -> bool:
            return is_stopped() or len(received.text) > MOST_LETTERS

        try:
            asyncio.run(_run_until(must_end, self._receive(body, received, on_text=on_text, must_end=must_end)))
        except httpx.HTTPError as error:
            message = one_line(f"{type(error).__name__}: {error}")  # the error may repeat data of the server
            raise self._refusal(f"cannot be reached, or broke off ({self._key.hide(message)[:200]})") from None
        except ReplyError as error:
            raise self._refusal(f"does not stream as chat/completions do: it {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._refusal("does not stream as chat/completions do") from None
        return received.reply()

    async def _receive(
        self,
        body: Mapping[str, Any],
        received: _ReceivedReply,
        *,
        on_text: Callable[[ModelReply], None],
        must_end: Callable[[], bool],
    ) -> None:
        timeouts: Any = {"silence_seconds": SILENCE_SECONDS, "connect_seconds": CONNECT_SECONDS}
        async with build_client(self.url, self._key, tls=self._tls, **timeouts) as client:
            for options in (WITH_USAGE, {}):
                url = f"{self.url}/chat/completions"
                limits: Any = {"most_seconds": ANSWER_SECONDS, "most_bytes": MOST_ANSWER_BYTES}
                async with post(client, url, {**body, **options}, **limits) as reply:
                    if reply.status in (400, 422) and options:
                        continue  # a server that does not support the option replies with these
                    if reply.status != 200:
                        excerpt = self._key.hide(await reply.read_excerpt())[:200]
                        raise self._refusal(f"answers {reply.status}: {excerpt}")
                    async for data in reply.read_events():
                        if data.strip() == "[DONE]":
                            break
                        if received.add(_read_event(data)):
                            on_text(received.reply())
                        if must_end():
                            return
                if not received.began:
                    raise ValueError("the stream has no event of a chat completion")
                return

    def _refusal(self, problem: str) -> RefusedError:
        return RefusedError(f"The server of the models {self._key.hide(problem)}.")


async def _run_until(must_end: Callable[[], bool], work: Coroutine[Any, Any, None]) -> None:
    """Runs the work, and cancels it once `must_end`, also while the server sends nothing."""
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.wait({task}, timeout=LOOK_SECONDS)
        if not task.done() and must_end():
            task.cancel()
            await asyncio.wait({task})
    if not task.cancelled():
        task.result()


def _read_event(data: str) -> Mapping[str, Any]:
    event: Mapping[str, Any] = read_json(data)
    if event.get("error"):
        raise RefusedError("The server of the models broke off with an error; see its log.")
    return event
