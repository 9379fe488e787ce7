"""The queue of questions; worker threads own the models and answer one question at a time each."""

import secrets
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any

from dpokit.data.messages import Messages
from dpokit.serve.failures import LOST, describe_failure, log_failure, revive_device
from dpokit.serve.models import ModelReply, Models
from dpokit.serve.request_limits import RefusedError, RequestLimits, SamplingSettings

# A job whose page has not read it for this long is stopped, because the page was closed.
FORSAKEN_SECONDS = 20.0
BUSY = "The server is busy: {waiting} questions are waiting. Please try again in a moment."
OVER = ("done", "stopped", "failed")
ANSWERED = ("done", "stopped")


@dataclass(eq=False)
class QueuedQuestion:
    """A job of the queue: a question and its answers so far.

    Attributes:
        messages: the conversation up to the question.
        sampling: how its answers are sampled.
        order: the sides that answer, in the order in which they are shown.
        session: the session of the page that asked.
        address: the client's address.
        state: waiting, answering, done, stopped or failed.
        replies: the answers so far, by side.
        rewards: the implicit rewards, by side; None until both answers are complete, or if they cannot be computed.
        error: a sentence if the question failed.
        seconds: the time from the first step of the models to the last.
        token_times: when the first token of each side was generated (`time.time`).
        version: increases with each change of the answers, and at the end.
        stop: whether it should end at its next token.
        left: whether its page has started something else and no longer shows it.
        looked: when its page last read it (`time.monotonic`).
    """

    messages: Messages
    sampling: SamplingSettings
    order: tuple[str, ...]
    session: str
    state: str = "waiting"
    replies: dict[str, ModelReply] = field(default_factory=dict)
    rewards: dict[str, float] | None = None
    error: str = ""
    seconds: float = 0.0
    token_times: dict[str, float] = field(default_factory=dict)
    version: int = 0
    stop: bool = False
    left: bool = False
    address: str = ""
    looked: float = field(default_factory=time.monotonic)

    def look(self) -> int:
        """The current version; a page that calls this keeps the job alive."""
        self.looked = time.monotonic()
        return self.version

    def is_stopped(self) -> bool:
        """Whether it should end: it was stopped, or no page reads it any more."""
        return self.stop or self.left or time.monotonic() - self.looked > FORSAKEN_SECONDS


class QuestionQueue:
    """The queue of questions for the models.

    Attributes:
        state: loading, ready or failed.
        trouble: the error as a sentence if the state is failed.
    """

    def __init__(self, models: Models, limits: RequestLimits) -> None:
        self.models, self.limits = models, limits
        self.state, self.trouble = "loading", ""
        self._waiting: deque[QueuedQuestion] = deque()
        self._current: list[QueuedQuestion] = []
        self._changed = Condition(Lock())
        self._closed = False

    def open(self) -> None:
        """Starts the threads that load the models and answer questions, `workers` of them."""
        Thread(target=self._work, name="models", daemon=True).start()

    def close(self) -> None:
        """Stops all questions and accepts no more."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._current):
                job.stop = True
            self._changed.notify_all()

    def ask(
        self, messages: Messages, sampling: SamplingSettings, *, order: tuple[str, ...], session: str, address: str = ""
    ) -> QueuedQuestion:
        """Queues a question. Raises: RefusedError if too many wait, or the models failed to load.

        One address may use at most three quarters of the waiting places, and addresses take turns.
        """
        if self.state == "failed":
            raise RefusedError(self.trouble)
        with self._changed:
            for job in [job for job in self._waiting if job.is_stopped()]:
                self._end(job)
            session_jobs = [job for job in (*self._waiting, *self._current) if job.session == session and not job.left]
            if any(job.state not in OVER for job in session_jobs):
                raise RefusedError("Your last question is still being answered: stop it, or wait.")
            share = self.limits.waiting if not address else max(1, self.limits.waiting * 3 // 4)
            from_address = sum(job.address == address for job in self._waiting)
            if len(self._waiting) >= self.limits.waiting or from_address >= share:
                raise RefusedError(BUSY.format(waiting=len(self._waiting)))
            job = QueuedQuestion(messages, sampling, order, session, address=address)
            self._waiting.insert(self._find_place(address), job)
            self._changed.notify()
        return job

    def _find_place(self, address: str) -> int:
        """The place of an address's next question: its third question comes before any other's fourth."""
        turns = Counter(job.address for job in self._current)
        turn = turns[address] + sum(job.address == address for job in self._waiting)
        for place, job in enumerate(self._waiting):
            if turns[job.address] > turn:
                return place
            turns[job.address] += 1
        return len(self._waiting)

    def stop(self, session: str) -> bool:
        """Stops the session's question; False if it has none."""
        with self._changed:
            for job in (*self._waiting, *self._current):
                if job.session == session:
                    self._end(job)
                    return True
        return False

    def leave(self, job: QueuedQuestion) -> None:
        """Stops a question whose page has started something else; the page may ask again at once."""
        with self._changed:
            job.left = True
            self._end(job)

    def _end(self, job: QueuedQuestion) -> None:
        """Stops a job: a waiting one at once, which frees its place, and an answering one at its next token."""
        job.stop = True
        if job in self._waiting:
            self._waiting.remove(job)
            job.state = "stopped"
            job.version += 1

    def count_before(self, job: QueuedQuestion) -> int:
        """The number of questions before this one."""
        with self._changed:
            place = self._waiting.index(job) if job in self._waiting else -1
            return place + len(self._current) if place >= 0 else 0

    def _work(self) -> None:
        try:
            self.models.load()
            self.state = "ready"
        except Exception as error:
            self.trouble = f"The model could not be loaded. {describe_failure(error)}"
            self.state = "failed"
            log_failure(error)
        for number in range(1, self.models.workers):
            Thread(target=self._answer_all, name=f"models-{number}", daemon=True).start()
        self._answer_all()

    def _answer_all(self) -> None:
        while (job := self._next()) is not None:
            self._answer(job)
            with self._changed:
                self._current.remove(job)

    def _next(self) -> QueuedQuestion | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            job = self._waiting.popleft()
            self._current.append(job)
            return job

    def _answer(self, job: QueuedQuestion) -> None:
        started, state = time.monotonic(), "failed"
        failure: Exception | None = None
        try:
            if self.state == "failed":
                raise RefusedError(self.trouble)
            job.state = "answering"
            for side in job.order:
                if job.is_stopped():
                    break
                job.replies[side] = self._answer_side(job, side)
            if job.is_stopped():
                state = "stopped"
            else:
                job.rewards = self.models.find_rewards(job.messages, job.replies)
                state = "done"
        except Exception as error:
            job.error, failure = describe_failure(error), error
            if not isinstance(error, RefusedError) and not revive_device(error):
                job.error = self.trouble = LOST
                self.state = "failed"
        finally:
            job.seconds = time.monotonic() - started
            job.state = state
            job.version += 1
        if failure is not None:
            log_failure(failure)

    def _answer_side(self, job: QueuedQuestion, side: str) -> ModelReply:
        def show(reply: ModelReply) -> None:
            job.token_times.setdefault(side, time.time())
            job.replies[side] = reply
            job.version += 1

        reply = self.models.answer(side, job.messages, job.sampling, on_text=show, is_stopped=job.is_stopped)
        show(reply)
        return reply


@dataclass
class Exchange:
    """A question with its answers on one page, which the user can vote on.

    Attributes:
        blind: whether names are hidden until the vote.
        vote: the vote; empty before.
        is_followed: whether updates of the answers are still being sent to the page.
    """

    job: QueuedQuestion
    blind: bool
    vote: str = ""
    is_followed: bool = False
    lock: Any = field(default_factory=Lock, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether the user can vote: two complete answers, and no vote yet."""
        return self.job.state == "done" and len(self.job.order) == 2 and not self.vote

    @property
    def hides_names(self) -> bool:
        return self.blind and not self.vote and self.job.state != "failed"


@dataclass
class Conversation:
    """The conversation of one page.

    Attributes:
        messages: the conversation before the last question, with the followed answers.
        exchange: the last question with its answers.
        followed_place: 0 or 1: the place of the answer that the next question follows.
    """

    messages: Messages = field(default_factory=list)
    exchange: Exchange | None = None
    followed_place: int = 0

    def take(self, job: QueuedQuestion, *, blind: bool) -> Exchange:
        """Takes over a queued question; the messages before it stay, even if it fails."""
        self.messages = job.messages[:-1]
        self.exchange = Exchange(job, blind)
        return self.exchange

    def next_messages(self, question: str, limits: RequestLimits) -> Messages:
        """The conversation up to a new question. Raises: RefusedError if it is too long."""
        messages = list(self.messages)
        if self.exchange is not None:
            job = self.exchange.job
            side = job.order[min(self.followed_place, len(job.order) - 1)]
            reply = job.replies.get(side)
            if reply is not None and reply.text and job.state in ANSWERED:
                messages = [*job.messages, {"role": "assistant", "content": reply.text}]
        messages.append({"role": "user", "content": question})
        if sum(len(message["content"]) for message in messages) > limits.conversation_characters:
            raise RefusedError("The conversation is too long: start a new one.")
        return messages


def draw_order(sides: tuple[str, ...], *, blind: bool) -> tuple[str, ...]:
    """The sides in the order shown: shuffled for a blind comparison."""
    return tuple(secrets.SystemRandom().sample(sides, len(sides))) if blind else sides
