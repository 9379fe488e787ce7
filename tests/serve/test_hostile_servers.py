"""Servers that reply with what no number or nesting should be: told in words, never a traceback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpokit.apikey import ApiKey
from dpokit.errors import JudgeError
from dpokit.evaluate.endpoint import Endpoint
from dpokit.serve.remote import RemoteModels
from dpokit.serve.request_limits import RefusedError, Sampling

KEY = ApiKey("KEY")
QUESTION = [{"role": "user", "content": "Why?"}]
DEEP = "[" * 2**21
WHOLE = '{"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": 1e999}}'
STREAMED = '{"choices": [], "usage": {"completion_tokens": 1e999}}'


@contextmanager
def say(text: str) -> Iterator[str]:
    """The URL of a server that says this to everyone."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("text", [WHOLE, DEEP], ids=["endless tokens", "deep nesting"])
def test_a_judge_of_hostile_replies_is_one_message(text):
    says = "does not reply as chat/completions do"
    with (
        say(text) as url,
        Endpoint(url, api_key=KEY, timeout_seconds=60) as judge,
        pytest.raises(JudgeError, match=says),
    ):
        judge.ask({"model": "judge"})


@pytest.mark.parametrize("text", [STREAMED, DEEP], ids=["endless tokens", "deep nesting"])
def test_a_model_of_hostile_replies_is_refused(text):
    with say(f"data: {text}\n\n") as url, pytest.raises(RefusedError, match="does not stream as chat/completions do"):
        RemoteModels(url, tuned="mine", base=None, api_key=KEY).answer(
            "tuned", QUESTION, Sampling(), on_text=lambda _: None, is_stopped=lambda: False
        )
