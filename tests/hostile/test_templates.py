"""Untrusted chat templates: Jinja programs that run endlessly, fail, or try to leave their sandbox."""

import json
import time

import pytest

from dpokit.data import template_box
from dpokit.data.prepare import prepare_data
from dpokit.data.rendering import Renderer
from dpokit.errors import DataError, ModelError
from dpokit.settings.flags import DataArguments

ROUNDS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc")
LOOP = ROUNDS + "{% endfor %}" * 3
# A template, and a part of the message.
TEMPLATES = {
    "loops without end": (LOOP, "takes more than 3 s"),
    "a loop without end for one kind of turn": (
        "{% if messages[0].role == 'system' %}" + LOOP + "{% endif %}x",
        "takes more",
    ),
    "a loop over a text without end": ("{% for a in 'x' * 999999999999 %}{% endfor %}", "takes more than 1 GiB"),
    "gigabytes at once": ("{{ 'x' * 4000000000 }}", "takes more than 1 GiB"),
    "gigabytes by parts": ("{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "takes more than 1 GiB"),
    "gigabytes by a filter": ("{{ 'x'|center(4000000000) }}", "takes more than 1 GiB"),
    "gigabytes by a format": ("{{ '%4000000000d' % 1 }}", "takes more than 1 GiB"),
    "a long text": ("{{ 'x' * 1000000 }}", "makes a text of 1,000,000 characters"),
    "doubled again and again": (
        "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
        "takes more than",  # 1 GiB, or 3 s where copying is slow
    ),
    "a macro that calls itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "a recursive loop": ("{% for x in [messages] recursive %}{{ loop([messages]) }}{% endfor %}", "RecursionError"),
    "a class of Python's": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "a function's globals": ("{{ raise_exception.__globals__ }}", "leaves out the assistant's answer"),
    "a class by a filter": ("{{ (''|attr('__class__')).x }}", "cannot be rendered: "),
    "a list that is changed": ("{{ messages.append(1) }}", "SecurityError"),
    "an import": ("{% import 'os' as os %}{{ os.system('true') }}", "cannot be rendered: "),
    "an include": ("{% include '/etc/passwd' %}", "cannot be rendered: "),
    "a base": ("{% extends '/etc/passwd' %}", "cannot be rendered: "),
    "a tag that is none": ("{% own %}", "TemplateSyntaxError"),
    "half a tag": ("{% if", "TemplateSyntaxError"),
    "a filter that is none": ("{{ messages|own }}", "cannot be rendered: "),
    "a name that is none": ("{{ own.x.y }}", "UndefinedError"),
    "a division by nothing": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "a range without end": ("{% for a in range(999999999999) %}{% endfor %}", "OverflowError"),
    "a refusal of every question": ("{{ raise_exception('no') }}", "no"),
    "types that do not add": ("{{ 'x' + 1 }}", "TypeError"),
    "an answer that is left out": ("{{ messages[0].content }}", "leaves out the assistant's answer"),
}
MOST_SECONDS = 25.0


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_hostile_template_is_one_message(case, chat_tokenizer, monkeypatch):
    template, message = TEMPLATES[case]
    monkeypatch.setattr(chat_tokenizer, "chat_template", template)
    began = time.monotonic()
    with pytest.raises(ModelError) as refusal:
        Renderer(chat_tokenizer)
    assert message in str(refusal.value)
    assert "the chat template" in refusal.value.seen
    assert time.monotonic() - began < MOST_SECONDS


# Templates that are harmless until a conversation has a certain word.
TRIGGERED = {
    "loops without end": (LOOP, "takes more than 1 s for one conversation"),
    "a long text": ("{{ 'x' * 2000000 }}", "makes a text of 2,0"),
}


@pytest.mark.parametrize("case", TRIGGERED)
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_template_that_waits_for_a_word_is_one_message(case, streaming, chat_tokenizer, monkeypatch, tmp_path):
    harm, message = TRIGGERED[case]
    monkeypatch.setattr(template_box, "CONVERSATION_SECONDS", 1.0)
    trigger = "{% if 'wait' in messages[0].content %}" + harm + "{% endif %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", trigger + chat_tokenizer.chat_template)
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("go", "wait", "go")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArguments(dataset_name=str(tmp_path / "pairs.jsonl"), dataset_streaming=streaming)
    began = time.monotonic()
    with pytest.raises((ModelError, DataError), match=message):
        list(prepare_data(data, chat_tokenizer, max_length=None, with_eval=False).train)
    assert time.monotonic() - began < MOST_SECONDS


def test_an_honest_template_renders(chat_tokenizer):
    assert Renderer(chat_tokenizer).end == "<|im_end|>"


def test_a_template_may_refuse_a_system_turn(chat_tokenizer, monkeypatch):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    monkeypatch.setattr(chat_tokenizer, "chat_template", strict + chat_tokenizer.chat_template)
    assert Renderer(chat_tokenizer).end == "<|im_end|>"


def test_a_child_process_that_hangs_is_no_error(chat_tokenizer, monkeypatch):
    """The child may wait for a lock that this process held at the fork, which is not the template's fault."""
    monkeypatch.setattr(template_box, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(type(chat_tokenizer), "apply_chat_template", lambda *_, **__: time.sleep(60))
    template_box.check_template(chat_tokenizer)
