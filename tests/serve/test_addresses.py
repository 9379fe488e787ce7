"""Where the page begins: a port that is taken is told before anything is read; examples are no condition."""

import socket

import pytest
from served import make_run, serve
from test_cli import dpokit

from dpokit.errors import RunFolderError, SettingsError
from dpokit.rundir import RunDir
from dpokit.serve.app import PASSWORD_VARIABLE, Address, _listen, find_votes


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


def test_data_that_cannot_be_kept_ends_no_page(run, tmp_path):
    (tmp_path / "file").touch()
    with serve(str(run.path), HF_DATASETS_CACHE=str(tmp_path / "file" / "cache")) as page:
        assert page.url
        said = "".join(page.said)
    assert "no held-out questions are shown" in said
    assert "Traceback" not in said


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
