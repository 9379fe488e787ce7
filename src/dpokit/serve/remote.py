"""Models that an OpenAI-compatible server keeps: its answers, streamed. No torch."""

import asyncio
import ipaddress
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from dpokit.apikey import ApiKey, check_url
from dpokit.data.formats import Messages
from dpokit.rundir import RunDir
from dpokit.serve.limits import RefusedError, Sampling
from dpokit.serve.models import Reply

TIMEOUT = httpx.Timeout(120.0, connect=5.0)  # seconds of silence, and for a connection
LOOK_SECONDS = 0.1  # between two looks at whether an answer was stopped
MOST_LETTERS = 2**20
COUNTED = {"stream_options": {"include_usage": True}}


@dataclass
class _Heard:
    """What has come of an answer so far."""

    text: str = ""
    tokens: int = 0
    ended: bool = False

    def add(self, event: Mapping[str, Any]) -> bool:
        """Takes an event of the stream; whether it brought text."""
        self.tokens = int((event.get("usage") or {}).get("completion_tokens") or self.tokens)
        piece = ""
        for choice in event.get("choices", [])[:1]:
            piece = (choice.get("delta") or {}).get("content") or ""
            self.ended = self.ended or choice.get("finish_reason") == "stop"
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
        self._tls = httpx.create_ssl_context()  # once: it takes longer than a request
        # A proxy of the environment is for the way out; few of them know what stands on this machine.
        self._obeys_environment = not _is_loopback(httpx.URL(self.url).host)

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
            raise self._refusal(f"cannot be reached, or broke off ({type(error).__name__})") from None
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
        options: Any = {"timeout": TIMEOUT, "verify": self._tls, "trust_env": self._obeys_environment}
        async with httpx.AsyncClient(headers=self._key.headers(), **options) as client:
            for more in (COUNTED, {}):
                url = f"{self.url}/chat/completions"
                async with client.stream("POST", url, json={**body, **more}) as response:
                    if response.status_code in (400, 422) and more:
                        continue  # a server that does not know the option says so thus
                    if response.status_code != 200:
                        words = " ".join((await response.aread()).decode(errors="replace").split())[:200]
                        raise self._refusal(f"answers {response.status_code}: {words}")
                    async for event in _read_events(response.aiter_lines()):
                        if heard.add(event):
                            on_text(heard.reply())
                        if is_over():
                            return
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


async def _read_events(lines: AsyncIterator[str]) -> AsyncIterator[Mapping[str, Any]]:
    """The events of a stream (server-sent, as OpenAI's)."""
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if event.get("error"):
            raise RefusedError("The server of the models broke off with an error; its log says more.")
        yield event


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
