"""An OpenAI-compatible server in place of loaded weights: streamed and stopped answers, and errors as messages."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from conftest import find_free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpokit.apikey import ApiKey
from dpokit.errors import SettingsError
from dpokit.merge.hh_chat_template import SERVE, write_template
from dpokit.serve.app import build_models
from dpokit.serve.models import LocalModels
from dpokit.serve.remote import RemoteModels
from dpokit.serve.request_limits import RefusedError, SamplingSettings

SECRET = "sk-0123456789"
QUESTION = [{"role": "user", "content": "Why?"}]
SAMPLING = SamplingSettings(temperature=0.5, top_p=0.8, max_new_tokens=9, seed=4)


SILENCE = "silence"


class Server(ThreadingHTTPServer):
    """Sends `lines` as an event stream and keeps the requests.

    Attributes:
        lines: the lines to send; after a line SILENCE the server sends nothing more during the test.
        answers: whether the server replies at all.
        refused: a field that the server refuses.
    """

    status, lines, answers, refused, daemon_threads = 200, [], True, None, True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.sent = 0
        self.is_over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "key": self.headers["Authorization"], **body})
        if not self.server.answers:
            self.server.is_over.wait()
        self.send_response(400 if self.server.refused in body else self.server.status)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for line in self.server.lines:
                if line is SILENCE:
                    self.server.is_over.wait()
                self.wfile.write(line.encode() + b"\n\n")
                self.wfile.flush()
                self.server.sent += 1
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        """Writes no log."""


def event(text=None, finish=None) -> str:
    delta = {} if text is None else {"content": text}
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(tokens: int) -> str:
    """The last event of a server that reports usage."""
    return "data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})


@pytest.fixture(autouse=True)
def proxy(monkeypatch) -> None:
    """Sets a proxy that does not exist: a client that uses it reaches no server."""
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")


@pytest.fixture
def server() -> Iterator[Server]:
    new_server = Server()
    thread = threading.Thread(target=new_server.serve_forever)
    thread.start()
    yield new_server
    new_server.is_over.set()
    new_server.shutdown()
    thread.join()
    new_server.server_close()


@pytest.fixture
def models(server) -> RemoteModels:
    return RemoteModels(server.url, tuned="mine", base="gpt2", api_key=ApiKey("KEY", SECRET))


def answer(models, side="tuned", updates=None, is_stopped=lambda: False):
    updates = [] if updates is None else updates
    return models.answer(side, QUESTION, SAMPLING, on_text=updates.append, is_stopped=is_stopped)


def test_an_answer_is_streamed_from_the_named_model(server, models):
    role = 'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}'
    events = [event("Be"), event("cause \u00e4"), event(None, "stop"), usage(7)]
    server.lines = [": ping", role, *events, "data: [DONE]", event("!")]
    updates: list = []
    for side, name in (("tuned", "mine"), ("base", "gpt2")):
        reply = answer(models, side, updates)
        assert (reply.text, reply.tokens, reply.ended, reply.ids) == ("Because \u00e4", 7, True, None)
        request = server.requests[-1]
        assert request["path"] == "/v1/chat/completions"
        assert request["key"] == f"Bearer {SECRET}"
        expected = {"model": name, "messages": QUESTION, "temperature": 0.5, "top_p": 0.8, "max_tokens": 9, "seed": 4}
        assert {key: request[key] for key in expected} == expected
        assert request["stream_options"] == {"include_usage": True}
    assert [reply.text for reply in updates] == ["Be", "Because \u00e4"] * 2
    assert models.find_rewards(QUESTION, {"tuned": reply, "base": reply}) is None


def test_an_answer_that_the_limit_cuts_has_not_ended(server, models):
    server.lines = [event("Be"), event(None, "length"), "data: [DONE]"]
    assert not answer(models).ended


def test_a_server_without_usage_gives_zero_tokens(server, models):
    server.lines = [event("Be"), event("cause"), event(None, "stop"), "data: [DONE]"]
    assert answer(models).tokens == 0


def test_a_server_that_refuses_usage_is_asked_without_it(server, models):
    server.lines, server.refused = [event("Because"), event(None, "stop"), "data: [DONE]"], "stream_options"
    assert answer(models).text == "Because"
    first, second = server.requests
    assert second == {name: value for name, value in first.items() if name != "stream_options"}


def test_events_after_the_end_do_not_change_it(server, models):
    server.lines = [event("Because"), event(None, "stop"), event(""), usage(1), "data: [DONE]"]
    assert answer(models).ended


@pytest.mark.parametrize(("answers", "text"), [(False, ""), (True, "Be")])
def test_an_answer_of_a_silent_server_can_be_stopped(answers, text, server, models):
    server.answers, server.lines = answers, [event("Be"), SILENCE]
    updates: list = []
    looks = iter([False, False, False])

    def is_stopped() -> bool:
        return bool(updates or not answers) and next(looks, True)

    assert answer(models, updates=updates, is_stopped=is_stopped).text == text
    assert not server.is_over.is_set()


def test_a_connection_without_a_reply_can_be_stopped():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first, socket.socket() as second:
        for waiting in (first, second):  # these fill the backlog; further connections get no answer
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        models = RemoteModels(url, tuned="mine", base=None, api_key=ApiKey("KEY"))
        assert answer(models, is_stopped=lambda: True).text == ""


def test_a_proxy_is_used_for_remote_servers_only(server, monkeypatch):
    server.lines = [event("Because"), "data: [DONE]"]
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
    models = RemoteModels("http://models.example/v1", tuned="mine", base=None, api_key=ApiKey("KEY"))
    assert answer(models).text == "Because"
    assert server.requests[0]["path"] == "http://models.example/v1/chat/completions"


def test_a_stopped_answer_is_not_read_further(server, models):
    server.lines = [event("word ")] * 200_000
    assert answer(models, is_stopped=lambda: True).text == "word"
    assert server.sent < 200_000


@pytest.mark.parametrize(
    ("status", "lines", "message"),
    [
        (401, [f"no such key: {SECRET}"], r"answers 401: no such key: \*\*\*"),
        (404, ["no such model"], "answers 404: no such model"),
        (500, [], "answers 500"),
        (200, ["data: {torn"], "does not stream as chat/completions do"),
        (200, ["data: [1, 2]"], "does not stream as chat/completions do"),
        (200, ['data: {"choices": ["text"]}'], "does not stream as chat/completions do"),
        (200, ['data: {"error": {"message": "gone"}}'], "broke off with an error"),
    ],
)
def test_a_servers_error_is_shown_without_the_key(server, models, status, lines, message):
    server.status, server.lines = status, lines
    with pytest.raises(RefusedError, match=message) as error:
        answer(models)
    assert SECRET not in str(error.value)


def test_a_missing_server_is_reported():
    models = RemoteModels("http://127.0.0.1:9/v1", tuned="mine", base=None, api_key=ApiKey("KEY"))
    with pytest.raises(RefusedError, match="cannot be reached"):
        answer(models)


@pytest.mark.parametrize(
    ("name", "base", "argv", "remote", "message"),
    [
        (None, None, [], (None, "", None, "KEY"), "no run or model is named"),
        ("runs/mine", None, [], ("http://a/v1", "mine", None, "KEY"), "would load other models"),
        (None, None, ["--dtype", "bfloat16"], ("http://a/v1", "mine", None, "KEY"), "would load other models"),
        (None, None, [], ("http://a/v1", "", None, "KEY"), "without a model"),
        (None, None, [], ("ftp://a/v1", "mine", None, "KEY"), "URL"),
        (None, None, [], ("http://user:word@a/v1", "mine", None, "KEY"), "URL"),
    ],
)
def test_an_endpoint_with_local_models_is_refused(name, base, argv, remote, message):
    with pytest.raises(SettingsError, match=message):
        build_models(name, base, argv, remote=remote)


@pytest.mark.slow
def test_transformers_serve_gives_the_same_answers(tiny_gpt2, tmp_path):
    folder, port = tmp_path / "merged", find_free_port()
    _make_talkative(tiny_gpt2, folder)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--port", str(port)]
    command += ["--device", "cpu", "--chat-template-kwargs", (folder / SERVE).read_text()]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_up(f"{url}/health"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        remote = RemoteModels(f"{url}/v1", tuned=str(folder), base=None, api_key=ApiKey("KEY"))
        local = LocalModels(str(folder), base=None)
        local.load()
        greedy = SamplingSettings(temperature=0.0, top_p=1.0, max_new_tokens=9, seed=4)
        turns = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}]
        for messages in (QUESTION, [*QUESTION, *turns]):
            remote_reply, local_reply = (
                models.answer("tuned", messages, greedy, on_text=lambda _: None, is_stopped=lambda: False)
                for models in (remote, local)
            )
            assert (remote_reply.text, remote_reply.tokens) == (local_reply.text, local_reply.tokens)
            assert local_reply.text
    finally:
        process.terminate()
        process.wait(timeout=60)


def _make_talkative(model: Path, folder: Path) -> None:
    """Writes the model with other weights; its greedy answers are letters and depend on every token before them."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    changed = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.3 * torch.randn_like(weight)
        letters = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
        silent = [token for token, letter in enumerate(letters) if not (letter.isascii() and letter.isalpha())]
        changed.get_input_embeddings().weight[silent] = 0.0
    changed.save_pretrained(folder)
    write_template(folder, tokenizer)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
