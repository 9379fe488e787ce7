"""Hostile requests, sockets and readers of the page of `dpokit serve` are refused, and other visitors are served.

All tests use one real server over real sockets. 127.0.0.1 attacks; 127.0.0.2 is another visitor.
"""

import json
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import httpx
import psutil
import pytest
from asking import Asker, read_text
from served import AILING, Served, serve

pytest.importorskip("gradio")
PATIENCE = 3.0  # the server's time-out in these tests; its default is 20 s
SLACK = 30.0  # seconds that a busy machine may add; after that, a request hangs
OTHER, PROXY = "127.0.0.2", "127.0.0.3"
JOIN, DATA, HEARTBEAT = "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/heartbeat"
ASK = ["How do I bake bread?", 0.7, 0.95, 2, 0, False, "Right", None]
SLOW = ["How do I bake bread?", 0.7, 0.95, 200, 0, False, "Right", None]  # 20 s; twelve of them 4 minutes
SHORT = ["How do I bake bread?", 0.7, 0.95, 20, 0, False, "Right", None]
HEAD = b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n"
POST = f"POST {JOIN} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n".encode()
FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}

# Changes of a valid body. MISSING removes the key.
MISSING = object()
BODIES = {
    "a function that is not there": {"fn_index": 9999},
    "a negative function": {"fn_index": -1},
    "a function beyond all": {"fn_index": 2**70},
    "no function": {"fn_index": None},
    "a function that is true": {"fn_index": True},
    "a function by name": {"fn_index": "ask"},
    "a function left out": {"fn_index": MISSING},
    "an empty session": {"session_hash": ""},
    "no session": {"session_hash": None},
    "a session left out": {"session_hash": MISSING},
    "a session that is a number": {"session_hash": 5},
    "a session that is a list": {"session_hash": ["a"]},
    "a session of 200,000 letters": {"session_hash": "x" * 200_000},
    "a session with a path": {"session_hash": "../../etc"},
    "a session with a line": {"session_hash": "a\nb"},
    "a session of half a character": {"session_hash": "\ud800"},
    "a session in other letters": {"session_hash": "\u00e4"},
    "no values": {"data": []},
    "too few values": {"data": ASK[:3]},
    "too many values": {"data": [*ASK, *[1] * 1000]},
    "values left out": {"data": MISSING},
    "values that are none": {"data": None},
    "values by name": {"data": {"question": "Why?"}},
    "a file": {"data": [FILE, *ASK[1:]]},
    "a file in a list": {"data": [[FILE], *ASK[1:]]},
    "an update": {"data": [{"__type__": "update", "value": "x"}, *ASK[1:]]},
    "an unknown key": {"nonsense": 1},
    "a batch": {"batched": True},
    "another format": {"simple_format": True},
    "a token": {"oauth_token": "x"},
    "an event of one's own": {"event_id": "x"},
    "data of an event": {"event_data": {"a": [1] * 100}},
    "a trigger that is a text": {"trigger_id": "x"},
    "a trigger beyond all": {"trigger_id": 2**70},
}
# Method, path, body, status.
ROUTES = {
    "an upload": ("POST", "/gradio_api/upload", b"{}", 404),
    "a direct call": ("POST", "/gradio_api/run/predict", b"{}", 404),
    "a call by name": ("POST", "/gradio_api/call/_ask", b"{}", 404),
    "a component's function": ("POST", "/gradio_api/component_server", b"{}", 404),
    "a login of Gradio's": ("POST", "/login", b"{}", 404),
    "a file of the machine": ("GET", "/gradio_api/file=/etc/passwd", b"", 404),
    "a way out of a folder": ("GET", "/assets/..%2f..%2f..%2fetc/passwd", b"", 404),
    "a file of a long name": ("GET", f"/assets/{'a' * 300}", b"", 404),
    "a file of other letters": ("GET", "/assets/%C3%A4", b"", 404),
    "a file that is a folder": ("GET", "/assets/.", b"", 403),
    "a proxy": ("GET", "/gradio_api/proxy=http://127.0.0.1/", b"", 404),
    "another method": ("PUT", "/", b"", 404),
    "a method of no standard": ("HACK", "/", b"", 404),
    "a tunnel": ("CONNECT", "/", b"", 404),
    "a page that is not there": ("GET", "/?page=none", b"", 200),
    "a link that is not there": ("GET", "/config?deep_link=../x", b"", 200),
    "a stream of nobody": ("GET", f"{DATA}?session_hash=nobody", b"", 404),
    "a stream of no session": ("GET", DATA, b"", 404),
    "a stream of an empty session": ("GET", f"{DATA}?session_hash=", b"", 404),
    "a stream of two sessions": ("GET", f"{DATA}?session_hash=a&session_hash=b", b"", 404),
    "a stream of many values": ("GET", f"{DATA}?{'a=1&' * 100}session_hash=a", b"", 404),
    "a heartbeat of no name": ("GET", f"{HEARTBEAT}/", b"", 404),
    "a heartbeat of a long name": ("GET", f"{HEARTBEAT}/{'x' * 65}", b"", 404),
    "a heartbeat with a path": ("GET", f"{HEARTBEAT}/a.b", b"", 404),
    "a body that is no JSON": ("POST", JOIN, b"{", 400),
    "a body of brackets": ("POST", JOIN, b"[" * 100_000, 400),
    "a body that is a list": ("POST", JOIN, b"[]", 400),
    "a body beyond all": ("POST", JOIN, b"x" * 300_000, 413),
    "a cancel of nothing": ("POST", "/gradio_api/cancel", b"{}", 400),
    "a cancel of what is none": (
        "POST",
        "/gradio_api/cancel",
        b'{"session_hash": "a", "fn_index": 9999, "event_id": "b"}',
        400,
    ),
    "a reset of nothing": ("POST", "/gradio_api/reset", b"{}", 400),
    "a reset with more": ("POST", "/gradio_api/reset", b'{"event_id": "a", "b": 1}', 400),
}
# Sent bytes, and the status; a long request may also get 400, because the server receives it in parts.
RAW = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "a line without an end of its own": (b"GET /\r\n\r\n", 400),
    "two hosts": (HEAD + b"host: evil.example\r\n\r\n", 400),
    "another host": (b"GET / HTTP/1.1\r\nhost: evil.example\r\n\r\n", 421),
    "two lengths": (POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400),
    "a length and parts": (POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a negative length": (POST + b"content-length: -1\r\n\r\n", 400),
    "a body in parts": (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 413),
    "headers of 100,000 letters": (HEAD + b"a: " + b"x" * 100_000 + b"\r\n\r\n", 431),
    "a path of 100,000 letters": (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 404),
    "a websocket": (HEAD + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n", 200),
    "a forwarded host": (HEAD + b"x-forwarded-host: [\r\nx-forwarded-proto: ://\r\n\r\n", 200),
    "a foreign origin": (POST + b"content-length: 2\r\norigin: http://evil.example\r\n\r\n{}", 403),
}
# Bytes that a socket sends first, and bytes that it then repeats.
ENDLESS = {
    "nothing at all": (b"", b""),
    "headers without end": (HEAD, b"a: b\r\n"),
    "a header without end": (HEAD + b"a: ", b"b"),
    "a body without end": (POST + b"content-length: 200000\r\n\r\n", b"x"),
    "a body that never comes": (POST + b"content-length: 200\r\n\r\n", b""),
    "a body that was refused": (POST + b"content-length: 999999999\r\n\r\n", b"x"),
    "parts without end": (POST + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "a body where none belongs": (HEAD + b"content-length: 200000\r\n\r\n", b"x"),
}


@pytest.fixture(scope="module")
def page(tiny_gpt2, tmp_path_factory) -> Iterator[Served]:
    votes = tmp_path_factory.mktemp("page") / "votes.jsonl"
    argv = (str(tiny_gpt2), "--base", str(tiny_gpt2), "--use_cpu", "--votes", str(votes))
    argv += ("--per-minute", "100000", "--forwarded-allow-ips", PROXY)
    slow = {"AILING_SECONDS": "0.05", "AILING_PATIENCE": str(PATIENCE)}
    with serve(*argv, program=AILING, **slow) as made:
        for _ in range(300):
            if is_answered(made):
                break
            time.sleep(0.2)
        yield made


@pytest.fixture(autouse=True)
def unharmed(page):
    """After each test, another visitor is still served, and the server's log has no traceback."""
    yield
    assert open_page(page, OTHER) == 200
    assert not any("Traceback" in line for line in page.said), "".join(page.said)


def connect(page, source="127.0.0.1") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", httpx.URL(page.url).port), SLACK, (source, 0))
    made.settimeout(SLACK)
    return made


def read_status(made: socket.socket) -> int:
    """The status of the answer; 0 if the connection is closed without an answer."""
    try:
        line = made.recv(12, socket.MSG_WAITALL)
    except ConnectionError:
        return 0
    return int(line[9:12]) if line else 0


def send(page, method, path, body=b"", source="127.0.0.1", headers="") -> int:
    """The status of a request over a new connection."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{headers}"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with closing(connect(page, source)) as made:
        made.sendall(head.encode() + body)
        return read_status(made)


def open_page(page, source) -> int:
    return send(page, "GET", "/", source=source)


def join(page, *, source="127.0.0.1", **changes) -> int:
    """The status of a question, with `changes` to its body."""
    body = {"data": ASK, "fn_index": 0, "session_hash": secrets.token_hex(5)} | changes
    body = {key: value for key, value in body.items() if value is not MISSING}
    return send(page, "POST", JOIN, json.dumps(body).encode(), source)


def ask_as(page, source, **options) -> str:
    """All events, as text, of a question from the address `source`, asked in the same way as by the page."""
    transport = httpx.HTTPTransport(local_address=source)
    return read_text(Asker(page.url, transport=transport).ask(ASK[0], settings=(0.7, 0.95, 2, 0), **options))


def is_answered(page, source=OTHER) -> bool:
    return "Answered in" in ask_as(page, source)


def wait_until_answered(page, seconds: float, source=OTHER) -> None:
    until = time.monotonic() + seconds
    while not is_answered(page, source):
        assert time.monotonic() < until, f"{source} is not answered"
        time.sleep(0.2)


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_the_page_does_not_send_is_refused(page, case):
    assert join(page, **BODIES[case]) == 400


@pytest.mark.parametrize("case", ROUTES)
def test_a_route_that_the_page_does_not_need_is_refused(page, case):
    method, path, body, status = ROUTES[case]
    assert send(page, method, path, body) == status


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_are_no_request_of_a_browser_are_refused(page, case):
    sent, status = RAW[case]
    with closing(connect(page)) as made:
        made.sendall(sent)
        assert read_status(made) in (status, 400 if len(sent) > 50_000 else status)


def test_wrong_values_of_a_question_get_an_answer(page):
    for place, value in enumerate([5, "hot", True, 2**70, None, "yes", "Up", "state"]):
        values = [*ASK]
        values[place] = value
        asker = Asker(page.url)
        assert asker.join(0, values).status_code == 200
        assert list(asker.events())[-1]["msg"] == "process_completed"


def test_requests_without_end_are_ended(page):
    began = time.monotonic()
    with ExitStack() as stack:
        opened = {case: stack.enter_context(closing(connect(page))) for case in ENDLESS}
        for case, (first, _) in ENDLESS.items():
            opened[case].sendall(first)
        while opened and time.monotonic() < began + PATIENCE + SLACK:
            for case, made in [*opened.items()]:
                made.settimeout(0.05)
                try:
                    made.sendall(ENDLESS[case][1])
                    while made.recv(65536):
                        pass
                    del opened[case]
                except TimeoutError:
                    pass
                except ConnectionError:
                    del opened[case]
        assert not opened


def test_idle_sockets_of_an_address_are_limited_and_closed(page):
    before = len(page.said)
    with ExitStack() as stack:
        for _ in range(530):
            stack.enter_context(closing(connect(page)))
        for _ in range(50):
            assert open_page(page, OTHER) == 200
            assert open_page(page, "127.0.0.1") in (0, 503)
        assert len(page.said) - before <= 2, "one line a minute"
        time.sleep(PATIENCE)
        until = time.monotonic() + SLACK
        while open_page(page, "127.0.0.1") != 200:
            assert time.monotonic() < until
            time.sleep(0.2)


@pytest.mark.parametrize("way", ["never come", "leave"])
def test_questions_whose_readers_are_gone_are_dropped(page, way):
    for _ in range(20):
        session = secrets.token_hex(5)
        assert join(page, data=SLOW, session_hash=session) == 200
        if way == "leave":
            with closing(connect(page)) as made:
                made.sendall(f"GET {DATA}?session_hash={session} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
                assert read_status(made) == 200
    wait_until_answered(page, SLACK, "127.0.0.1")


def test_one_address_cannot_fill_the_queue(page):
    with ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=page.url, trust_env=False)) for _ in range(20)]
        for client in clients:
            session = secrets.token_hex(5)
            body = {"data": SHORT, "fn_index": 0, "session_hash": session}
            assert client.post(JOIN, json=body).status_code == 200
            stack.enter_context(client.stream("GET", DATA, params={"session_hash": session}))
        events = ask_as(page, OTHER)
        assert "Answered in" in events
        assert not re.search("Waiting: (?![012] )", events), "at most the current question and the next one are ahead"


def test_a_reader_that_reads_nothing_is_disconnected(page):
    with closing(socket.socket()) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        made.connect(("127.0.0.1", httpx.URL(page.url).port))
        made.settimeout(0.1)
        until = time.monotonic() + PATIENCE + SLACK
        with pytest.raises(ConnectionError):
            while time.monotonic() < until:
                with suppress(TimeoutError):
                    made.sendall(HEAD + b"\r\n")
                time.sleep(0.1)


def test_the_sessions_of_an_address_are_limited(page):
    with ExitStack() as stack:

        def beat(source="127.0.0.1", headers="") -> int:
            made = stack.enter_context(closing(connect(page, source)))
            path = f"{HEARTBEAT}/{secrets.token_hex(5)}"
            made.sendall(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{headers}\r\n".encode())
            return read_status(made)

        assert [beat() for _ in range(64)] == [200] * 64
        assert [beat(headers=f"x-forwarded-for: 10.0.0.{number}\r\n") for number in range(3)] == [429] * 3
        assert join(page) == 429
        assert is_answered(page)
        forwarded = [beat(PROXY, f"x-forwarded-for: 10.0.{number // 250}.{number % 250}\r\n") for number in range(70)]
        assert forwarded == [200] * 70, "a trusted proxy forwards many addresses"
        same = Counter(beat(PROXY, "x-forwarded-for: 1.1.1.1, 10.9.9.9\r\n") for _ in range(66))
        assert same == {200: 64, 429: 2}, "the last address counts, because the proxy itself added it"


def test_a_session_that_reads_nothing_is_refused(page):
    session, function = secrets.token_hex(5), Asker(page.url).find_function("anew")
    statuses = [join(page, data=[None], fn_index=function, session_hash=session) for _ in range(20)]
    assert statuses == [200] * 16 + [429] * 4


@pytest.mark.slow
@pytest.mark.alone  # a process's resident memory depends on the other work of the machine
def test_memory_stays_as_it_is_under_10_000_hostile_requests(page):
    process, kinds = psutil.Process(page.process.pid), [*BODIES.values()]
    routes = [*ROUTES.values()]
    client = httpx.Client(base_url=page.url, trust_env=False, timeout=SLACK, limits=httpx.Limits(max_connections=8))

    def attack(number: int) -> None:
        for turn in range(number):
            if turn % 4 == 0:
                method, path, body, _ = routes[turn // 4 % len(routes)]
                client.request(method, path, content=body)
                continue
            changes = kinds[turn % len(kinds)] if turn % 4 == 1 else {}
            if turn % 4 == 2:  # valid, but its events are never read
                changes = {"data": [], "fn_index": function}
            body = {"data": ASK, "fn_index": 0, "session_hash": secrets.token_hex(5)} | changes
            body = {key: value for key, value in body.items() if value is not MISSING}
            client.post(JOIN, content=json.dumps(body), headers={"content-type": "application/json"})

    config = Asker(page.url).config["dependencies"]
    function = next(entry["id"] for entry in config if not entry["inputs"])
    attack(2000)
    before = process.memory_info().rss
    attack(10_000)
    assert process.memory_info().rss < before + 2**24
    wait_until_answered(page, SLACK)
