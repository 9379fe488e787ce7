"""A failed answer frees the memory that it held, and repeated log messages are counted."""

import gc
import logging
import weakref

import pytest
from test_question_queue import QUESTION, Gated, QuestionQueue, ask, wait

from dpokit.serve import failures
from dpokit.serve.chat import answer_once, free_and_describe
from dpokit.serve.request_limits import RequestLimits, SamplingSettings


class Held:
    """In place of a cache of keys and values, or of logits."""


class Full(Gated):
    """Models that raise MemoryError while they hold a cache."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.held: list[weakref.ref] = []

    def answer(self, side, messages, sampling, *, on_text, is_stopped):
        cache = Held()
        self.held.append(weakref.ref(cache))
        raise MemoryError("out of memory")


@pytest.fixture
def models(tiny_gpt2):
    gc.disable()  # memory must be freed at once, not at the next garbage collection
    yield Full(str(tiny_gpt2), None)
    gc.enable()


def test_a_failed_answer_of_the_page_frees_its_memory(models):
    queue = QuestionQueue(models, RequestLimits())
    queue.open()
    assert wait(ask(queue, order=("tuned",))).state == "failed"
    assert [held() for held in models.held] == [None]
    queue.close()


def test_a_failed_answer_in_the_terminal_frees_its_memory(models):
    try:
        answer_once(models, QUESTION, SamplingSettings())
    except MemoryError as failure:
        assert "ran out of memory" in free_and_describe(failure)
        assert [held() for held in models.held] == [None]
    assert models.held


def test_a_repeated_log_message_is_counted(monkeypatch, caplog):
    log = logging.getLogger("test_failures")
    log.addFilter(failures.OnceAMinute())
    for number in range(1000):
        log.warning("No room for %s.", number)
        log.warning("Another.")
    assert caplog.messages == ["No room for 0.", "Another."]
    monkeypatch.setattr(failures, "REPEAT_SECONDS", 0.0)
    log.warning("No room for %s.", "many")
    assert caplog.messages[2:] == ["No room for many. (999 more times since this was last written)"]
