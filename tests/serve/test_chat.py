"""`dpokit chat`: one question for scripts, a conversation for users, both sides next to each other."""

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
from dpokit.serve.request_limits import RequestLimits, SamplingSettings

SAMPLING = SamplingSettings(temperature=1.0, max_new_tokens=24, seed=2)


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("run"), tiny_gpt2, use_peft=True, learning_rate=0.5)


@pytest.fixture(scope="module")
def models(run) -> LocalModels:
    loaded = LocalModels(str(run.path), None)
    loaded.load()
    return loaded


def chat(models, *lines: str) -> str:
    screen = io.StringIO()
    talk(
        models,
        SAMPLING,
        limits=RequestLimits(),
        lines=io.StringIO("".join(f"{line}\n" for line in lines)),
        screen=screen,
    )
    return screen.getvalue()


def test_a_prompt_gives_both_answers_as_one_json_object(run, tiny_gpt2):
    arguments = ["chat", str(run.path), "--prompt", "Why?", "--max-new-tokens", "8", "--seed", "2", "--json"]
    done = dpokit(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["messages"] == [{"role": "user", "content": "Why?"}]
    assert result["sampling"] == {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 8, "seed": 2}
    assert result["answers"]["base"]["model"] == str(tiny_gpt2)
    assert result["answers"]["tuned"]["model"] == str(run.adapter)
    for answer in result["answers"].values():
        assert 0 < answer["tokens"] <= 8
        assert isinstance(answer["reward"], float)


def test_an_sft_run_has_no_rewards(tiny_gpt2, tmp_path):
    run = make_run(tmp_path, tiny_gpt2, kind="sft")
    done = dpokit("chat", str(run.path), "--prompt", "Why?", "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    assert {side: answer["reward"] for side, answer in answers.items()} == {"base": None, "tuned": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder", "--prompt", "Why?"], "/no/such/folder"),
        ([], "no run or model is named"),
        (["RUN", "--prompt", ""], "The question is empty"),
        (["RUN", "--prompt", "Why?", "--bta", "3"], "there is no setting 'bta'"),
        (["RUN", "--prompt", "word " * 300], "room for"),
    ],
)
def test_a_user_error_prints_one_message_with_exit_code_2(run, arguments, message):
    done = dpokit("chat", *(str(run.path) if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("do this:") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_conversation_ends_with_its_command_or_the_input(models):
    shown = chat(models, "Why?", "", "So?", "/new", "Why?", "/end", "never asked")
    assert shown.count("tuned:") == shown.count("base:") == 3
    answers = shown.split("\n> ")
    assert answers[1] == answers[5], "the same question in a new conversation has the same answers"
    assert chat(models, "Why?").count("tuned:") == 1, "the end of the input ends the chat"


def test_an_invalid_utf8_line_is_refused_and_the_next_answered(run):
    command = [sys.executable, "-m", "dpokit.cli", "chat", str(run.path), "--max-new-tokens", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"caf\xe9\nWhy?\n", capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "lone surrogates" in done.stdout.decode()
    assert done.stdout.count(b"tuned:") == 1


def test_a_single_model_offers_no_choice_of_sides(models, tiny_gpt2):
    alone = LocalModels(str(tiny_gpt2), None)
    assert "/base" not in chat(alone, "/help")
    assert "/base or /tuned" in chat(models, "/help")


def test_a_conversation_follows_the_chosen_side(models):
    after_tuned, after_base = (chat(models, f"/{side}", "Why?", "So?").split("\n> ")[3] for side in ("tuned", "base"))
    assert after_tuned != after_base


def test_a_chat_continues_after_a_bad_command_or_a_refusal(models):
    shown = chat(models, "/help", "word " * 300, "Why?")
    assert shown.count("/new starts a new conversation") == 2
    assert "room for" in shown
    assert shown.count("tuned:") == 1


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "ran out of memory"),
        (RuntimeError("shapes cannot be multiplied"), r"failed (RuntimeError). shapes cannot be multiplied"),
    ],
)
def test_a_failed_answer_does_not_change_the_conversation(models, monkeypatch, failure, message):
    answer, questions = models.answer, []

    def fail_once(side, messages, *arguments, **options):
        questions.append(messages[-1]["content"])
        if questions[-1] == "So?":
            raise failure
        return answer(side, messages, *arguments, **options)

    monkeypatch.setattr(models, "answer", fail_once)
    shown = chat(models, "Why?", "So?", "And?")
    assert message in shown
    assert shown.count("tuned:") == 2
    assert questions == ["Why?", "Why?", "So?", "And?", "And?"]


def test_a_failed_prompt_prints_a_sentence_with_exit_code_1(run):
    program = [sys.executable, *AILING]
    arguments = ["chat", str(run.path), "--prompt", "Why?", "--use_cpu"]
    environment = os.environ | {"AILING_ANSWER": "2", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert "The model ran out of memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_unknown_number_of_tokens_is_not_shown():
    answer = {"model": "mine", "text": "Because.", "tokens": 0, "ended": True, "reward": None}
    screen = io.StringIO()
    print_answers({"answers": {"tuned": answer}}, screen)
    assert "(ended by the model)" in screen.getvalue()


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_answers_fit_the_terminal_without_control_characters(columns, monkeypatch):
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
