"""The page: a question, two answers, a vote. `question_queue` and `request_limits` decide which questions it takes."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI

from dpokit.data.messages import Messages
from dpokit.errors import DpokitError
from dpokit.report.votes import is_between, read_votes
from dpokit.serve.forms import Forms
from dpokit.serve.markup import (
    BLIND_NAMES,
    PLACES,
    name_side,
    show_note,
    show_past,
    show_status,
    show_votes,
)
from dpokit.serve.question_queue import OVER, Conversation, Exchange, draw_order
from dpokit.serve.request_limits import RefusedError, SamplingSettings, find_client, read_question, read_sampling
from dpokit.serve.sessions import MOST_SESSIONS
from dpokit.serve.votes import CHOICES, append_vote, build_vote
from dpokit.serve.widgets import Site, Widgets

POLL_SECONDS = 0.02  # between two checks for new text
WAITING_SECONDS = 1.0  # between two status updates while a question waits; they also reveal a closed page
LEAVING_SECONDS = 2.0  # the most time that a new conversation waits for the last update of the old one
Update = dict[Any, Any]


def build_application(site: Site, *, defaults: SamplingSettings) -> tuple[FastAPI, Forms]:
    """The application of the page, and the forms of the bodies that its functions take.

    Analytics, run history and uploads are off, and fonts come from the user's machine.
    """
    # Otherwise Gradio counts a table of 10,000 entries after every event.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"
    with gr.Blocks(title="dpokit: base beside tuned", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        Page(site, defaults)
    blocks.state_session_capacity = MOST_SESSIONS
    blocks.queue(max_size=256, default_concurrency_limit=None, api_open=False)
    site.sessions.forget = partial(_forget, blocks)
    forms = Forms({number: len(function.inputs) for number, function in blocks.fns.items()})
    application = gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        max_file_size=0,
        css=(files("dpokit.serve") / "page.css").read_text(),
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return application, forms


async def _forget(blocks: gr.Blocks, session: str) -> None:
    """Drops Gradio's data of a session; Gradio itself keeps the messages of a session that nobody reads."""
    queue = blocks._queue
    await queue.clean_events(session_hash=session)
    queue.pending_event_ids_session.pop(session, None)
    queue.pending_messages_per_session.pop(session, None)
    blocks.state_holder.session_data.pop(session, None)
    blocks.state_holder.time_last_used.pop(session, None)


class Page(Widgets):
    """The page with its event handlers."""

    def __init__(self, site: Site, defaults: SamplingSettings) -> None:
        super().__init__(site, defaults)
        self._wire()

    def _wire(self) -> None:
        self.all = [self.conversation, self.status, self.past, *self.answers, *self.notes, self.ask, self.stop]
        self.all += [*self.buttons, self.question, self.followed, self.tally, self.timer]
        inputs = [self.question, *self.settings, self.blind, self.followed, self.conversation]
        # Gradio passes the values on unchecked; the handlers check them and report errors as text.
        hidden = {"outputs": self.all, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        gr.on([self.ask.click, self.question.submit], self._ask, inputs, concurrency_limit=None, **hidden)
        self.stop.click(self._stop, None, **hidden | {"outputs": None})
        self.anew.click(self._start_empty_conversation, [self.conversation], **hidden)
        self.examples.click(self._take_example, [self.examples, self.conversation], **hidden)
        for choice, button in zip(CHOICES, self.buttons, strict=True):
            button.click(self._build_vote_handler(choice), [self.conversation], **hidden)
        self.timer.tick(self._show_state, None, **hidden)

    def _show_state(self) -> Update:
        """Shows whether the models are loading, ready or failed."""
        queue = self.site.queue
        update: Update = {self.tally: self._count()}
        if queue.state == "loading":
            return update | {self.status: show_status("The models are being loaded ...")}
        text, kind = ("Ready.", "") if queue.state == "ready" else (queue.trouble, "trouble")
        return update | {self.status: show_status(text, kind), self.timer: gr.Timer(active=False)}

    def _start_conversation(self, messages: Messages, question: str = "") -> Update:
        """Starts a new conversation, for an example with the messages before its question."""
        update: Update = {self.conversation: Conversation(messages), self.question: question}
        update |= {self.past: gr.HTML(show_past(messages), visible=bool(messages)), self.status: show_status("")}
        update[self.stop] = gr.Button(interactive=False)
        return update | self._clear_answers(None) | self._open_votes(None)

    async def _start_empty_conversation(self, conversation: Conversation | None) -> Update:
        await self._leave(conversation)
        return self._start_conversation([])

    async def _take_example(self, index: Any, conversation: Conversation | None) -> Update:
        examples = self.site.examples
        if not isinstance(index, int) or not 0 <= index < len(examples):
            return {self.status: show_status("There is no such example.", "trouble")}
        await self._leave(conversation)
        return self._start_conversation(list(examples[index][:-1]), examples[index][-1]["content"])

    async def _leave(self, conversation: Conversation | None) -> None:
        """Stops the answers of the last question, and waits until no update of them is still being sent."""
        if conversation is None or conversation.exchange is None:
            return
        exchange = conversation.exchange
        self.site.queue.leave(exchange.job)
        deadline = time.monotonic() + LEAVING_SECONDS
        while exchange.is_followed and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)

    async def _ask(
        self,
        question: Any,
        temperature: Any,
        top_p: Any,
        max_new_tokens: Any,
        seed: Any,
        blind: Any,
        followed: Any,
        conversation: Conversation | None,
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        limits, queue = self.site.queue.limits, self.site.queue
        conversation = conversation or Conversation()
        try:
            text = read_question(question, limits)
            sampling = read_sampling(temperature, top_p, max_new_tokens, seed, limits=limits)
            conversation.followed_place = PLACES.index(followed) if followed in PLACES else 1
            messages = conversation.next_messages(text, limits)
            address = find_client(request.client.host if request.client else "")
            if not self.site.rate.allows(address):
                raise RefusedError(f"More than {limits.per_minute} questions in a minute: please wait a little.")
            is_blind = bool(blind) and self.site.takes_votes
            order = draw_order(self.site.sides, blind=is_blind)
            session = str(request.session_hash)
            job = queue.ask(messages, sampling, order=order, session=session, address=address)
        except RefusedError as refusal:
            yield {self.status: show_status(str(refusal), "trouble")}
            return
        exchange = conversation.take(job, blind=is_blind)
        exchange.is_followed = True
        try:
            yield {
                self.conversation: conversation,
                self.past: gr.HTML(show_past(messages), visible=True),
                self.question: "",
                self.status: show_status(self._describe_status(exchange)),
                self.stop: gr.Button(interactive=True),
                **self._clear_answers(exchange),
                **self._open_votes(exchange),
            }
            async for update in self._follow(exchange, session):
                yield update
            if job.left:
                yield {self.stop: gr.skip()}  # Gradio repeats the last update at the end; this one is empty
        finally:
            exchange.is_followed = False
            if job.state not in OVER:  # the page was closed, or no longer reads
                queue.leave(job)

    async def _follow(self, exchange: Exchange, session: str) -> AsyncIterator[Update]:
        """Updates with the answers so far, until they end, the page leaves them, or nobody reads them."""
        job, sent_version, sent_state, sent_at = exchange.job, -1, "", 0.0
        while job.state not in OVER and not job.left:
            if not self.site.sessions.is_read(session):
                return
            now, version, current, update = time.monotonic(), job.look(), job.state, Update()
            if version != sent_version:
                update |= self._show_answers(exchange)
            if current != sent_state or (not update and now - sent_at >= WAITING_SECONDS):
                update[self.status] = show_status(self._describe_status(exchange))
            if update:
                sent_version, sent_state, sent_at = version, current, now
                yield update
            await asyncio.sleep(POLL_SECONDS)
        if job.left:
            return
        text, kind = (job.error, "trouble") if job.state == "failed" else (self._describe_status(exchange), "")
        yield {
            **self._show_answers(exchange),
            self.status: show_status(text, kind),
            self.stop: gr.Button(interactive=False),
            **self._open_votes(exchange),
            **({self.question: job.messages[-1]["content"]} if job.state == "failed" else {}),
        }

    def _describe_status(self, exchange: Exchange) -> str:
        job, queue = exchange.job, self.site.queue
        if job.state == "waiting":
            if queue.state == "loading":
                return "The models are being loaded ..."
            before = queue.count_before(job)
            return f"Waiting: {before} question{'' if before == 1 else 's'} before yours."
        if job.state == "answering":
            return "Answering ..."
        if job.state == "stopped":
            return "Stopped. You cannot vote on stopped answers."
        return f"Answered in {job.seconds:.1f} s with seed {job.sampling.seed}." + (
            " Which is better?" if exchange.is_open and self.site.takes_votes else ""
        )

    def _show_answers(self, exchange: Exchange) -> Update:
        order, replies = exchange.job.order, exchange.job.replies
        update: Update = {}
        for place, side in enumerate(order):
            update[self.answers[place]] = replies[side].text if side in replies else ""
            update[self.notes[place]] = show_note(exchange, place)
        return update

    def _show_names(self, exchange: Exchange | None, **more: Any) -> Update:
        """Labels each answer with its model, or neutrally before a blind vote; `more` sets further values."""
        order = self.site.sides if exchange is None else exchange.job.order
        labels = [name_side(side, self.names) for side in order]
        if exchange is not None and exchange.hides_names:
            labels = list(BLIND_NAMES)
        return {box: gr.Textbox(label=label, **more) for box, label in zip(self.answers, labels, strict=True)}

    def _clear_answers(self, exchange: Exchange | None) -> Update:
        return self._show_names(exchange, value="") | dict.fromkeys(self.notes, "")

    def _open_votes(self, exchange: Exchange | None) -> Update:
        is_open = exchange is not None and exchange.is_open
        return {button: gr.Button(interactive=is_open) for button in self.buttons}

    def _stop(self, request: gr.Request) -> None:
        self.site.queue.stop(str(request.session_hash))

    def _build_vote_handler(self, choice: str) -> Callable[[Conversation | None], Update]:
        def vote(conversation: Conversation | None) -> Update:
            return self._vote(choice, conversation)

        return vote

    def _vote(self, choice: str, conversation: Conversation | None) -> Update:
        exchange = conversation.exchange if conversation is not None else None
        if exchange is None or self.site.votes is None:
            return {self.status: show_status("There is nothing to vote on.", "trouble")}
        with exchange.lock:  # a double click is one vote
            if not exchange.is_open:
                return {self.status: show_status("There is nothing to vote on.", "trouble")}
            try:
                append_vote(self.site.votes, self._describe_vote(choice, exchange))
            except DpokitError as error:
                return {self.status: show_status(f"{error.seen}. Do this: {error.do}.", "trouble")}
            exchange.vote = choice
        update: Update = {self.status: show_status("Thank you: your vote is kept."), self.tally: self._count()}
        if choice in ("left", "right"):
            update[self.followed] = PLACES[CHOICES.index(choice)]
        update |= {note: show_note(exchange, place) for place, note in enumerate(self.notes)}
        return update | self._show_names(exchange) | self._open_votes(exchange)

    def _describe_vote(self, choice: str, exchange: Exchange) -> dict[str, Any]:
        job = exchange.job
        return build_vote(
            choice,
            prompt=job.messages,
            order=job.order,
            answers={side: reply.text for side, reply in job.replies.items()},
            names=self.names,
            blind=exchange.blind,
            ended={side: reply.ended for side, reply in job.replies.items()},
            rewards=job.rewards,
            sampling=vars(job.sampling),
            run=self.site.run_token,
        )

    def _count(self) -> str:
        if self.site.votes is None:
            return ""
        try:
            votes = read_votes(self.site.votes)
        except OSError:  # the next vote reports the error
            return ""
        return show_votes([vote for vote in votes if is_between(vote, self.names, run=self.site.run_token)])
