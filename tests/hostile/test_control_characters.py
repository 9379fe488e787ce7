"""Untrusted names, texts and messages cannot move a terminal's cursor, change its colours or reverse its lines."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from run_folders import make_run, make_steps
from typer.testing import CliRunner

from dpokit.console import say
from dpokit.errors import DataError
from dpokit.safe_console import SafeConsole
from dpokit.serve.chat import free_and_describe, print_answers
from dpokit.serve.failures import log_failure
from dpokit.terminal import CONTROLS, echo, escape_controls, one_line
from dpokit.verbs.app import app

SEQUENCES = {
    "a colour": "\x1b[31m",
    "a cleared screen": "\x1b[2J\x1b[H",
    "a title": "\x1b]0;own\x07",
    "a link": "\x1b]8;;https://own\x1b\\",
    "a clipboard": "\x1b]52;c;b3du\x07",
    "a colour in one character": "\x9b31m",
    "a line written over": "\rdone",
    "letters taken back": "abc\b\b\b",
    "a delete": "\x7f",
    "a zero": "\x00",
    "a line": "\n  do this:   run own",
    "a page": "\f\v",
    "a line of another kind": "\u2028own\u2029\x85",
    "a turned direction": "\u202eown\u202c",
    "an isolated direction": "\u2066own\u2069",
    "half a character": "\ud800",
    "letters that nobody sees": "\U000e0041\ufeff",
}
HONEST = "été 你好 שלום \U0001f469\u200d\U0001f4bb e\u0301 a\u00adb"


def find_raw(text: str) -> list[str]:
    return [letter for letter in text if letter not in "\n\t" and CONTROLS.match(letter)]


@pytest.mark.parametrize("case", SEQUENCES)
def test_a_control_sequence_is_shown_as_an_escape(case):
    shown = one_line(SEQUENCES[case])
    assert shown.isprintable()
    assert one_line(shown) == shown


def test_ordinary_text_is_not_changed():
    assert escape_controls(HONEST) == HONEST


@pytest.mark.parametrize("case", SEQUENCES)
def test_a_message_always_has_three_lines(case):
    error = DataError(f"{SEQUENCES[case]} is broken", expected="a file", do=f"look at {SEQUENCES[case]}")
    assert not find_raw(str(error))
    assert len(str(error).split("\n")) == 3


def write_say(text: str) -> None:
    say(text)


def write_console(text: str) -> None:
    SafeConsole(stderr=True, markup=False).print(text)


def write_failure(text: str) -> None:
    log_failure(ValueError(text))


def write_chat_failure(text: str) -> None:
    print(free_and_describe(ValueError(text)))


def write_answers(text: str) -> None:
    answer = {"text": text, "tokens": 1, "ended": True, "model": text, "reward": None}
    print_answers({"answers": {"base": answer, "tuned": answer}}, sys.stdout)


@pytest.mark.parametrize("case", SEQUENCES)
@pytest.mark.parametrize("write", [write_say, echo, write_console, write_failure, write_chat_failure, write_answers])
def test_every_way_to_the_screen_escapes(write, case, capsys):
    write(f"own {SEQUENCES[case]} text")
    shown = capsys.readouterr()
    assert "own" in shown.out + shown.err
    assert not find_raw(shown.out + shown.err)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A stranger's run folder, with every sequence in its name and in each of its records."""
    bad = "own" + "".join(text for case, text in SEQUENCES.items() if case != "half a character")
    name = bad.replace("/", "").replace("\x00", "")
    folder = make_run(tmp_path_factory.mktemp("runs") / name, make_steps(6, every=1))
    record = json.loads((folder / "run.json").read_text())

    def plant(value: object) -> object:
        if isinstance(value, dict):
            return {key: plant(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plant(each) for each in value]
        return f"{value}{bad}" if isinstance(value, str) else value

    kept = ("state", "kind", "started", "generations", "format", "origin")
    record = {key: value if key in kept else plant(value) for key, value in record.items()}
    record |= {"state": "failed", "why": bad, "alarms": [{"step": 3, "text": bad}], "findings": [bad]}
    (folder / "run.json").write_text(json.dumps(record))
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir(exist_ok=True)
    manifest = {"format": 1, "step": 4, "files": {bad: {"size": 1, "sha256": bad}}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    samples = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each | {bad: 1.0}) + "\n" for each in samples))
    return folder


VERBS = {
    "init": [],
    "data check": [],
    "status": [],
    "verify": [],
    "report": [],
    "card": ["--license", "mit"],
    "merge": ["--no-proof"],
    "push": ["--repo-id", "own/name", "--dry-run"],
    "evaluate": ["--max_eval_samples", "1"],
    "chat": ["--prompt", "Hi"],
    "sweep": [],
    "plan": [],
    "prepare": [],
    "submit": ["--dry-run"],
    "train": [],
    "serve": ["--port", "0"],
}


def test_every_verb_is_tried():
    """A new verb needs a line in VERBS."""
    from typer.main import get_command

    assert set(get_command(app).commands) - {"env"} == {verb.split()[0] for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_prints_a_control_sequence_of_a_run(verb, planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / planted.name
    shutil.copytree(planted, run)
    outcome = CliRunner().invoke(app, [*verb.split(), str(run), *VERBS[verb]])
    shown = outcome.stdout + outcome.stderr
    assert shown.strip()
    assert not find_raw(shown)
    assert "\n  do this:   run own" not in shown
    for page in [*run.glob("*.html"), *run.glob("README.md")]:
        assert not find_raw(page.read_text(errors="surrogatepass"))
