"""Questions and their turn: one thread has the models, everyone else looks on."""

import secrets
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any

from dpokit.data.formats import Messages
from dpokit.serve.failures import LOST, describe, revive_device, tell
from dpokit.serve.models import Models, Reply
from dpokit.serve.request_limits import Limits, RefusedError, Sampling

# A job that nobody has looked at for so long is stopped: its page was closed.
FORSAKEN_SECONDS = 20.0
BUSY = "All is busy now, with {waiting} questions waiting. Please try again in a moment."
OVER = ("done", "stopped", "failed")
ANSWERED = ("done", "stopped")


@dataclass(eq=False)
class Job:
    """A question on its way, and what there is of its answers.

    Attributes:
        messages: the conversation up to the question.
        order: the sides that answer, in the order in which they are shown.
        session: whose it is.
        address: where it comes from.
        state: waiting, answering, done, stopped, failed.
        replies: by side.
        rewards: by side; None until both are there, and where they cannot be known.
        error: a sentence, where it failed.
        seconds: from the first step of the models to the last.
        token_times: when the first token of each side was there (`time.time`).
        left: its page has begun something else, and shows nothing of it any more.
    """

    messages: Messages
    sampling: Sampling
    order: tuple[str, ...]
    session: str
    state: str = "waiting"
    replies: dict[str, Reply] = field(default_factory=dict)
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
        """The version of what there is; whoever looks keeps the job alive."""
        self.looked = time.monotonic()
        return self.version

    def is_stopped(self) -> bool:
        """Whether it should end: told to, or forsaken."""
        return self.stop or self.left or time.monotonic() - self.looked > FORSAKEN_SECONDS


class Desk:
    """Where questions queue for the models.

    Attributes:
        state: loading, ready, or failed with `trouble`, the error in words.
    """

    def __init__(self, models: Models, limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.state, self.trouble = "loading", ""
        self._waiting: deque[Job] = deque()
        self._current: list[Job] = []
        self._changed = Condition(Lock())
        self._closed = False

    def open(self) -> None:
        """Loads the models and answers from now on, on as many threads as they bear questions at once."""
        Thread(target=self._work, name="models", daemon=True).start()

    def close(self) -> None:
        """Ends what is being answered, and takes no more."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._current):
                job.stop = True
            self._changed.notify_all()

    def ask(
        self, messages: Messages, sampling: Sampling, *, order: tuple[str, ...], session: str, address: str = ""
    ) -> Job:
        """Takes the question. Raises: RefusedError where too many wait, or the models are not there.

        One address may have three of four places where questions wait, and addresses take turns.
        """
        if self.state == "failed":
            raise RefusedError(self.trouble)
        with self._changed:
            for job in [job for job in self._waiting if job.is_stopped()]:
                self._end(job)
            own = [job for job in (*self._waiting, *self._current) if job.session == session and not job.left]
            if any(job.state not in OVER for job in own):
                raise RefusedError("Your last question is still being answered: stop it, or wait.")
            share = self.limits.waiting if not address else max(1, self.limits.waiting * 3 // 4)
            of_address = sum(job.address == address for job in self._waiting)
            if len(self._waiting) >= self.limits.waiting or of_address >= share:
                raise RefusedError(BUSY.format(waiting=len(self._waiting)))
            job = Job(messages, sampling, order, session, address=address)
            self._waiting.insert(self._find_place(address), job)
            self._changed.notify()
        return job

    def _find_place(self, address: str) -> int:
        """Where the next question of an address waits: its third, say, stands before the fourth of any other."""
        turns = Counter(job.address for job in self._current)
        turn = turns[address] + sum(job.address == address for job in self._waiting)
        for place, job in enumerate(self._waiting):
            if turns[job.address] > turn:
                return place
            turns[job.address] += 1
        return len(self._waiting)

    def stop(self, session: str) -> bool:
        """Ends the session's question where it is; False where there is none."""
        with self._changed:
            for job in (*self._waiting, *self._current):
                if job.session == session:
                    self._end(job)
                    return True
        return False

    def leave(self, job: Job) -> None:
        """Ends a question whose page has begun something else: it may ask again at once."""
        with self._changed:
            job.left = True
            self._end(job)

    def _end(self, job: Job) -> None:
        """One that waits is over at once, and frees its place; one that is answered ends at its next token."""
        job.stop = True
        if job in self._waiting:
            self._waiting.remove(job)
            job.state = "stopped"
            job.version += 1

    def count_before(self, job: Job) -> int:
        """How many questions come before this one."""
        with self._changed:
            place = self._waiting.index(job) if job in self._waiting else -1
            return place + len(self._current) if place >= 0 else 0

    def _work(self) -> None:
        try:
            self.models.load()
            self.state = "ready"
        except Exception as error:
            self.trouble = f"The model could not be loaded. {describe(error)}"
            self.state = "failed"
            tell(error)
        for number in range(1, self.models.workers):
            Thread(target=self._answer_all, name=f"models-{number}", daemon=True).start()
        self._answer_all()

    def _answer_all(self) -> None:
        while (job := self._next()) is not None:
            self._answer(job)
            with self._changed:
                self._current.remove(job)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            job = self._waiting.popleft()
            self._current.append(job)
            return job

    def _answer(self, job: Job) -> None:
        began, state = time.monotonic(), "failed"
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
            job.error, failure = describe(error), error
            if not isinstance(error, RefusedError) and not revive_device(error):
                job.error = self.trouble = LOST
                self.state = "failed"
        finally:
            job.seconds = time.monotonic() - began
            job.state = state
            job.version += 1
        if failure is not None:
            tell(failure)

    def _answer_side(self, job: Job, side: str) -> Reply:
        def show(reply: Reply) -> None:
            job.token_times.setdefault(side, time.time())
            job.replies[side] = reply
            job.version += 1

        show_whole = self.models.answer(side, job.messages, job.sampling, on_text=show, is_stopped=job.is_stopped)
        show(show_whole)
        return show_whole


@dataclass
class Exchange:
    """One question with its answers, as one page sees it: what a vote is given on.

    Attributes:
        blind: names are hidden until the vote.
        vote: what was voted; empty before.
        is_followed: what there is of the answers is still being sent to the page.
    """

    job: Job
    blind: bool
    vote: str = ""
    is_followed: bool = False
    lock: Any = field(default_factory=Lock, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether a vote can be given: two whole answers, and none was given yet."""
        return self.job.state == "done" and len(self.job.order) == 2 and not self.vote

    @property
    def hides_names(self) -> bool:
        return self.blind and not self.vote and self.job.state != "failed"


@dataclass
class Conversation:
    """What one page has said.

    Attributes:
        messages: all that came before the current question, with the answers that it went on with.
        exchange: the last question.
        goes_on_with: 0 or 1: which of its answers the next question follows.
    """

    messages: Messages = field(default_factory=list)
    exchange: Exchange | None = None
    goes_on_with: int = 0

    def take(self, job: Job, *, blind: bool) -> Exchange:
        """Its next question, which was taken: what came before it stays, however it ends."""
        self.messages = job.messages[:-1]
        self.exchange = Exchange(job, blind)
        return self.exchange

    def next_messages(self, question: str, limits: Limits) -> Messages:
        """The conversation up to a new question. Raises: RefusedError for too long a one."""
        messages = list(self.messages)
        if self.exchange is not None:
            job = self.exchange.job
            side = job.order[min(self.goes_on_with, len(job.order) - 1)]
            reply = job.replies.get(side)
            if reply is not None and reply.text and job.state in ANSWERED:
                messages = [*job.messages, {"role": "assistant", "content": reply.text}]
        messages.append({"role": "user", "content": question})
        if sum(len(message["content"]) for message in messages) > limits.conversation_characters:
            raise RefusedError("The conversation is too long: begin a new one.")
        return messages


def draw_order(sides: tuple[str, ...], *, blind: bool) -> tuple[str, ...]:
    """The sides as they are shown: shuffled where nobody shall know them."""
    return tuple(secrets.SystemRandom().sample(sides, len(sides))) if blind else sides
