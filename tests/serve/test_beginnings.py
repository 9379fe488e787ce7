"""What a page begins with: an address, examples and votes; what is wrong with them is told, and told first."""

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
from dpokit.serve.question_queue import Desk
from dpokit.serve.request_limits import Limits, Rate, Sampling
from dpokit.serve.widgets import Site


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"), tiny_gpt2)


def test_a_port_that_is_taken_is_told_before_data_is_read(run):
    (run.path.parent / "pairs.jsonl").rename(run.path.parent / "moved.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = dpokit("serve", str(run.path), "--port", str(taken.getsockname()[1]))
    (run.path.parent / "moved.jsonl").rename(run.path.parent / "pairs.jsonl")
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert "held-out questions" not in done.stderr


def test_a_port_belongs_to_the_page_from_the_first_moment():
    with _listen(Address(port=0)) as first, pytest.raises(SettingsError, match="in use"):
        _listen(Address(port=first.getsockname()[1]))


def test_a_template_that_breaks_at_the_held_out_questions_ends_no_page(run):
    template = run.model / "chat_template.jinja"
    template.write_text("{{ 1 + 'a' }}")
    with serve(str(run.path)) as page:
        assert page.url
    template.unlink()
    said = "".join(page.said)
    assert "no held-out questions are shown: the chat template of" in said
    assert "cannot be rendered: TypeError" in said


@pytest.mark.parametrize("host", ["\u00e4" * 80, "my..host"])
def test_a_name_that_no_host_can_have_is_told(host, monkeypatch):
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    with pytest.raises(SettingsError, match="--host"):
        _listen(Address(host, 0))


def test_votes_that_cannot_be_read_are_told(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.symlink_to(path)
    with pytest.raises(RunFolderError, match="cannot be read: Too many levels"):
        find_votes(None, path)


def test_a_page_whose_votes_cannot_be_read_any_more_counts_none(tiny_gpt2, tmp_path):
    path = tmp_path / "votes.jsonl"
    path.symlink_to(path)
    site = Site(Desk(LocalModels(str(tiny_gpt2), str(tiny_gpt2)), Limits()), path, [], Rate(1), None)
    with gr.Blocks():
        assert Page(site, Sampling())._count() == ""
