"""The whole `dpokit evaluate` command: pairs, answers and a judge, and the files in the run's folder."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_cli import dpokit
from test_pairs import NOTHING, make_run

from dpokit.errors import SettingsError
from dpokit.evaluate.command import Judge, run_evaluation

SECRET = "sk-0123456789"


class AlwaysA(BaseHTTPRequestHandler):
    """A judge that always prefers the first answer."""

    def do_POST(self) -> None:
        assert self.headers["Authorization"] == f"Bearer {SECRET}"
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "A"}}], "usage": {"total_tokens": 7}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.fixture
def url(monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    server = ThreadingHTTPServer(("127.0.0.1", 0), AlwaysA)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("changes", [{}, {"use_peft": True}], ids=["full", "lora"])
def test_the_runs_folder_keeps_pairs_answers_and_judgement(changes, url, tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, **changes)
    flags = ["--limit", "4", "--answers", "3", "--max-new-tokens", "8", "--temperature", "1"]
    done = dpokit("evaluate", str(run.path), *flags, "--judge", url, "--judge-model", "m", "--judge-key", "JUDGE_KEY")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 sampled answers" in done.stdout
    assert "judged by m: 0 won, 3 tied, 0 lost" in done.stdout  # preferring the first answer in both orders is a tie
    (files,) = run.evaluations()
    assert json.loads(files.pairs_json.read_text())["data"]["pairs"] == 4
    answers = [json.loads(line) for line in files.answers_jsonl.read_text().splitlines()]
    assert len(answers) == 3
    assert any(answer["base"]["text"] != answer["tuned"]["text"] for answer in answers)
    assert json.loads(files.judge_json.read_text())["ties"] == 3
    assert not any(SECRET in path.read_text() for path in files.folder.iterdir())


def test_a_judge_without_answers_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no answers are sampled"):
        run_evaluation(str(tmp_path), **NOTHING, limit=None, argv=[], judge=Judge("http://x", "m", "KEY", 1))
