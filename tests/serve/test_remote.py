"""An OpenAI-compatible server in place of loaded weights: streamed, stopped, and refused in words."""

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
from dpokit.serve.request_limits import RefusedError, Sampling

SECRET = "sk-0123456789"
QUESTION = [{"role": "user", "content": "Why?"}]
SAMPLING = Sampling(temperature=0.5, top_p=0.8, max_new_tokens=9, seed=4)


SILENCE = "silence"


class Server(ThreadingHTTPServer):
    """Says `lines` of an event stream; keeps what it was asked.

    Attributes:
        lines: where one is SILENCE, nothing more comes while the test lasts.
        answers: whether a request has a reply at all.
        refused: a field that requests must not have.
    """

    status, lines, answers, refused, daemon_threads = 200, [], True, None, True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict] = []
        self.sent = 0
        self.is_over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
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
        """Says nothing."""


def event(text=None, finish=None) -> str:
    delta = {} if text is None else {"content": text}
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(tokens: int) -> str:
    """The last event of a server that counts."""
    return "data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}})


@pytest.fixture(autouse=True)
def proxy(monkeypatch) -> None:
    """One that is not there: who obeys it reaches nobody."""
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.is_over.set()
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def models(server) -> RemoteModels:
    return RemoteModels(server.url, tuned="mine", base="gpt2", api_key=ApiKey("KEY", SECRET))


def answer(models, side="tuned", seen=None, is_stopped=lambda: False):
    seen = [] if seen is None else seen
    return models.answer(side, QUESTION, SAMPLING, on_text=seen.append, is_stopped=is_stopped)


def test_an_answer_is_asked_for_by_name_and_shown_as_it_comes(server, models):
    role = 'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}'
    words = [event("Be"), event("cause \u00e4"), event(None, "stop"), usage(7)]
    server.lines = [": ping", role, *words, "data: [DONE]", event("!")]
    seen: list = []
    for side, name in (("tuned", "mine"), ("base", "gpt2")):
        found = answer(models, side, seen)
        assert (found.text, found.tokens, found.ended, found.ids) == ("Because \u00e4", 7, True, None)
        asked = server.asked[-1]
        assert asked["path"] == "/v1/chat/completions"
        assert asked["key"] == f"Bearer {SECRET}"
        expected = {"model": name, "messages": QUESTION, "temperature": 0.5, "top_p": 0.8, "max_tokens": 9, "seed": 4}
        assert {key: asked[key] for key in expected} == expected
        assert asked["stream_options"] == {"include_usage": True}
    assert [reply.text for reply in seen] == ["Be", "Because \u00e4"] * 2
    assert models.find_rewards(QUESTION, {"tuned": found, "base": found}) is None


def test_an_answer_that_the_limit_cut_is_not_one_that_ended(server, models):
    server.lines = [event("Be"), event(None, "length"), "data: [DONE]"]
    assert not answer(models).ended


def test_tokens_that_the_server_does_not_count_are_not_guessed(server, models):
    server.lines = [event("Be"), event("cause"), event(None, "stop"), "data: [DONE]"]
    assert answer(models).tokens == 0


def test_a_server_that_refuses_to_count_is_asked_without(server, models):
    server.lines, server.refused = [event("Because"), event(None, "stop"), "data: [DONE]"], "stream_options"
    assert answer(models).text == "Because"
    first, second = server.asked
    assert second == {name: value for name, value in first.items() if name != "stream_options"}


def test_what_follows_the_end_does_not_undo_it(server, models):
    server.lines = [event("Because"), event(None, "stop"), event(""), usage(1), "data: [DONE]"]
    assert answer(models).ended


@pytest.mark.parametrize(("answers", "text"), [(False, ""), (True, "Be")])
def test_a_server_that_falls_silent_does_not_keep_a_stopped_answer(answers, text, server, models):
    server.answers, server.lines = answers, [event("Be"), SILENCE]
    seen: list = []
    looks = iter([False, False, False])

    def is_stopped() -> bool:
        return bool(seen or not answers) and next(looks, True)

    assert answer(models, seen=seen, is_stopped=is_stopped).text == text
    assert not server.is_over.is_set()


def test_a_connection_that_does_not_come_about_can_be_stopped():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first, socket.socket() as second:
        for waiting in (first, second):  # what the queue has room for; further ones get no answer
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        models = RemoteModels(url, tuned="mine", base=None, api_key=ApiKey("KEY"))
        assert answer(models, is_stopped=lambda: True).text == ""


def test_a_proxy_is_for_servers_elsewhere(server, monkeypatch):
    server.lines = [event("Because"), "data: [DONE]"]
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
    models = RemoteModels("http://models.example/v1", tuned="mine", base=None, api_key=ApiKey("KEY"))
    assert answer(models).text == "Because"
    assert server.asked[0]["path"] == "http://models.example/v1/chat/completions"


def test_a_stopped_answer_is_not_read_to_its_end(server, models):
    server.lines = [event("word ")] * 200_000
    assert answer(models, is_stopped=lambda: True).text == "word"
    assert server.sent < 200_000


@pytest.mark.parametrize(
    ("status", "lines", "says"),
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
def test_what_goes_wrong_there_is_told_without_the_key(server, models, status, lines, says):
    server.status, server.lines = status, lines
    with pytest.raises(RefusedError, match=says) as error:
        answer(models)
    assert SECRET not in str(error.value)


def test_a_server_that_is_not_there_is_told():
    models = RemoteModels("http://127.0.0.1:9/v1", tuned="mine", base=None, api_key=ApiKey("KEY"))
    with pytest.raises(RefusedError, match="cannot be reached"):
        answer(models)


@pytest.mark.parametrize(
    ("what", "base", "argv", "remote", "says"),
    [
        (None, None, [], (None, "", None, "KEY"), "nothing to talk to"),
        ("runs/mine", None, [], ("http://a/v1", "mine", None, "KEY"), "would load others"),
        (None, None, ["--dtype", "bfloat16"], ("http://a/v1", "mine", None, "KEY"), "would load others"),
        (None, None, [], ("http://a/v1", "", None, "KEY"), "without a model"),
        (None, None, [], ("ftp://a/v1", "mine", None, "KEY"), "URL"),
        (None, None, [], ("http://user:word@a/v1", "mine", None, "KEY"), "URL"),
    ],
)
def test_an_endpoint_and_models_of_our_own_are_not_mixed(what, base, argv, remote, says):
    with pytest.raises(SettingsError, match=says):
        build_models(what, base, argv, remote=remote)


@pytest.mark.slow
def test_transformers_serve_answers_a_model_without_a_template_as_dpokit_does(tiny_gpt2, tmp_path):
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
        greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=9, seed=4)
        turns = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And then?"}]
        for messages in (QUESTION, [*QUESTION, *turns]):
            theirs, ours = (
                models.answer("tuned", messages, greedy, on_text=lambda _: None, is_stopped=lambda: False)
                for models in (remote, local)
            )
            assert (theirs.text, theirs.tokens) == (ours.text, ours.tokens)
            assert ours.text
    finally:
        process.terminate()
        process.wait(timeout=60)


def _make_talkative(model: Path, folder: Path) -> None:
    """The model with other weights, whose greedy answers are whole letters and hang on every token before them."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.3 * torch.randn_like(weight)
        letters = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
        silent = [token for token, letter in enumerate(letters) if not (letter.isascii() and letter.isalpha())]
        made.get_input_embeddings().weight[silent] = 0.0
    made.save_pretrained(folder)
    write_template(folder, tokenizer)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
