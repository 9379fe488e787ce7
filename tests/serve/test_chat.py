"""The terminal: one question for scripts, a conversation for people, both sides beside each other."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from served import AILING, make_run
from test_cli import dpokit

from dpokit.rundir import RunDir
from dpokit.serve.chat import print_answers, talk
from dpokit.serve.models import LocalModels
from dpokit.serve.request_limits import Limits, Sampling

SAMPLING = Sampling(temperature=1.0, max_new_tokens=24, seed=2)


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"), tiny_gpt2, use_peft=True, learning_rate=0.5)


@pytest.fixture(scope="module")
def models(run) -> LocalModels:
    made = LocalModels(str(run.path), None)
    made.load()
    return made


def say(models, *lines: str) -> str:
    screen = io.StringIO()
    talk(models, SAMPLING, limits=Limits(), lines=io.StringIO("".join(f"{line}\n" for line in lines)), screen=screen)
    return screen.getvalue()


def test_one_prompt_is_answered_by_both_as_one_json_object(run, tiny_gpt2):
    words = ["chat", str(run.path), "--prompt", "Why?", "--max-new-tokens", "8", "--seed", "2", "--json"]
    done = dpokit(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["messages"] == [{"role": "user", "content": "Why?"}]
    assert found["sampling"] == {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 8, "seed": 2}
    assert found["answers"]["base"]["model"] == str(tiny_gpt2)
    assert found["answers"]["tuned"]["model"] == str(run.adapter)
    for answer in found["answers"].values():
        assert 0 < answer["tokens"] <= 8
        assert isinstance(answer["reward"], float)


def test_a_run_on_examples_alone_is_asked_without_rewards(tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, kind="sft")
    done = dpokit("chat", str(run.path), "--prompt", "Why?", "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["answers"]
    assert {side: answer["reward"] for side, answer in found.items()} == {"base": None, "tuned": None}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["/no/such/folder", "--prompt", "Why?"], "/no/such/folder"),
        ([], "nothing to talk to was named"),
        (["RUN", "--prompt", ""], "There is no question"),
        (["RUN", "--prompt", "Why?", "--bta", "3"], "there is no setting 'bta'"),
        (["RUN", "--prompt", "word " * 300], "room for"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(run, words, says):
    done = dpokit("chat", *(str(run.path) if word == "RUN" else word for word in words))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("do this:") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_conversation_goes_on_until_it_is_ended(models):
    shown = say(models, "Why?", "", "So?", "/new", "Why?", "/end", "never asked")
    assert shown.count("tuned:") == shown.count("base:") == 3
    answers = shown.split("\n> ")
    assert answers[1] == answers[5], "the same question to a new conversation has the same answers"
    assert say(models, "Why?").count("tuned:") == 1, "the end of the input ends the talk"


def test_a_line_that_is_no_utf8_is_refused_and_the_next_one_answered(run):
    command = [sys.executable, "-m", "dpokit.cli", "chat", str(run.path), "--max-new-tokens", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"caf\xe9\nWhy?\n", capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "only whole text is taken" in done.stdout.decode()
    assert done.stdout.count(b"tuned:") == 1


def test_a_model_that_stands_alone_offers_no_choice_of_sides(models, tiny_gpt2):
    alone = LocalModels(str(tiny_gpt2), None)
    assert "/base" not in say(alone, "/help")
    assert "/base or /tuned" in say(models, "/help")


def test_the_side_that_a_conversation_goes_on_with_is_chosen(models):
    after_tuned, after_base = (say(models, f"/{side}", "Why?", "So?").split("\n> ")[3] for side in ("tuned", "base"))
    assert after_tuned != after_base


def test_an_unknown_word_shows_the_known_ones_and_a_refusal_ends_nothing(models):
    shown = say(models, "/help", "word " * 300, "Why?")
    assert shown.count("/new begins anew") == 2
    assert "room for" in shown
    assert shown.count("tuned:") == 1


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "ran out of memory"),
        (RuntimeError("shapes cannot be multiplied"), r"failed (RuntimeError). shapes cannot be multiplied"),
    ],
)
def test_a_failure_ends_neither_the_conversation_nor_its_turn(models, monkeypatch, failure, says):
    whole, asked = models.answer, []

    def fail_once(side, messages, *words, **named):
        asked.append(messages[-1]["content"])
        if asked[-1] == "So?":
            raise failure
        return whole(side, messages, *words, **named)

    monkeypatch.setattr(models, "answer", fail_once)
    shown = say(models, "Why?", "So?", "And?")
    assert says in shown
    assert shown.count("tuned:") == 2
    assert asked == ["Why?", "Why?", "So?", "And?", "And?"]


def test_one_prompt_that_fails_is_told_in_words_with_exit_code_1(run):
    program = [sys.executable, *AILING]
    words = ["chat", str(run.path), "--prompt", "Why?", "--use_cpu"]
    environment = os.environ | {"AILING_ANSWER": "2", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*program, *words], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "The model ran out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_tokens_that_nobody_counted_are_not_shown():
    answer = {"model": "mine", "text": "Because.", "tokens": 0, "ended": True, "reward": None}
    screen = io.StringIO()
    print_answers({"answers": {"tuned": answer}}, screen)
    assert "(ended by the model)" in screen.getvalue()


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_answers_fit_the_terminal_and_cannot_move_its_cursor(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    answer = {"text": "\x1b[2J\x07red \x9b31m\nsecond line " + "long" * 60, "tokens": 1234, "ended": False}
    answers = {side: answer | {"model": f"{side}\x1b[0m", "reward": 0.25} for side in ("base", "tuned")}
    screen = io.StringIO()
    print_answers({"answers": answers}, screen)
    shown = screen.getvalue()
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert max(map(len, shown.splitlines())) <= columns
    assert shown.count("+0.250") == 2
    assert ("second line" in shown) or columns == 20
