"""The start of a page: address, examples and votes, whose errors are reported first."""

import socket

import gradio as gr
import pytest
from served import make_run, serve
from test_cli import dpokit

from dpokit.errors import RunFolderError, SettingsError
from dpokit.rundir import RunDir
from dpokit.serve.app import PASSWORD_VARIABLE, Address, _listen, find_votes
from dpokit.serve.models import LocalModels
from dpokit.serve.page import Page
from dpokit.serve.question_queue import QuestionQueue
from dpokit.serve.request_limits import RateLimit, RequestLimits, SamplingSettings
from dpokit.serve.widgets import Site


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"), tiny_gpt2)


def test_a_used_port_is_reported_before_data_is_read(run):
    (run.path.parent / "pairs.jsonl").rename(run.path.parent / "moved.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = dpokit("serve", str(run.path), "--port", str(taken.getsockname()[1]))
    (run.path.parent / "moved.jsonl").rename(run.path.parent / "pairs.jsonl")
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert "held-out questions" not in done.stderr


def test_a_port_is_reserved_from_the_start():
    with _listen(Address(port=0)) as first, pytest.raises(SettingsError, match="in use"):
        _listen(Address(port=first.getsockname()[1]))


def test_a_broken_chat_template_does_not_stop_the_page(run):
    template = run.model / "chat_template.jinja"
    template.write_text("{{ 1 + 'a' }}")
    with serve(str(run.path)) as page:
        assert page.url
    template.unlink()
    log = "".join(page.said)
    assert "no held-out questions are shown: the chat template of" in log
    assert "cannot be rendered: TypeError" in log


@pytest.mark.parametrize("host", ["\u00e4" * 80, "my..host"])
def test_an_invalid_host_name_is_refused(host, monkeypatch):
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    with pytest.raises(SettingsError, match="--host"):
        _listen(Address(host, 0))


def test_unreadable_votes_are_refused(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.symlink_to(path)
    with pytest.raises(RunFolderError, match="cannot be read: Too many levels"):
        find_votes(None, path)


def test_a_page_shows_no_count_of_unreadable_votes(tiny_gpt2, tmp_path):
    path = tmp_path / "votes.jsonl"
    path.symlink_to(path)
    site = Site(
        QuestionQueue(LocalModels(str(tiny_gpt2), str(tiny_gpt2)), RequestLimits()), path, [], RateLimit(1), None
    )
    with gr.Blocks():
        assert Page(site, SamplingSettings())._count() == ""
