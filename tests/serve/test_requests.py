"""The page's server under hostile input, passwords and many users at once; it keeps answering."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import psutil
import pytest
from asking import SETTINGS, Asker, read_text
from conftest import ROOT
from served import AILING, make_run, serve

from dpokit.report.votes import read_votes
from dpokit.rundir import RunDir
from dpokit.serve.votes import append_vote

pytestmark = pytest.mark.slow
pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"), tiny_gpt2, use_peft=True)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A proxy in place of all other servers: its URL, and the paths that were requested from it."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"huge")

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


@pytest.fixture(scope="module")
def served(run, elsewhere):
    arguments = (str(run.path), "--use_cpu", "--per-minute", "100000", "--max-prompt-characters", "400")
    with serve(*arguments, HTTP_PROXY=elsewhere[0], http_proxy=elsewhere[0]) as made:
        wait_until_ready(made.url)
        yield made


def wait_until_ready(url) -> None:
    asker = Asker(url)
    for _ in range(200):
        asker = Asker(url)
        if "Answered in" in read_text(asker.ask("Are you there?")):
            return
        time.sleep(0.2)
    raise AssertionError("no answer")


def is_answered(url) -> bool:
    return "Answered in" in read_text(Asker(url).ask("How do I bake bread?"))


HOSTILE = [
    "",
    " ",
    "\x00",
    "\x1b[31m",
    "x" * 401,
    "x" * 200_000,
    "\ud800",
    "\u202e" * 50,
    None,
    5,
    1e400,
    True,
    [],
    ["a"] * 100,
    {},
    {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    {"path": "http://huggingface.co/huge.bin", "meta": {"_type": "gradio.FileData"}},
    {"__type__": "update", "value": "x"},
    "{{7*7}} ${7*7} <script>alert(1)</script>",
    "../../../../etc/passwd",
    "'; DROP TABLE votes; --",
]


@pytest.mark.parametrize("place", range(7))
def test_hostile_input_always_gets_a_message(served, elsewhere, place):
    for value in HOSTILE:
        values = ["How do I bake bread?", *SETTINGS, False, "Right"]
        values[place] = value
        events = Asker(served.url).ask(values[0], settings=values[1:5], blind=values[5], goes_on=values[6])
        assert events, value
        assert events[-1]["msg"] in ("process_completed", "refused"), (value, events[-1])
        assert "Traceback" not in read_text(events)
        assert "root:" not in read_text(events)
    assert elsewhere[1] == [], "the server fetches no address"
    assert is_answered(served.url)


@pytest.mark.parametrize("function", [None, -1, 10_000, "ask", [], 2**70])
def test_an_unknown_function_is_refused(served, function):
    asker = Asker(served.url)
    assert asker.join(function, []).status_code in (200, 400, 404, 422, 500)
    assert is_answered(served.url)


def test_an_invalid_body_is_refused(served):
    client = httpx.Client(base_url=served.url, trust_env=False)
    bodies = [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"data":', b"a" * 300_000, b"[" * 100_000]
    for body in bodies:
        answer = client.post("/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, body[:20]
    assert is_answered(served.url)


def test_no_file_can_be_read_or_uploaded(served, run):
    client = httpx.Client(base_url=served.url, trust_env=False)
    secret = run.run_json
    paths = [f"/gradio_api/file={secret}", f"/file={secret}", f"/gradio_api/file={ROOT}/pyproject.toml"]
    paths += [f"/assets/../../../..{secret}", f"/static/..%2f..%2f..{secret}", f"/gradio_api/file/{secret}"]
    paths += [f"/assets/{secret}", f"/assets//{secret}", "/gradio_api/file=", "/gradio_api/proxy=http://127.0.0.1/"]
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert "generations" not in answer.text
    upload = client.post("/gradio_api/upload", files={"files": ("a.txt", b"text")})
    assert upload.status_code == 404


def test_the_page_uses_no_other_address(served):
    page = httpx.get(served.url, trust_env=False)
    policy = page.headers["content-security-policy"]
    assert "http:" not in policy and "https:" not in policy and "*" not in policy
    assert page.headers["x-frame-options"] == "DENY"
    assert httpx.get(served.url, trust_env=False, headers={"host": "evil.example"}).status_code == 421


def test_a_vote_on_two_answers_is_stored_once(served, run):
    asker = Asker(served.url)
    before = len(read_votes(run.votes_jsonl))
    counted = f"votes: {before + 1},"
    assert "nothing to vote on" in read_text(asker.press("vote-left", None))
    forged = {"exchange": {"job": {"state": "done"}}}
    assert asker.join(asker.find_function("vote-left"), [forged]).status_code == 400
    asker.ask("How do I bake bread?", blind=True)
    text = read_text(asker.press("vote-left", None))
    assert "your vote is kept" in text
    assert counted in text
    assert "nothing to vote on" in read_text(asker.press("vote-right", None))
    votes = read_votes(run.votes_jsonl)
    assert len(votes) == before + 1
    append_vote(run.votes_jsonl, votes[-1] | {"models": {"base": "another", "tuned": "mine"}})
    asker.ask("How do I bake bread?")
    assert f"votes: {before + 2}," in read_text(asker.press("vote-tie", None))
    assert votes[-1]["blind"] is True
    assert votes[-1]["prompt"] == [{"role": "user", "content": "How do I bake bread?"}]
    assert votes[-1]["vote"] == votes[-1]["left"]
    assert votes[-1]["run"] == json.loads(run.run_json.read_text())["generations"][0]["token"]


def test_a_blind_vote_hides_names_and_rewards(served, run):
    asker = Asker(served.url)
    text = read_text(asker.ask("How do I bake bread?", blind=True))
    assert "implicit reward" not in text
    assert str(run.adapter) not in text
    assert "implicit reward" in read_text(asker.press("vote-tie", None))
    assert "implicit reward" in read_text(asker.ask("How do I bake bread?"))


def test_an_equal_question_and_seed_have_equal_answers(served):
    answers = {json.dumps(Asker(served.url).ask("Why is it so?")[-1]["output"]["data"][3:5]) for _ in range(3)}
    assert len(answers) == 1


@pytest.mark.alone  # the number of answers and the memory depend on the machine's other work
def test_many_users_are_answered_or_refused_as_busy(served):
    outcomes: list[str] = []
    process = psutil.Process(served.process.pid)

    def use(until: float) -> None:
        while time.monotonic() < until:
            text = read_text(Asker(served.url).ask("How do I bake bread?"))
            outcomes.append("answered" if "Answered in" in text else "busy" if "The server is busy" in text else text)

    def use_together(seconds: float) -> None:
        users = [threading.Thread(target=use, args=(time.monotonic() + seconds,)) for _ in range(20)]
        for user in users:
            user.start()
        for user in users:
            user.join()

    use_together(5)
    before = process.memory_info().rss
    use_together(10)
    assert set(outcomes) <= {"answered", "busy"}
    assert outcomes.count("answered") > 10
    assert process.memory_info().rss < before + 2**26


def test_a_page_for_other_machines_checks_the_password(run):
    arguments = (str(run.path), "--use_cpu", "--host", "0.0.0.0", "--auth", "ann")
    with serve(*arguments, DPOKIT_SERVE_PASSWORD="s3cret") as made:
        url = made.url.replace("0.0.0.0", "127.0.0.1")
        for auth in (None, ("ann", "wrong"), ("bob", "s3cret")):
            for path in ("/", "/config", "/gradio_api/queue/data", "/assets/x.js"):
                assert httpx.get(url + path, auth=auth, trust_env=False).status_code == 401
        assert "Answered in" in read_text(Asker(url, auth=("ann", "s3cret")).ask("Why?"))
    assert not any("s3cret" in line for line in made.said)


def test_a_page_shows_why_its_model_failed_to_load(run, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text(run.run_json.read_text())
    (broken / "adapter").mkdir()
    for file in run.adapter.iterdir():
        (broken / "adapter" / file.name).write_bytes(file.read_bytes()[: 200 if "safetensors" in file.name else None])
    with serve(str(broken), "--use_cpu") as made:
        for _ in range(300):
            text = read_text(Asker(made.url).ask("Why?"))
            if "could not be loaded" in text:
                break
            time.sleep(0.1)
        assert "could not be loaded" in text
        assert httpx.get(made.url, trust_env=False).status_code == 200
        assert made.process.poll() is None


def test_a_page_answers_after_out_of_memory(run):
    # Each question has two answers: the third one belongs to the second question.
    with serve(str(run.path), "--use_cpu", program=AILING, AILING_ANSWER="3") as made:
        asker = Asker(made.url)
        assert "Answered in" in read_text(asker.ask("Why?"))
        text = read_text(asker.ask("So?"))
        assert "The model ran out of memory" in text
        assert "Traceback" not in text
        assert "Answered in" in read_text(asker.ask("And?"))


def test_the_status_shows_waiting_answering_and_answered(run):
    with serve(str(run.path), "--use_cpu", program=AILING, AILING_SECONDS="0.2") as made:
        wait_until_ready(made.url)
        first, second = Asker(made.url), Asker(made.url)
        first.join(first.find_function("ask"), ["Why?", *SETTINGS, False, "Right", None]).raise_for_status()
        stream = first.events()  # kept open: a closed stream means a closed page
        assert any("Answering ..." in read_text([event]) for event in stream)
        texts = [read_text([event]) for event in second.ask("So?")]
        assert "Answered in" in read_text(list(stream))
        waits, answering, answered = (
            [place for place, text in enumerate(texts) if phrase in text]
            for phrase in ("Waiting: 1 question before yours", "Answering ...", "Answered in")
        )
        grows = [place for place, text in enumerate(texts) if " tokens" in text]
        assert waits[0] < answering[0] <= grows[0] < answered[0]
        assert waits[-1] < answering[0]


def test_a_signal_ends_the_server_without_a_traceback(run):
    with serve(str(run.path), "--use_cpu") as made:
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait(timeout=120) in (0, -signal.SIGINT, 130)
    assert not any("Traceback" in line for line in made.said)
