"""Questions and their turn: queued, bounded, stopped, and a failure that ends nothing else."""

import io
import re
import sys
import threading
import time

import pytest
import torch

from dpokit.errors import ModelError
from dpokit.serve import question_queue as talk
from dpokit.serve.models import LocalModels, Reply
from dpokit.serve.question_queue import OVER, Conversation, Desk, Exchange, Job, draw_order
from dpokit.serve.request_limits import Limits, RefusedError, Sampling

QUESTION = [{"role": "user", "content": "How do I bake bread?"}]
SAMPLING = Sampling(max_new_tokens=12)


class Gated(LocalModels):
    """A real model that answers when it may, as slowly as it is told to, and fails when it is told to."""

    def __init__(self, *words):
        super().__init__(*words)
        self.open = threading.Event()
        self.failure: Exception | None = None
        self.token_seconds = 0.0

    def answer(self, side, messages, sampling, *, on_text, is_stopped):
        while not self.open.is_set() and not is_stopped():
            time.sleep(0.005)
        if self.failure is not None:
            raise self.failure

        def look_in_time() -> bool:
            time.sleep(self.token_seconds)
            return is_stopped()

        return super().answer(side, messages, sampling, on_text=on_text, is_stopped=look_in_time)


@pytest.fixture
def desk(tiny_gpt2):
    made = Desk(Gated(str(tiny_gpt2), str(tiny_gpt2)), Limits(waiting=3))
    made.open()
    yield made
    made.close()


def wait(job, states=OVER):
    for _ in range(6000):
        job.look()
        if job.state in states:
            return job
        time.sleep(0.01)
    raise AssertionError(f"{job.state} after a minute")


def ask(desk, session="one", order=("base", "tuned"), sampling=SAMPLING):
    return desk.ask(QUESTION, sampling, order=order, session=session)


def test_a_question_is_answered_by_every_side(desk):
    desk.models.open.set()
    job = wait(ask(desk))
    assert job.state == "done"
    assert set(job.replies) == set(job.token_times) == {"base", "tuned"}
    assert job.rewards == {"base": pytest.approx(0.0, abs=1e-5), "tuned": pytest.approx(0.0, abs=1e-5)}


def test_too_many_questions_are_told_that_all_is_busy_and_each_knows_its_place(desk):
    first = wait(ask(desk, "0"), ("answering",))
    waiting = [ask(desk, str(number)) for number in (1, 2, 3)]
    assert [desk.count_before(job) for job in (first, *waiting)] == [0, 1, 2, 3]
    with pytest.raises(RefusedError, match="All is busy now, with 3 questions waiting"):
        ask(desk, "4")
    desk.models.open.set()
    assert [wait(job).state for job in (first, *waiting)] == ["done"] * 4
    assert wait(ask(desk, "4")).state == "done"


def test_a_page_has_one_question_at_a_time(desk):
    job = ask(desk)
    with pytest.raises(RefusedError, match="still being answered"):
        ask(desk)
    desk.models.open.set()
    wait(job)
    assert wait(ask(desk)).state == "done"


def test_a_question_is_stopped_where_it_is_and_the_others_go_on(desk):
    first = wait(ask(desk, "0"), ("answering",))
    waiting, other = ask(desk, "1"), ask(desk, "2")
    assert desk.stop("1") and desk.stop("0") and not desk.stop("nobody")
    desk.models.open.set()
    assert [wait(job).state for job in (first, waiting, other)] == ["stopped", "stopped", "done"]
    assert waiting.replies == {}
    assert not Exchange(first, blind=False).is_open


def test_a_question_that_waits_gives_its_place_back_at_once(desk, monkeypatch):
    first = wait(ask(desk, "0"), ("answering",))
    waiting = [ask(desk, str(number)) for number in (1, 2, 3)]
    desk.stop("1")
    assert waiting[0].state == "stopped"
    waiting += [ask(desk, "4")]
    monkeypatch.setattr(talk, "FORSAKEN_SECONDS", 3600.0)
    waiting[1].looked -= 7200.0
    waiting += [ask(desk, "5")]
    assert waiting[1].state == "stopped"
    desk.models.open.set()
    states = [wait(job).state for job in (first, *waiting)]
    assert states == ["done", "stopped", "stopped", "done", "done", "done"]


def test_addresses_take_turns_and_none_takes_every_place(desk):
    desk.limits = Limits(waiting=8)
    first = wait(desk.ask(QUESTION, SAMPLING, order=("base",), session="a", address="a"), ("answering",))
    sessions = iter("bcdefghij")
    many = [desk.ask(QUESTION, SAMPLING, order=("base",), session=next(sessions), address="a") for _ in range(6)]
    with pytest.raises(RefusedError, match="All is busy now, with 6 questions waiting"):
        desk.ask(QUESTION, SAMPLING, order=("base",), session=next(sessions), address="a")
    others = [desk.ask(QUESTION, SAMPLING, order=("base",), session=next(sessions), address="b") for _ in range(2)]
    assert [desk.count_before(job) for job in others] == [1, 3]
    assert [desk.count_before(job) for job in many] == [2, 4, 5, 6, 7, 8]
    desk.models.open.set()
    assert {wait(job).state for job in (first, *many, *others)} == {"done"}


def test_a_page_that_begins_something_else_may_ask_at_once(desk):
    first = wait(ask(desk), ("answering",))
    desk.leave(first)
    following = ask(desk)
    desk.models.open.set()
    assert [wait(job).state for job in (first, following)] == ["stopped", "done"]


def test_models_that_bear_several_questions_at_once_get_them(tiny_gpt2):
    models = Gated(str(tiny_gpt2), str(tiny_gpt2))
    models.workers = 3
    made = Desk(models, Limits())
    made.open()
    jobs = [ask(made, str(number)) for number in range(4)]
    for job in jobs[:3]:
        wait(job, ("answering",))
    assert jobs[3].state == "waiting"
    assert made.count_before(jobs[3]) == 3
    made.close()
    for job in jobs[:3]:
        assert wait(job).state == "stopped"


def test_the_same_question_of_two_is_two_jobs():
    one, other = (Job(QUESTION, SAMPLING, ("tuned",), "one", looked=0.0) for _ in range(2))
    assert one != other
    assert len({one, other}) == 2


def test_an_answer_stops_in_its_middle(desk):
    desk.models.token_seconds = 0.05
    desk.models.open.set()
    job = ask(desk, sampling=Sampling(max_new_tokens=200, temperature=1.0))
    wait(job, ("answering",))
    while not job.replies:
        job.look()
        time.sleep(0.01)
    desk.stop("one")
    assert wait(job).state == "stopped"
    assert set(job.replies) == {"base"}
    assert job.rewards is None


def test_a_question_that_nobody_looks_at_any_more_is_stopped(desk, monkeypatch):
    monkeypatch.setattr(talk, "FORSAKEN_SECONDS", 0.05)
    job = ask(desk)
    for _ in range(6000):
        if job.state in OVER:
            break
        time.sleep(0.01)
    assert job.state == "stopped"


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "ran out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:113] . DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("shapes at /home/somebody cannot be multiplied"), r"failed \(RuntimeError\)"),
        (ModelError("the adapter is torn", expected="a whole one", do="copy it again"), "adapter is torn.*copy it"),
    ],
)
def test_a_failure_is_told_and_the_next_question_is_answered(desk, failure, says, capsys):
    desk.models.open.set()
    desk.models.failure = failure
    job = wait(ask(desk))
    assert job.state == "failed"
    assert re.search(says, job.error)
    assert "somebody" not in job.error
    desk.models.failure = None
    assert wait(ask(desk)).state == "done"
    assert str(failure).splitlines()[0][:20] in capsys.readouterr().err


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_that_was_closed_ends_nothing(desk, monkeypatch):
    desk.models.open.set()
    desk.models.failure = RuntimeError("no")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert wait(ask(desk)).state == "failed"
    desk.models.failure = None
    assert wait(ask(desk)).state == "done"


def test_a_device_that_is_lost_is_told_to_everyone_who_asks(desk, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    first = wait(ask(desk, "0"), ("answering",))
    waiting = ask(desk, "1")
    desk.models.failure = RuntimeError("CUDA error: device-side assert triggered")
    desk.models.open.set()
    for job in (first, waiting):
        assert wait(job).state == "failed"
        assert "restart dpokit" in job.error
    with pytest.raises(RefusedError, match="restart dpokit"):
        ask(desk, "2")


def test_a_model_that_cannot_be_loaded_is_told_to_everyone_who_asks(tmp_path):
    models = LocalModels(str(tmp_path / "nothing-here"), None)
    made = Desk(models, Limits())
    made.open()
    for _ in range(6000):
        if made.state != "loading":
            break
        time.sleep(0.01)
    assert made.state == "failed"
    with pytest.raises(RefusedError, match=r"could not be loaded.*nothing-here"):
        ask(made)
    made.close()


def test_a_conversation_goes_on_with_the_answer_that_was_chosen(desk):
    desk.models.open.set()
    limits = Limits()
    conversation = Conversation()
    messages = conversation.next_messages("How do I bake bread?", limits)
    assert messages == QUESTION
    job = wait(ask(desk))
    job.replies = {"base": Reply("No."), "tuned": Reply("Mix flour.")}
    conversation.exchange = Exchange(job, blind=False)
    for place, text in enumerate(("No.", "Mix flour.")):
        conversation.goes_on_with = place
        following = conversation.next_messages("Why?", limits)
        answered = {"role": "assistant", "content": text}
        assert following == [*QUESTION, answered, {"role": "user", "content": "Why?"}]
    with pytest.raises(RefusedError, match="too long"):
        conversation.next_messages("Why?", Limits(conversation_characters=10))


def test_a_failed_question_leaves_no_trace_in_the_conversation(desk):
    desk.models.open.set()
    desk.models.failure = RuntimeError("no")
    conversation = Conversation()
    conversation.take(wait(ask(desk)), blind=False)
    assert conversation.next_messages("Why?", Limits()) == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("state", "replies"),
    [("failed", {}), ("stopped", {}), ("stopped", {"base": Reply("Half")}), ("done", {"tuned": Reply("")})],
    ids=["failed", "stopped while it waited", "stopped before the chosen side began", "empty"],
)
def test_what_was_said_before_a_question_without_an_answer_is_kept(state, replies):
    conversation = Conversation(goes_on_with=1)
    sides = ("base", "tuned")
    for question, how, found in (("One?", "done", {"tuned": Reply("One.")}), ("Two?", state, replies)):
        messages = conversation.next_messages(question, Limits())
        conversation.take(Job(messages, SAMPLING, sides, "one", how, found), blind=False)
    said = [message["content"] for message in conversation.next_messages("Three?", Limits())]
    assert said == ["One?", "One.", "Three?"]


def test_only_a_blind_comparison_shuffles_the_sides():
    sides = ("base", "tuned")
    assert {draw_order(sides, blind=False) for _ in range(50)} == {sides}
    assert {draw_order(sides, blind=True) for _ in range(200)} == {sides, sides[::-1]}
