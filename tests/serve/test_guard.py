"""The guard of the page: passwords, routes, and sizes of requests."""

import asyncio
import base64
import json

import pytest

from dpokit.errors import RunFolderError, SettingsError
from dpokit.serve.app import PASSWORD_VARIABLE, Address, find_votes, read_proxies
from dpokit.serve.guard import MOST_AT_ONCE, MOST_BODY_BYTES, Credentials, Guard

HOSTS = {"127.0.0.1", "localhost"}


async def page(scope, receive, send):
    body = b""
    if scope["method"] == "POST":
        body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page" + body})


def ask(
    method,
    path,
    *,
    headers=None,
    hosts=HOSTS,
    credentials=None,
    guard=None,
    body=b"{}",
    client=("10.0.0.1", 5),
    query=b"",
):
    """The status and headers of the reply; the body is sent in two parts."""
    guard = guard or Guard(page, hosts=hosts, credentials=credentials, per_minute=1)
    all_headers = {
        "host": "127.0.0.1:7860",
        **({"content-length": str(len(body))} if method == "POST" else {}),
        **(headers or {}),
    }
    encoded = [(name.encode(), value.encode()) for name, value in all_headers.items() if value is not None]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": encoded,
        "client": client,
        "query_string": query,
    }
    sent = []
    parts = [
        {"type": "http.request", "body": body[:1], "more_body": True},
        {"type": "http.request", "body": body[1:], "more_body": False},
    ]

    async def receive():
        return parts.pop(0) if parts else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    if sent[0]["status"] == 200 and method == "POST":
        assert sent[1]["body"] == b"page" + body
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/config"),
        ("GET", "/theme.css"),
        ("GET", "/assets/index-B2x_3.js"),
        ("GET", "/static/fonts/Mono/Mono-Bold.woff2"),
        ("GET", "/gradio_api/heartbeat/abc123"),
        ("POST", "/gradio_api/queue/join"),
    ],
)
def test_a_route_of_the_page_is_forwarded_with_its_policy(method, path):
    status, headers = ask(method, path)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]


def test_a_session_gets_its_stream_after_a_request():
    guard = Guard(page, hosts=HOSTS, credentials=None, per_minute=1)
    stream = {"guard": guard, "query": b"session_hash=abc"}
    assert ask("GET", "/gradio_api/queue/data", **stream)[0] == 404
    assert ask("POST", "/gradio_api/queue/join", guard=guard, body=b'{"session_hash": "abc"}')[0] == 200
    status, headers = ask("GET", "/gradio_api/queue/data", **stream)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("HEAD", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://example.com/"),
        ("GET", "/assets/../../etc/passwd"),
        ("GET", "/assets/%2e%2e/x"),
        ("GET", "/static/..%2f..%2fetc/passwd"),
        ("GET", "/assets//etc/passwd"),
        ("GET", "/gradio_api/stream/a/1/2/playlist.m3u8"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/call/_ask"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/queue/join"),
        ("PUT", "/"),
        ("DELETE", "/gradio_api/queue/join"),
        ("OPTIONS", "/"),
    ],
)
def test_any_other_route_is_refused(method, path):
    assert ask(method, path)[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil:7860"])
def test_a_foreign_host_name_is_refused(host):
    assert ask("GET", "/", headers={"host": host})[0] == 421
    assert ask("GET", "/", headers={"host": host}, hosts=None)[0] == 200


def test_a_post_from_another_page_is_refused():
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999"):
        assert ask("POST", "/gradio_api/queue/join", headers={"origin": origin})[0] == 403
    assert ask("POST", "/gradio_api/queue/join", headers={"origin": "http://127.0.0.1:7860"})[0] == 200


@pytest.mark.parametrize("length", [str(MOST_BODY_BYTES + 1), "-1", "lots", "", None])
def test_a_body_of_too_many_or_unknown_bytes_is_refused(length):
    assert ask("POST", "/gradio_api/queue/join", headers={"content-length": length})[0] == 413


FILE = {"path": "http://example.com/huge.bin", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"data": ["Why?", 0.7, 3, True, None], "fn_index": 0}, 200),
        ({"session_hash": "abc"}, 200),
        ({"data": [FILE]}, 400),
        ({"data": [[FILE]]}, 400),
        ({"data": FILE}, 400),
        ({"data": None}, 400),
        ([FILE], 400),
        ("text", 400),
    ],
)
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/cancel"])
def test_only_plain_values_reach_the_page(path, body, status):
    assert ask("POST", path, body=json.dumps(body).encode())[0] == status


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"data": []}' + b" " * MOST_BODY_BYTES])
def test_a_body_that_is_not_json_or_too_long_is_refused(body):
    assert ask("POST", "/gradio_api/queue/join", body=body, headers={"content-length": "9"})[0] == 400


def basic(text):
    return {"authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


def test_a_wrong_user_or_password_is_refused():
    credentials = Credentials("ann", "s3cret:with colon")
    status, headers = ask("GET", "/", credentials=credentials)
    assert status == 401
    assert headers["www-authenticate"].startswith("Basic")
    for wrong in ("ann:", "ann:s3cret", "bob:s3cret:with colon", "", ":"):
        assert ask("GET", "/", headers=basic(wrong), credentials=credentials)[0] == 401
    for broken in ("Basic", "Basic ???", "Bearer abc", "Basic \u00e4"):
        assert ask("GET", "/", headers={"authorization": broken}, credentials=credentials)[0] == 401
    assert ask("GET", "/", headers=basic("ann:s3cret:with colon"), credentials=credentials)[0] == 200
    assert "s3cret" not in repr(credentials)


def test_too_many_wrong_passwords_are_refused():
    guard = Guard(page, hosts=None, credentials=Credentials("ann", "s3cret"), per_minute=1)
    statuses = [ask("GET", "/", headers=basic(f"ann:{number}"), guard=guard)[0] for number in range(30)]
    assert statuses == [401] * 20 + [429] * 10
    for headers in (basic("ann:s3cret"), {}):
        assert ask("GET", "/", headers=headers, guard=guard)[0] == 429, "the right password is refused as well"
    other = ("10.0.0.2", 5)
    assert ask("GET", "/", headers=basic("ann:s3cret"), guard=guard, client=other)[0] == 200


def test_a_right_password_is_never_counted():
    guard = Guard(page, hosts=None, credentials=Credentials("ann", "s3cret"), per_minute=1)
    statuses = {
        ask("GET", "/", headers=headers, guard=guard)[0] for _ in range(50) for headers in (basic("ann:s3cret"), {})
    }
    assert statuses == {200, 401}


@pytest.mark.parametrize(("per_minute", "most"), [(2, 600), (100, 1000)])
def test_too_many_posts_are_refused(per_minute, most):
    guard = Guard(page, hosts=HOSTS, credentials=None, per_minute=per_minute)
    statuses = [ask("POST", "/gradio_api/queue/join", guard=guard)[0] for _ in range(most + 5)]
    assert statuses == [200] * most + [429] * 5


@pytest.mark.parametrize(
    ("address", "name", "status"),
    [
        (Address("127.8.8.8"), "127.8.8.8:7860", 200),
        (Address("::1"), "[::1]:7860", 200),
        (Address("127.0.0.1"), "page.example", 421),
        (Address("127.0.0.1", auth="ann:s3cret"), "page.example", 200),
    ],
)
def test_a_page_with_a_password_has_any_host_name(address, name, status):
    credentials = address.read_credentials()
    guard = Guard(page, hosts=address.find_hosts(credentials), credentials=credentials, per_minute=1)
    assert ask("GET", "/", headers={"host": name} | basic("ann:s3cret"), guard=guard)[0] == status


def test_a_proxy_that_keeps_the_host_may_post():
    headers = {"host": "page.example", "origin": "https://page.example"}
    assert ask("POST", "/gradio_api/queue/join", headers=headers, hosts=None)[0] == 200


def test_too_many_open_requests_of_an_address_are_refused():
    guard = Guard(page, hosts=HOSTS, credentials=None, per_minute=1)
    guard._open_requests["10.0.0.1"] = MOST_AT_ONCE
    assert ask("GET", "/", guard=guard)[0] == 429
    assert ask("GET", "/", guard=guard, client=("10.0.0.2", 5))[0] == 200
    assert list(guard._open_requests) == ["10.0.0.1"], "a finished request is forgotten"


@pytest.mark.parametrize("text", ["*", "proxy.example", "10.0.0.1,", "10.0.0.0/99", "10.0.0.1;10.0.0.2"])
def test_a_proxy_must_be_an_address_or_network(text):
    with pytest.raises(SettingsError, match="--forwarded-allow-ips"):
        read_proxies(text)
    assert read_proxies(None) == ()
    assert [str(network) for network in read_proxies("127.0.0.1, 10.0.0.7/8")] == ["127.0.0.1/32", "10.0.0.0/8"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my.server"])
def test_a_page_for_other_machines_needs_a_password(host, monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    with pytest.raises(SettingsError, match="no password"):
        Address(host).read_credentials()
    with pytest.raises(SettingsError, match="no password"):
        Address(host, auth="ann").read_credentials()
    assert Address(host, auth="ann:s3cret").read_credentials() is not None
    monkeypatch.setenv(PASSWORD_VARIABLE, "s3cret")
    for auth in (None, "ann"):
        credentials = Address(host, auth=auth).read_credentials()
        assert credentials is not None
        assert credentials.match(basic(f"{auth or 'dpokit'}:s3cret")["authorization"])


def test_a_file_without_votes_is_refused(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{\n  "beta": 0.1\n}')
    with pytest.raises(RunFolderError, match="does not begin with a vote"):
        find_votes(None, path)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_a_local_page_may_have_a_password(host, monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert Address(host).read_credentials() is None
    assert Address(host, auth="ann:s3cret").read_credentials() is not None
    with pytest.raises(SettingsError, match="no password"):
        Address(host, auth="ann").read_credentials()
