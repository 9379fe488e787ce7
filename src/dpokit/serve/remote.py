"""Models that an OpenAI-compatible server keeps: its answers, streamed. No torch."""

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
from dpokit.data.formats import Messages
from dpokit.rundir import RunDir
from dpokit.serve.models import Reply
from dpokit.serve.request_limits import RefusedError, Sampling
from dpokit.terminal import one_line

SILENCE_SECONDS, CONNECT_SECONDS = 120.0, 5.0
ANSWER_SECONDS = 1800.0  # of an answer from its question to its end, however slowly it comes
MOST_ANSWER_BYTES = 2**24  # of its stream: some 300 a token
LOOK_SECONDS = 0.1  # between two looks at whether an answer was stopped
MOST_LETTERS = 2**20
COUNTED = {"stream_options": {"include_usage": True}}


@dataclass
class _Heard:
    """What has come of an answer so far.

    Attributes:
        began: an event brought a choice, as every chat completion has one.
    """

    text: str = ""
    tokens: int = 0
    ended: bool = False
    began: bool = False
    _half: str = ""

    def add(self, event: Mapping[str, Any]) -> bool:
        """Takes an event of the stream; whether it brought text."""
        self.tokens = read_count((event.get("usage") or {}).get("completion_tokens")) or self.tokens
        piece = self._half
        for choice in (event.get("choices") or [])[:1]:
            self.began = True
            piece += read_text((choice.get("delta") or {}).get("content"))
            self.ended = self.ended or choice.get("finish_reason") == "stop"
        # Servers that count in UTF-16 may send the halves of a character in two events.
        self._half = piece[-1:] if "\ud800" <= piece[-1:] <= "\udbff" else ""
        piece = mend_halves(piece.removesuffix(self._half))
        self.text += piece
        return bool(piece)

    def reply(self) -> Reply:
        return Reply(self.text.strip(), self.tokens, self.ended)


class RemoteModels:
    """One or two models of a server, by name.

    Attributes:
        workers: how many questions may be asked at once: a server bears several.

    Args:
        url: as OpenAI's clients take it, mostly with /v1 at its end.
        tuned: the model there that is talked to.
        base: the one that stands beside it; None for none.
        api_key: sent with each request.

    Raises: SettingsError: a URL of another form, or one that carries a secret.
    """

    workers = 16

    def __init__(self, url: str, *, tuned: str, base: str | None, api_key: ApiKey) -> None:
        self.url, self._key = check_url(url), api_key
        self.names: Mapping[str, str] = {"tuned": tuned} if base is None else {"base": base, "tuned": tuned}
        self.run: RunDir | None = None
        self._tls = httpx.create_ssl_context()

    def load(self) -> None:
        """Nothing: the server has them, and may be started later."""

    def find_rewards(self, messages: Messages, replies: Mapping[str, Reply]) -> dict[str, float] | None:
        """None: a server that streams answers does not score other models' answers."""
        return None

    def answer(
        self,
        side: str,
        messages: Messages,
        sampling: Sampling,
        *,
        on_text: Callable[[Reply], None],
        is_stopped: Callable[[], bool],
    ) -> Reply:
        """As `Models`; its tokens are those that the server counted at the end, 0 where it does not or was stopped.

        Raises: RefusedError where the server cannot be reached, refuses, or speaks otherwise.
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
        heard = _Heard()

        def is_over() -> bool:
            return is_stopped() or len(heard.text) > MOST_LETTERS

        try:
            asyncio.run(_until(is_over, self._listen(body, heard, on_text=on_text, is_over=is_over)))
        except httpx.HTTPError as error:
            words = one_line(f"{type(error).__name__}: {error}")  # it may repeat what came
            raise self._refusal(f"cannot be reached, or broke off ({self._key.hide(words)[:200]})") from None
        except ReplyError as error:
            raise self._refusal(f"does not stream as chat/completions do: it {error}") from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            raise self._refusal("does not stream as chat/completions do") from None
        return heard.reply()

    async def _listen(
        self,
        body: Mapping[str, Any],
        heard: _Heard,
        *,
        on_text: Callable[[Reply], None],
        is_over: Callable[[], bool],
    ) -> None:
        limits: Any = {"silence_seconds": SILENCE_SECONDS, "connect_seconds": CONNECT_SECONDS}
        async with build_client(self.url, self._key, tls=self._tls, **limits) as client:
            for more in (COUNTED, {}):
                url = f"{self.url}/chat/completions"
                bounds: Any = {"most_seconds": ANSWER_SECONDS, "most_bytes": MOST_ANSWER_BYTES}
                async with post(client, url, {**body, **more}, **bounds) as reply:
                    if reply.status in (400, 422) and more:
                        continue  # a server that does not know the option says so thus
                    if reply.status != 200:
                        words = self._key.hide(await reply.read_excerpt())[:200]
                        raise self._refusal(f"answers {reply.status}: {words}")
                    async for data in reply.read_events():
                        if data.strip() == "[DONE]":
                            break
                        if heard.add(_read_event(data)):
                            on_text(heard.reply())
                        if is_over():
                            return
                if not heard.began:
                    raise ValueError("no event is one of a chat completion")
                return

    def _refusal(self, seen: str) -> RefusedError:
        return RefusedError(f"The server of the models {self._key.hide(seen)}.")


async def _until(is_over: Callable[[], bool], work: Coroutine[Any, Any, None]) -> None:
    """Does the work, and gives it up as soon as it is over: a silent server would not let it look itself."""
    task = asyncio.create_task(work)
    while not task.done():
        await asyncio.wait({task}, timeout=LOOK_SECONDS)
        if not task.done() and is_over():
            task.cancel()
            await asyncio.wait({task})
    if not task.cancelled():
        task.result()


def _read_event(data: str) -> Mapping[str, Any]:
    event: Mapping[str, Any] = read_json(data)
    if event.get("error"):
        raise RefusedError("The server of the models broke off with an error; its log says more.")
    return event
