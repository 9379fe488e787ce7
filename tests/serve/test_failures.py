"""What a failure leaves behind: nothing of what the models held when they failed."""

import gc
import io
import weakref

import pytest
from test_talk import Desk, Gated, ask, wait

from dpokit.serve.chat import talk
from dpokit.serve.limits import Limits, Sampling


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


def test_a_failed_answer_in_the_terminal_holds_nothing_any_more(models):
    screen = io.StringIO()

    class Lines(io.StringIO):
        def readline(self, *words):
            assert all(held() is None for held in models.held)
            return super().readline(*words)

    talk(models, Sampling(), limits=Limits(), lines=Lines("Why?\nSo?\n"), screen=screen)
    assert screen.getvalue().count("ran out of memory") == len(models.held) == 2
