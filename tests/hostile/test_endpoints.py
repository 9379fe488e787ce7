"""Hostile chat-completions endpoints (wrong, endless or expanding replies), and honest ones with unusual replies."""

import gzip
import json
import re
import time
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import chain, repeat

import brotli
import httpx
import pytest
from raw_server import Reply, chunk, forever, head, pack_zeros, serve, slowly

from dpokit import bounded_http
from dpokit.apikey import ApiKey
from dpokit.errors import JudgeError
from dpokit.evaluate import endpoint
from dpokit.evaluate.endpoint import Endpoint
from dpokit.serve import remote
from dpokit.serve.remote import RemoteModels
from dpokit.serve.request_limits import RefusedError, SamplingSettings

SECRET = "sk-0123456789"
KEY = ApiKey("KEY", SECRET)
QUESTION = [{"role": "user", "content": "Why?"}]
# Only Python's str.splitlines takes these characters for line ends; a JSON string may hold them unescaped.
TEXT = "Z\u00fcrich \u2028 \u0085 \U0001f600"
MOST_SECONDS = 120.0  # for any case
MOST_BYTES = 64 * 2**20  # of memory that any case uses
MOST_SENT = 64 * 2**20  # bytes that the client accepts in any case
MOST_LETTERS = 1_000  # in a message
TRIES = 2


def ask_judge(url: str, seconds: float) -> str:
    with Endpoint(url, api_key=KEY, timeout_seconds=seconds, first_wait_seconds=0.0) as judge:
        reply = judge.ask({"model": "judge"})
    assert reply is not None
    if reply.refused:
        raise RefusedError(reply.text)
    return reply.text


def ask_model(url: str, seconds: float) -> str:
    remote.ANSWER_SECONDS = seconds
    models = RemoteModels(url, tuned="mine", base=None, api_key=KEY)
    return models.answer("tuned", QUESTION, SamplingSettings(), on_text=lambda _: None, is_stopped=lambda: False).text


def complete(content: object = TEXT, tokens: object = 7) -> str:
    body = {"choices": [{"message": {"content": content}}], "usage": {"total_tokens": tokens}}
    return json.dumps(body, ensure_ascii=False)


def event(content: object = None, finish: str | None = None, **more: object) -> str:
    choices = [{"index": 0, "delta": {} if content is None else {"content": content}, "finish_reason": finish}]
    return json.dumps({"choices": choices, **more}, ensure_ascii=False)


def stream(*events: str, field: str = "data: ", end: str = "\n") -> bytes:
    return "".join(f"{field}{text}{end}{end}" for text in events).encode()


EVENTS = (event(TEXT[:3]), event(TEXT[3:]), event(None, "stop"), "[DONE]")
CLIENTS = {"judge": (ask_judge, complete().encode()), "model": (ask_model, stream(*EVENTS))}


def says(body: bytes, *lines: str, status: str = "200 OK") -> Reply:
    return [head(f"Content-Length: {len(body)}", *lines, status=status), body]


def chunked(pieces: Reply, *lines: str) -> Reply:
    return chain([head("Transfer-Encoding: chunked", *lines)], map(chunk, pieces))


# Ways in which an honest server may send a body.
HONEST: dict[str, Callable[[bytes], Reply]] = {
    "a length": says,
    "no length": lambda body: [head(), body],
    "one chunk": lambda body: [*chunked([body]), b"0\r\n\r\n"],
    "a chunk for each byte": lambda body: [*chunked(bytes([byte]) for byte in body), b"0\r\n\r\n"],
    "a packet for each byte": lambda body: (bytes([byte]) for byte in head() + body),
    "chunks with extensions and trailers": lambda body: [
        head("Transfer-Encoding: chunked"),
        b"%x;name=value\r\n%s\r\n0\r\nX-More: 1\r\n\r\n" % (len(body), body),
    ],
    "early hints before it": lambda body: [head(status="103 Early Hints"), head(status="100 Go on"), *says(body)],
    "no content type": lambda body: says(body),
    "a content type of pages": lambda body: says(body, "Content-Type: text/html"),
    "a charset that it does not have": lambda body: says(body, "Content-Type: text/event-stream; charset=latin-1"),
    "50 KB of headers": lambda body: says(body, *[f"X-{i}: {'x' * 1000}" for i in range(50)]),
    "gzip without a request for it": lambda body: says(gzip.compress(body), "Content-Encoding: gzip"),
    "deflate without a request for it": lambda body: says(zlib.compress(body), "Content-Encoding: deflate"),
    "gzip by its old name": lambda body: [*chunked([gzip.compress(body)], "Content-Encoding: x-gzip"), b"0\r\n\r\n"],
    "the encoding that is none": lambda body: says(body, "Content-Encoding: identity"),
}

GZIP_HEAD, ZLIB_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", b"\x78\xda"
GZIP, DEFLATE = pack_zeros(1024, GZIP_HEAD), pack_zeros(1024, ZLIB_HEAD)  # 1 GiB from 1 MB
NESTED = gzip.compress(GZIP)
BROTLI = brotli.compress(bytes(2**24), quality=1)
EMPTY_BLOCK = b"\x00\x00\x00\xff\xff"  # a deflate block without data, which a stream may repeat
TOO_MUCH, TOO_LATE, BROKEN = "sends more than", r"gave no (whole )?reply within", "broke off"
PACKED, ELSE = "it compresses its reply", "as chat/completions do"

# Hostile replies, and a part of the message for each.
HOSTILE: dict[str, tuple[Callable[[], Reply], str]] = {
    "a line without end": (lambda: chain([head()], forever(b"x")), TOO_MUCH),
    "a data line without end": (lambda: chain([head(), b"data: "], forever(b"x")), TOO_MUCH),
    "a JSON string without end": (lambda: chain([head(), b'{"choices": "'], forever(b"x")), TOO_MUCH),
    "lines without end": (lambda: chain([head()], forever(b"\n")), TOO_MUCH),
    "comments without end": (lambda: chain([head()], forever(b": ping\n\n")), TOO_MUCH),
    "events without end": (lambda: chain([head()], forever(b"data: {}\n\n")), TOO_MUCH),
    "an event of lines without end": (lambda: chain([head()], forever(b"data: x\n")), TOO_MUCH),
    "chunks without end": (lambda: chunked(forever(b"x")), TOO_MUCH),
    "a petabyte": (lambda: chain([head(f"Content-Length: {10**15}")], forever(b"x")), TOO_MUCH),
    "a chunk size without end": (lambda: chain([head("Transfer-Encoding: chunked")], forever(b"1")), BROKEN),
    "trailers without end": (
        lambda: chain([head("Transfer-Encoding: chunked"), b"0\r\n"], forever(b"X: x\r\n")),
        BROKEN,
    ),
    "a status line without end": (lambda: chain([b"HTTP/1.1 200 "], forever(b"x")), BROKEN),
    "a header without end": (lambda: chain([head()[:-2], b"X: "], forever(b"x")), BROKEN),
    "headers without end": (lambda: chain([head()[:-2]], forever(b"X: x\r\n")), BROKEN),
    "hints without end": (lambda: forever(head(status="103 Early Hints")), TOO_LATE),
    "a status line that drips": (lambda: slowly(chain([b"HTTP/1.1 200 "], repeat(b"x"))), TOO_LATE),
    "headers that drip": (lambda: slowly(chain([head()[:-2]], repeat(b"X: x\r\n"))), TOO_LATE),
    "hints that drip": (lambda: slowly(repeat(head(status="103 Early Hints"))), TOO_LATE),
    "a body that drips": (lambda: slowly(chain([head()], repeat(b" "))), TOO_LATE),
    "comments that drip": (lambda: slowly(chain([head()], repeat(b": ping\n\n"))), TOO_LATE),
    "a chunk size that drips": (lambda: slowly(chain([head("Transfer-Encoding: chunked")], repeat(b"0"))), TOO_LATE),
    "silence": (lambda: repeat(None), TOO_LATE),
    "silence after the head": (lambda: chain([head("Content-Length: 9")], repeat(None)), TOO_LATE),
    "gzip that drips and holds nothing": (
        lambda: slowly(chain([head("Content-Encoding: gzip"), GZIP_HEAD], repeat(EMPTY_BLOCK))),
        TOO_LATE,
    ),
    "gzip without end that holds nothing": (
        lambda: chain([head("Content-Encoding: gzip"), GZIP_HEAD], forever(EMPTY_BLOCK)),
        TOO_MUCH,
    ),
    "a bomb of gzip": (lambda: says(GZIP, "Content-Encoding: gzip"), TOO_MUCH),
    "a bomb of deflate": (lambda: says(DEFLATE, "Content-Encoding: deflate"), TOO_MUCH),
    "a bomb in a bomb": (lambda: says(NESTED, "Content-Encoding: gzip, gzip"), PACKED),
    "a bomb in a bomb of two headers": (
        lambda: says(NESTED, "Content-Encoding: gzip", "Content-Encoding: gzip"),
        PACKED,
    ),
    "a hundred encodings": (lambda: says(NESTED, "Content-Encoding: " + ", ".join(["gzip"] * 100)), PACKED),
    "a bomb of brotli": (lambda: says(BROTLI, "Content-Encoding: br"), PACKED),
    "an encoding that is none": (lambda: says(b"x", "Content-Encoding: own"), PACKED),
    "no gzip": (lambda: says(b"{}", "Content-Encoding: gzip"), PACKED),
    "half a gzip": (lambda: says(gzip.compress(b"{}")[:-9], "Content-Encoding: gzip"), PACKED),
    "less than its length": (lambda: [head("Content-Length: 99"), b"{}"], BROKEN),
    "chunks that break off": (lambda: chunked([b"{}"]), BROKEN),
    "a header of no form": (lambda: [head()[:-2], b"x" * 90_000, b"\r\n\r\n"], BROKEN),
    "no reply": (list, BROKEN),
    "no HTTP": (lambda: [b"SSH-2.0-OpenSSH_9.9\r\n"], BROKEN),
    "a page": (lambda: says(b"<html>\n<p>Welcome</p>"), ELSE),
    "an empty body": (lambda: says(b""), ELSE),
    "invalid UTF-8": (lambda: says(b'data: {"choices": "\xff"}\n\n'), ELSE),
    "UTF-16": (lambda: says(complete().encode("utf-16")), ELSE),
}

BIG = ("a line without end", "a data line without end", "an event of lines without end", "a petabyte")
BIG += ("a bomb of gzip", "a bomb of deflate", "a bomb in a bomb", "a hundred encodings", "a bomb of brotli")
BIG += ("a header of no form", "340,000 lists")

DEEP = "[" * 100_000
# JSON texts instead of a completion or an event.
SHAPES = {
    "no JSON": "{torn",
    "two texts": "{} {}",
    "a list": "[]",
    "a text": '"choices"',
    "a number": "1",
    "null": "null",
    "nested 100,000 deep": DEEP,
    "nested 100,000 deep, with an end": DEEP + "]" * 100_000,
    "objects nested 100,000 deep": '{"a":' * 100_000,
    "a number of 100,000 digits": '{"choices": %s}' % ("9" * 100_000),
    "choices of a text": '{"choices": "text"}',
    "choices of a number": '{"choices": 5}',
    "choices of an object": '{"choices": {"0": {}}}',
    "choices of texts": '{"choices": ["text"]}',
    "a choice of null": '{"choices": [null]}',
    "a message of a list": '{"choices": [{"message": [1], "delta": [1]}]}',
    "a message of a text": '{"choices": [{"message": "text", "delta": "text"}]}',
    "340,000 lists": f'{{"choices": [{"[]," * 340_000}[]]}}',
    "no object of an error": '{"detail": "gone"}',
}
CONTENTS = {"a number": 5, "true": True, "a list": ["text"], "an object": {"text": "text"}}
COUNTS = {
    "of no end": "1e999",
    "of 100,000 digits": "9" * 100_000,
    "of 300 digits": "9" * 300,
    "below 0": "-1",
    "of no number": "NaN",
    "of a text": '"many"',
    "of a list": "[7]",
}

# Streams of honest servers that differ from OpenAI's.
STREAMS = {
    "line ends of Windows": stream(*EVENTS, end="\r\n"),
    "line ends of old Macs": stream(*EVENTS, end="\r"),
    "mixed line ends": stream(EVENTS[0], end="\r\n") + stream(EVENTS[1], end="\r") + stream(*EVENTS[2:]),
    "no space": stream(*EVENTS, field="data:"),
    "a byte order mark": b"\xef\xbb\xbf" + stream(*EVENTS),
    "comments": b": ping\n\n:\n" + stream(EVENTS[0]) + b": ping\n\n" + stream(*EVENTS[1:]),
    "other fields": stream(*EVENTS, field="id: 1\nevent: message\nretry: 10\nown\ndata\ndata: "),
    "data of several lines": stream(*(text.replace(", ", ",\ndata: ") for text in EVENTS)),
    "no [DONE]": stream(*EVENTS[:-1]),
    "no [DONE], and no last blank line": stream(*EVENTS[:-1])[:-1],
    "no end of its last line": stream(*EVENTS[:-1])[:-2],
    "more after [DONE]": stream(*EVENTS, "{torn", event("!")),
    "a role first": stream('{"choices": [{"delta": {"role": "assistant", "content": null}}]}', *EVENTS),
    "no choices in some events": stream('{"choices": []}', '{"choices": null}', "{}", *EVENTS),
    "usage of null": stream(*(event(TEXT[at], usage=None) for at in range(len(TEXT))), *EVENTS[2:]),
    "escapes": stream(*(json.dumps(json.loads(text)) for text in EVENTS[:-1]), EVENTS[-1]),
    "a character cut in two by its escapes": stream(
        event(TEXT[:-1]),
        '{"choices": [{"delta": {"content": "\\ud83d"}}]}',
        '{"choices": [{"delta": {"content": "\\ude00"}}]}',
    ),
}

REDIRECTS = (300, 301, 302, 303, 304, 307, 308)
STATUSES = (101, 201, 204, 206, *REDIRECTS, 400, 401, 403, 404, 405, 408, 413, 418, 422, 429, 451, 500, 503, 599, 999)
NO_WORDS = (101, 201, 204, 206, 304)
OWN_WORDS = b"no \x1b[2J\x07 " + SECRET.encode()
WORDS_BOMB = gzip.compress(OWN_WORDS + b" no " * 2**22)
# Head and beginning are one packet, because on a busy machine a second packet may come late.
BODIES: dict[str, Callable[[], Reply]] = {
    "no end": lambda: chain([head() + OWN_WORDS], forever(b" no ")),
    "an end that does not come": lambda: slowly(chain([head() + OWN_WORDS], repeat(b" no "))),
    "a bomb": lambda: [head("Content-Encoding: gzip") + WORDS_BOMB],
}

TLS = httpx.create_ssl_context()


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(httpx, "create_ssl_context", lambda: TLS)
    monkeypatch.setattr(endpoint, "TRIES", TRIES)
    monkeypatch.setattr(remote, "ANSWER_SECONDS", remote.ANSWER_SECONDS)
    monkeypatch.setattr(remote, "MOST_ANSWER_BYTES", 2**21)
    monkeypatch.setattr(bounded_http, "EXCERPT_SECONDS", 1.0)


@pytest.fixture(params=CLIENTS)
def client(request) -> str:
    return request.param


def ask(client: str, reply: Callable[[], Reply], seconds: float = MOST_SECONDS) -> str:
    """The client's result for a reply: an answer, or "refused: " and a message; asserts that all bounds hold."""
    began = time.monotonic()
    with serve(reply) as server:
        try:
            result = CLIENTS[client][0](server.url, seconds)
        except (JudgeError, RefusedError) as refusal:
            result = f"refused: {str(refusal).splitlines()[0]}"
            assert len(result) < MOST_LETTERS
            assert result.isprintable()
            assert SECRET not in result
        assert server.sent < MOST_SENT
    assert time.monotonic() - began < MOST_SECONDS
    return result


def set_status(reply: Reply, status: int) -> Reply:
    pieces = iter(reply)
    return chain([next(pieces).replace(b" 200 OK", b" %d Own" % status)], pieces)


def put(client: str, text: str) -> Reply:
    """A reply with the text as its completion, or as its only event."""
    return says(text.encode() if client == "judge" else stream(text))


@pytest.mark.parametrize("case", HONEST)
def test_an_honest_reply_is_read_however_it_is_sent(case, client):
    assert ask(client, lambda: HONEST[case](CLIENTS[client][1])) == TEXT


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_reply_is_one_message(case, client):
    reply, message = HOSTILE[case]
    result = ask(client, reply, 0.3 if message == TOO_LATE else MOST_SECONDS)
    assert re.match(f"refused: .*{message}", result)


@pytest.mark.parametrize("case", BIG)
def test_a_hostile_reply_takes_little_memory(case, client):
    tracemalloc.start()  # the process's own size would not grow while memory freed by earlier tests is reused
    try:
        reply = HOSTILE[case][0] if case in HOSTILE else lambda: put(client, SHAPES[case])
        assert ask(client, reply).startswith("refused: ")
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", SHAPES)
def test_json_of_another_shape_is_one_message(case, client):
    assert re.match(f"refused: .*{ELSE}", ask(client, lambda: put(client, SHAPES[case])))


@pytest.mark.parametrize("case", CONTENTS)
def test_a_content_that_is_no_text_is_one_message(case, client):
    text = complete(CONTENTS[case]) if client == "judge" else event(CONTENTS[case])
    assert re.match(f"refused: .*{ELSE}", ask(client, lambda: put(client, text)))


@pytest.mark.parametrize("case", COUNTS)
def test_a_count_that_is_none_is_one_message(case, client):
    count = COUNTS[case]
    choice = '{"message": {"content": "A"}, "delta": {"content": "A"}}'
    text = f'{{"choices": [{choice}], "usage": {{"total_tokens": {count}, "completion_tokens": {count}}}}}'
    assert re.match(f"refused: .*{ELSE}", ask(client, lambda: put(client, text)))


def test_surrogates_are_joined_or_replaced(client):
    content = r"\ud83d\ude00 \ude00 \ud83d."
    text = f'{{"choices": [{{"message": {{"content": "{content}"}}, "delta": {{"content": "{content}"}}}}]}}'
    assert ask(client, lambda: put(client, text)) == "\U0001f600 \ufffd \ufffd."


def test_a_byte_order_mark_before_a_completion_is_no_part_of_it():
    assert ask("judge", lambda: says(b"\xef\xbb\xbf" + CLIENTS["judge"][1])) == TEXT


@pytest.mark.parametrize("packets", ["one packet", "a packet for each byte"])
@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_is_read_by_the_standard(case, packets):
    whole = [head() + STREAMS[case]]
    pieces = whole if packets == "one packet" else [bytes([byte]) for byte in whole[0]]
    assert ask("model", lambda: pieces) == TEXT


def test_text_before_a_line_end_is_shown_before_more_comes():
    """Also if the line ends with \\r, which may be the first half of a line end."""
    pieces = chain([head(), stream(event(TEXT), end="\r")], repeat(None))
    with serve(lambda: pieces) as server:
        models, shown = RemoteModels(server.url, tuned="mine", base=None, api_key=KEY), []
        stopped = models.answer(
            "tuned", QUESTION, SamplingSettings(), on_text=shown.append, is_stopped=lambda: bool(shown)
        )
    assert stopped.text == TEXT


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_is_one_message_with_the_servers_words(status, client):
    result = ask(client, lambda: says(OWN_WORDS, status=f"{status} Own"))
    assert result.startswith("refused: ")
    if status not in NO_WORDS:
        assert re.search(rf"{status}:? no \\x1b\[2J\\x07 \*\*\*", result)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("status", [302, 400, 401, 418, 500])
def test_the_message_has_the_start_of_an_endless_refusal(status, body, client):
    result = ask(client, lambda: set_status(BODIES[body](), status))
    assert re.search(rf"{status}:? no \\x1b\[2J\\x07 \*\*\*", result)


@pytest.mark.parametrize("status", REDIRECTS)
def test_a_redirect_is_not_followed_and_the_key_stays(status, client):
    with serve(lambda: says(CLIENTS[client][1])) as other:
        place = f"Location: {other.url}/chat/completions"
        assert re.match(f"refused: .*answers {status}", ask(client, lambda: says(b"", place, status=f"{status} Own")))
    assert other.requests == []


def test_no_request_accepts_a_compressed_reply(client):
    with serve(lambda: says(CLIENTS[client][1])) as server:
        CLIENTS[client][0](server.url, MOST_SECONDS)
    assert b"\r\naccept-encoding: identity\r\n" in server.requests[0].lower()
