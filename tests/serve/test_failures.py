"""What a failure leaves behind: nothing of what the models held when they failed."""

import gc
import logging
import weakref

import pytest
from test_question_queue import QUESTION, Desk, Gated, ask, wait

from dpokit.serve import failures
from dpokit.serve.chat import answer_once, describe_here
from dpokit.serve.request_limits import Limits, Sampling


class Held:
    """As a cache of keys and values, or logits."""


class Full(Gated):
    """Has no memory left while it holds something."""

    def __init__(self, *words):
        super().__init__(*words)
        self.held: list[weakref.ref] = []

    def answer(self, side, messages, sampling, *, on_text, is_stopped):
        cache = Held()
        self.held.append(weakref.ref(cache))
        raise MemoryError("out of memory")


@pytest.fixture
def models(tiny_gpt2):
    gc.disable()  # the device is out of memory now, not when garbage is next looked for
    yield Full(str(tiny_gpt2), None)
    gc.enable()


def test_a_failed_answer_of_the_page_holds_nothing_any_more(models):
    desk = Desk(models, Limits())
    desk.open()
    assert wait(ask(desk, order=("tuned",))).state == "failed"
    assert [held() for held in models.held] == [None]
    desk.close()


def test_a_failed_answer_in_the_terminal_holds_nothing_once_it_is_described(models):
    try:
        answer_once(models, QUESTION, Sampling())
    except MemoryError as failure:
        assert "ran out of memory" in describe_here(failure)
        assert [held() for held in models.held] == [None]
    assert models.held


def test_a_message_is_written_once_a_minute_with_the_number_of_the_others(monkeypatch, caplog):
    log = logging.getLogger("test_failures")
    log.addFilter(failures.OnceAMinute())
    for number in range(1000):
        log.warning("No room for %s.", number)
        log.warning("Another.")
    assert caplog.messages == ["No room for 0.", "Another."]
    monkeypatch.setattr(failures, "REPEAT_SECONDS", 0.0)
    log.warning("No room for %s.", "many")
    assert caplog.messages[2:] == ["No room for many. (999 more times since this was last written)"]
