"""hf_xet's own requests over HTTP: a bad answer of its server ends with the command that repeats the push."""

import time

import pytest
from local_hub import Handler, serve
from pushing import QUICK, REPO, connect, make_run

from dpokit.errors import HubError
from dpokit.push.hub import PushTarget
from dpokit.push.push import push_run


def name_server(self, kind, **_):
    """Names this server as the place where hf_xet sends its content."""
    if self.may(write=kind == "write"):
        address, expires = f"{self.server.url}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": expires}
        self.reply(200, {"accessToken": "x", "exp": expires, "casUrl": address}, headers)


def answer_with_other_json(self):
    """Like a proxy that answers every request with its own page."""
    self.reply(200, {"no": "thing of Xet"})


def answer_busy(self):
    self.refuse(503, "busy")


@pytest.mark.parametrize(
    ("answer", "says"),
    [(answer_with_other_json, "the push failed: OSError"), (answer_busy, "sending: the Hub answered 503")],
)
def test_a_bad_answer_to_an_upload_names_the_command_to_repeat(answer, says, tmp_path, tiny_gpt2, monkeypatch):
    routes = tuple((verb, path, name_server if "xet-" in path else does) for verb, path, does in Handler.routes)
    monkeypatch.setattr(Handler, "routes", (*routes, *((verb, "/cas/.*", answer) for verb in ("GET", "POST", "PUT"))))
    run = make_run(tmp_path / "run", tiny_gpt2)
    with serve(tmp_path / "hub") as hub:
        connect(monkeypatch, hub, xet=True)
        with pytest.raises(HubError, match=says) as error:
            push_run(run.path, PushTarget(REPO), yes=True, retry=QUICK)
        assert hub.asked("/cas/")
        assert not hub.asked("/commit/")
    assert f"dpokit push {run.path} --repo-id {REPO}" in error.value.do
