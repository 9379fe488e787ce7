"""The queue of questions: order, limits, stops, and failures that leave other questions unaffected."""

import io
import re
import sys
import threading
import time

import pytest
import torch

from dpokit.errors import ModelError
from dpokit.serve import question_queue
from dpokit.serve.models import LocalModels, ModelReply
from dpokit.serve.question_queue import OVER, Conversation, Exchange, QuestionQueue, QueuedQuestion, draw_order
from dpokit.serve.request_limits import RefusedError, RequestLimits, SamplingSettings

QUESTION = [{"role": "user", "content": "How do I bake bread?"}]
SAMPLING = SamplingSettings(max_new_tokens=12)


class Gated(LocalModels):
    """A real model that waits for `open` before it answers, sleeps at each token, and raises `failure` if set."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
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
def queue(tiny_gpt2):
    new_queue = QuestionQueue(Gated(str(tiny_gpt2), str(tiny_gpt2)), RequestLimits(waiting=3))
    new_queue.open()
    yield new_queue
    new_queue.close()


def wait(job, states=OVER):
    for _ in range(6000):
        job.look()
        if job.state in states:
            return job
        time.sleep(0.01)
    raise AssertionError(f"{job.state} after a minute")


def ask(queue, session="one", order=("base", "tuned"), sampling=SAMPLING):
    return queue.ask(QUESTION, sampling, order=order, session=session)


def test_a_question_is_answered_by_every_side(queue):
    queue.models.open.set()
    job = wait(ask(queue))
    assert job.state == "done"
    assert set(job.replies) == set(job.token_times) == {"base", "tuned"}
    assert job.rewards == {"base": pytest.approx(0.0, abs=1e-5), "tuned": pytest.approx(0.0, abs=1e-5)}


def test_a_full_queue_refuses_a_question(queue):
    first = wait(ask(queue, "0"), ("answering",))
    waiting = [ask(queue, str(number)) for number in (1, 2, 3)]
    assert [queue.count_before(job) for job in (first, *waiting)] == [0, 1, 2, 3]
    with pytest.raises(RefusedError, match="busy: 3 questions are waiting"):
        ask(queue, "4")
    queue.models.open.set()
    assert [wait(job).state for job in (first, *waiting)] == ["done"] * 4
    assert wait(ask(queue, "4")).state == "done"


def test_a_page_may_ask_one_question_at_a_time(queue):
    job = ask(queue)
    with pytest.raises(RefusedError, match="still being answered"):
        ask(queue)
    queue.models.open.set()
    wait(job)
    assert wait(ask(queue)).state == "done"


def test_a_stopped_question_does_not_stop_the_others(queue):
    first = wait(ask(queue, "0"), ("answering",))
    waiting, second = ask(queue, "1"), ask(queue, "2")
    assert queue.stop("1") and queue.stop("0") and not queue.stop("nobody")
    queue.models.open.set()
    assert [wait(job).state for job in (first, waiting, second)] == ["stopped", "stopped", "done"]
    assert waiting.replies == {}
    assert not Exchange(first, blind=False).is_open


def test_a_stopped_waiting_question_frees_its_place(queue, monkeypatch):
    first = wait(ask(queue, "0"), ("answering",))
    waiting = [ask(queue, str(number)) for number in (1, 2, 3)]
    queue.stop("1")
    assert waiting[0].state == "stopped"
    waiting += [ask(queue, "4")]
    monkeypatch.setattr(question_queue, "FORSAKEN_SECONDS", 3600.0)
    waiting[1].looked -= 7200.0
    waiting += [ask(queue, "5")]
    assert waiting[1].state == "stopped"
    queue.models.open.set()
    states = [wait(job).state for job in (first, *waiting)]
    assert states == ["done", "stopped", "stopped", "done", "done", "done"]


def test_addresses_take_turns_and_share_the_places(queue):
    queue.limits = RequestLimits(waiting=8)
    first = wait(queue.ask(QUESTION, SAMPLING, order=("base",), session="a", address="a"), ("answering",))
    sessions = iter("bcdefghij")
    many = [queue.ask(QUESTION, SAMPLING, order=("base",), session=next(sessions), address="a") for _ in range(6)]
    with pytest.raises(RefusedError, match="busy: 6 questions are waiting"):
        queue.ask(QUESTION, SAMPLING, order=("base",), session=next(sessions), address="a")
    others = [queue.ask(QUESTION, SAMPLING, order=("base",), session=next(sessions), address="b") for _ in range(2)]
    assert [queue.count_before(job) for job in others] == [1, 3]
    assert [queue.count_before(job) for job in many] == [2, 4, 5, 6, 7, 8]
    queue.models.open.set()
    assert {wait(job).state for job in (first, *many, *others)} == {"done"}


def test_a_page_that_leaves_its_question_may_ask_at_once(queue):
    first = wait(ask(queue), ("answering",))
    queue.leave(first)
    following = ask(queue)
    queue.models.open.set()
    assert [wait(job).state for job in (first, following)] == ["stopped", "done"]


def test_several_workers_answer_several_questions_at_once(tiny_gpt2):
    models = Gated(str(tiny_gpt2), str(tiny_gpt2))
    models.workers = 3
    new_queue = QuestionQueue(models, RequestLimits())
    new_queue.open()
    jobs = [ask(new_queue, str(number)) for number in range(4)]
    for job in jobs[:3]:
        wait(job, ("answering",))
    assert jobs[3].state == "waiting"
    assert new_queue.count_before(jobs[3]) == 3
    new_queue.close()
    for job in jobs[:3]:
        assert wait(job).state == "stopped"


def test_equal_questions_are_two_jobs():
    first, second = (QueuedQuestion(QUESTION, SAMPLING, ("tuned",), "one", looked=0.0) for _ in range(2))
    assert first != second
    assert len({first, second}) == 2


def test_an_answer_stops_at_its_next_token(queue):
    queue.models.token_seconds = 0.05
    queue.models.open.set()
    job = ask(queue, sampling=SamplingSettings(max_new_tokens=200, temperature=1.0))
    wait(job, ("answering",))
    while not job.replies:
        job.look()
        time.sleep(0.01)
    queue.stop("one")
    assert wait(job).state == "stopped"
    assert set(job.replies) == {"base"}
    assert job.rewards is None


def test_a_question_that_no_page_reads_is_stopped(queue, monkeypatch):
    monkeypatch.setattr(question_queue, "FORSAKEN_SECONDS", 0.05)
    job = ask(queue)
    for _ in range(6000):
        if job.state in OVER:
            break
        time.sleep(0.01)
    assert job.state == "stopped"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "ran out of memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:113] . DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("shapes at /home/somebody cannot be multiplied"), r"failed \(RuntimeError\)"),
        (ModelError("the adapter is torn", expected="a whole one", do="copy it again"), "adapter is torn.*copy it"),
    ],
)
def test_the_next_question_is_answered_after_a_failure(queue, failure, message, capsys):
    queue.models.open.set()
    queue.models.failure = failure
    job = wait(ask(queue))
    assert job.state == "failed"
    assert re.search(message, job.error)
    assert "somebody" not in job.error
    queue.models.failure = None
    assert wait(ask(queue)).state == "done"
    assert str(failure).splitlines()[0][:20] in capsys.readouterr().err


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_closed_log_does_not_stop_the_queue(queue, monkeypatch):
    queue.models.open.set()
    queue.models.failure = RuntimeError("no")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert wait(ask(queue)).state == "failed"
    queue.models.failure = None
    assert wait(ask(queue)).state == "done"


def test_a_lost_device_refuses_every_question(queue, monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    first = wait(ask(queue, "0"), ("answering",))
    waiting = ask(queue, "1")
    queue.models.failure = RuntimeError("CUDA error: device-side assert triggered")
    queue.models.open.set()
    for job in (first, waiting):
        assert wait(job).state == "failed"
        assert "restart dpokit" in job.error
    with pytest.raises(RefusedError, match="restart dpokit"):
        ask(queue, "2")


def test_a_model_that_fails_to_load_refuses_every_question(tmp_path):
    models = LocalModels(str(tmp_path / "nothing-here"), None)
    new_queue = QuestionQueue(models, RequestLimits())
    new_queue.open()
    for _ in range(6000):
        if new_queue.state != "loading":
            break
        time.sleep(0.01)
    assert new_queue.state == "failed"
    with pytest.raises(RefusedError, match=r"could not be loaded.*nothing-here"):
        ask(new_queue)
    new_queue.close()


def test_a_conversation_follows_the_chosen_answer(queue):
    queue.models.open.set()
    limits = RequestLimits()
    conversation = Conversation()
    messages = conversation.next_messages("How do I bake bread?", limits)
    assert messages == QUESTION
    job = wait(ask(queue))
    job.replies = {"base": ModelReply("No."), "tuned": ModelReply("Mix flour.")}
    conversation.exchange = Exchange(job, blind=False)
    for place, text in enumerate(("No.", "Mix flour.")):
        conversation.followed_place = place
        following = conversation.next_messages("Why?", limits)
        answered = {"role": "assistant", "content": text}
        assert following == [*QUESTION, answered, {"role": "user", "content": "Why?"}]
    with pytest.raises(RefusedError, match="too long"):
        conversation.next_messages("Why?", RequestLimits(conversation_characters=10))


def test_a_failed_question_is_not_in_the_conversation(queue):
    queue.models.open.set()
    queue.models.failure = RuntimeError("no")
    conversation = Conversation()
    conversation.take(wait(ask(queue)), blind=False)
    assert conversation.next_messages("Why?", RequestLimits()) == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("state", "replies"),
    [("failed", {}), ("stopped", {}), ("stopped", {"base": ModelReply("Half")}), ("done", {"tuned": ModelReply("")})],
    ids=["failed", "stopped while waiting", "stopped before the chosen side started", "empty"],
)
def test_messages_before_an_unanswered_question_are_kept(state, replies):
    conversation = Conversation(followed_place=1)
    sides = ("base", "tuned")
    for question, case_state, case_replies in (
        ("One?", "done", {"tuned": ModelReply("One.")}),
        ("Two?", state, replies),
    ):
        messages = conversation.next_messages(question, RequestLimits())
        conversation.take(QueuedQuestion(messages, SAMPLING, sides, "one", case_state, case_replies), blind=False)
    texts = [message["content"] for message in conversation.next_messages("Three?", RequestLimits())]
    assert texts == ["One?", "One.", "Three?"]


def test_only_a_blind_comparison_shuffles_the_sides():
    sides = ("base", "tuned")
    assert {draw_order(sides, blind=False) for _ in range(50)} == {sides}
    assert {draw_order(sides, blind=True) for _ in range(200)} == {sides, sides[::-1]}
