"""Replies with infinite numbers or deep nesting end in one message, not in a traceback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpokit.apikey import ApiKey
from dpokit.errors import JudgeError
from dpokit.evaluate.endpoint import Endpoint
from dpokit.serve.remote import RemoteModels
from dpokit.serve.request_limits import RefusedError, SamplingSettings

KEY = ApiKey("KEY")
QUESTION = [{"role": "user", "content": "Why?"}]
DEEP = "[" * 2**21
WHOLE = '{"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": 1e999}}'
STREAMED = '{"choices": [], "usage": {"completion_tokens": 1e999}}'


@contextmanager
def serve_text(text: str) -> Iterator[str]:
    """The URL of a server that sends this text to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Writes no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("text", [WHOLE, DEEP], ids=["endless tokens", "deep nesting"])
def test_a_judge_with_hostile_replies_raises_one_error(text):
    message = "does not reply as chat/completions do"
    with (
        serve_text(text) as url,
        Endpoint(url, api_key=KEY, timeout_seconds=60) as judge,
        pytest.raises(JudgeError, match=message),
    ):
        judge.ask({"model": "judge"})


@pytest.mark.parametrize("text", [STREAMED, DEEP], ids=["endless tokens", "deep nesting"])
def test_a_model_with_hostile_replies_raises_one_error(text):
    with (
        serve_text(f"data: {text}\n\n") as url,
        pytest.raises(RefusedError, match="does not stream as chat/completions do"),
    ):
        RemoteModels(url, tuned="mine", base=None, api_key=KEY).answer(
            "tuned", QUESTION, SamplingSettings(), on_text=lambda _: None, is_stopped=lambda: False
        )
