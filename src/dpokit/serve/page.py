"""The page: a question, two answers, a vote. Gradio draws it; who may ask what is decided in `talk` and `limits`."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI

from dpokit.data.formats import Messages
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
from dpokit.serve.request_limits import RefusedError, Sampling, find_party, read_question, read_sampling
from dpokit.serve.sessions import MOST_SESSIONS
from dpokit.serve.votes import CHOICES, append_vote, build_vote
from dpokit.serve.widgets import Parts, Site

LOOK_SECONDS = 0.02  # between two looks at what the models have
WAITING_SECONDS = 1.0  # between two words to one who waits: also how a closed page is noticed
LEAVING_SECONDS = 2.0  # that a new conversation waits, at most, for the last word of the old one
Update = dict[Any, Any]


def build_application(site: Site, *, defaults: Sampling) -> tuple[FastAPI, Forms]:
    """The page and its routes, and the bodies that its functions take.

    No analytics, no run history, no uploads, fonts of the reader's own machine.
    """
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # else a table of 10,000 is counted after every event
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
    """Drops what Gradio keeps of a session: it keeps what was told to one that nobody reads."""
    queue = blocks._queue
    await queue.clean_events(session_hash=session)
    queue.pending_event_ids_session.pop(session, None)
    queue.pending_messages_per_session.pop(session, None)
    blocks.state_holder.session_data.pop(session, None)
    blocks.state_holder.time_last_used.pop(session, None)


class Page(Parts):
    """What the parts do."""

    def __init__(self, site: Site, defaults: Sampling) -> None:
        super().__init__(site, defaults)
        self._wire()

    def _wire(self) -> None:
        self.all = [self.conversation, self.status, self.past, *self.answers, *self.notes, self.ask, self.stop]
        self.all += [*self.buttons, self.question, self.goes_on, self.tally, self.timer]
        asked = [self.question, *self.settings, self.blind, self.goes_on, self.conversation]
        # Values come as they were sent: they are checked here, and told in words.
        hidden = {"outputs": self.all, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        gr.on([self.ask.click, self.question.submit], self._ask, asked, concurrency_limit=None, **hidden)
        self.stop.click(self._stop, None, **hidden | {"outputs": None})
        self.anew.click(self._begin_anew, [self.conversation], **hidden)
        self.examples.click(self._take_example, [self.examples, self.conversation], **hidden)
        for choice, button in zip(CHOICES, self.buttons, strict=True):
            button.click(self._voter(choice), [self.conversation], **hidden)
        self.timer.tick(self._tell_state, None, **hidden)

    def _tell_state(self) -> Update:
        """Loading, until it is not."""
        desk = self.site.desk
        told: Update = {self.tally: self._count()}
        if desk.state == "loading":
            return told | {self.status: show_status("The models are being loaded ...")}
        text, kind = ("Ready.", "") if desk.state == "ready" else (desk.trouble, "trouble")
        return told | {self.status: show_status(text, kind), self.timer: gr.Timer(active=False)}

    def _begin(self, messages: Messages, question: str = "") -> Update:
        """A new conversation, perhaps with what was said before a held-out question."""
        told: Update = {self.conversation: Conversation(messages), self.question: question}
        told |= {self.past: gr.HTML(show_past(messages), visible=bool(messages)), self.status: show_status("")}
        told[self.stop] = gr.Button(interactive=False)
        return told | self._clear_answers(None) | self._open_votes(None)

    async def _begin_anew(self, conversation: Conversation | None) -> Update:
        await self._leave(conversation)
        return self._begin([])

    async def _take_example(self, index: Any, conversation: Conversation | None) -> Update:
        examples = self.site.examples
        if not isinstance(index, int) or not 0 <= index < len(examples):
            return {self.status: show_status("There is no such example.", "trouble")}
        await self._leave(conversation)
        return self._begin(list(examples[index][:-1]), examples[index][-1]["content"])

    async def _leave(self, conversation: Conversation | None) -> None:
        """Ends the answers of the last question, and waits until nothing more of them is on its way to the page."""
        if conversation is None or conversation.exchange is None:
            return
        exchange = conversation.exchange
        self.site.desk.leave(exchange.job)
        until = time.monotonic() + LEAVING_SECONDS
        while exchange.is_followed and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask(
        self,
        question: Any,
        temperature: Any,
        top_p: Any,
        max_new_tokens: Any,
        seed: Any,
        blind: Any,
        goes_on: Any,
        conversation: Conversation | None,
        request: gr.Request,
    ) -> AsyncIterator[Update]:
        limits, desk = self.site.desk.limits, self.site.desk
        conversation = conversation or Conversation()
        try:
            text = read_question(question, limits)
            sampling = read_sampling(temperature, top_p, max_new_tokens, seed, limits=limits)
            conversation.goes_on_with = PLACES.index(goes_on) if goes_on in PLACES else 1
            messages = conversation.next_messages(text, limits)
            address = find_party(request.client.host if request.client else "")
            if not self.site.rate.allows(address):
                raise RefusedError(f"More than {limits.per_minute} questions in a minute: please wait a little.")
            is_blind = bool(blind) and self.site.takes_votes
            order = draw_order(self.site.sides, blind=is_blind)
            session = str(request.session_hash)
            job = desk.ask(messages, sampling, order=order, session=session, address=address)
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
                self.status: show_status(self._find_words(exchange)),
                self.stop: gr.Button(interactive=True),
                **self._clear_answers(exchange),
                **self._open_votes(exchange),
            }
            async for update in self._follow(exchange, session):
                yield update
            if job.left:
                yield {self.stop: gr.skip()}  # Gradio sends the last update once more at the end
        finally:
            exchange.is_followed = False
            if job.state not in OVER:  # the page is gone, or reads nothing
                desk.leave(job)

    async def _follow(self, exchange: Exchange, session: str) -> AsyncIterator[Update]:
        """What there is of the answers, until they are over or left, or nobody reads them."""
        job, seen, state, told = exchange.job, -1, "", 0.0
        while job.state not in OVER and not job.left:
            if not self.site.sessions.is_read(session):
                return
            now, version, current, update = time.monotonic(), job.look(), job.state, Update()
            if version != seen:
                update |= self._show_answers(exchange)
            if current != state or (not update and now - told >= WAITING_SECONDS):
                update[self.status] = show_status(self._find_words(exchange))
            if update:
                seen, state, told = version, current, now
                yield update
            await asyncio.sleep(LOOK_SECONDS)
        if job.left:
            return
        words, kind = (job.error, "trouble") if job.state == "failed" else (self._find_words(exchange), "")
        yield {
            **self._show_answers(exchange),
            self.status: show_status(words, kind),
            self.stop: gr.Button(interactive=False),
            **self._open_votes(exchange),
            **({self.question: job.messages[-1]["content"]} if job.state == "failed" else {}),
        }

    def _find_words(self, exchange: Exchange) -> str:
        job, desk = exchange.job, self.site.desk
        if job.state == "waiting":
            if desk.state == "loading":
                return "The models are being loaded ..."
            before = desk.count_before(job)
            return f"Waiting: {before} question{'' if before == 1 else 's'} before yours."
        if job.state == "answering":
            return "Answering ..."
        if job.state == "stopped":
            return "Stopped. Stopped answers are not voted on."
        return f"Answered in {job.seconds:.1f} s with seed {job.sampling.seed}." + (
            " Which is better?" if exchange.is_open and self.site.takes_votes else ""
        )

    def _show_answers(self, exchange: Exchange) -> Update:
        order, replies = exchange.job.order, exchange.job.replies
        told: Update = {}
        for place, side in enumerate(order):
            told[self.answers[place]] = replies[side].text if side in replies else ""
            told[self.notes[place]] = show_note(exchange, place)
        return told

    def _show_names(self, exchange: Exchange | None, **more: Any) -> Update:
        """Who answers where, or that this is not told yet; `more` goes to the boxes, too."""
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
        self.site.desk.stop(str(request.session_hash))

    def _voter(self, choice: str) -> Callable[[Conversation | None], Update]:
        def vote(conversation: Conversation | None) -> Update:
            return self._vote(choice, conversation)

        return vote

    def _vote(self, choice: str, conversation: Conversation | None) -> Update:
        exchange = conversation.exchange if conversation is not None else None
        if exchange is None or self.site.votes is None:
            return {self.status: show_status("There is nothing to vote on.", "trouble")}
        with exchange.lock:  # two clicks are one vote
            if not exchange.is_open:
                return {self.status: show_status("There is nothing to vote on.", "trouble")}
            try:
                append_vote(self.site.votes, self._describe_vote(choice, exchange))
            except DpokitError as error:
                return {self.status: show_status(f"{error.seen}. Do this: {error.do}.", "trouble")}
            exchange.vote = choice
        told: Update = {self.status: show_status("Thank you: your vote is kept."), self.tally: self._count()}
        if choice in ("left", "right"):
            told[self.goes_on] = PLACES[CHOICES.index(choice)]
        told |= {note: show_note(exchange, place) for place, note in enumerate(self.notes)}
        return told | self._show_names(exchange) | self._open_votes(exchange)

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
        except OSError:  # told by the next vote
            return ""
        return show_votes([vote for vote in votes if is_between(vote, self.names, run=self.site.run_token)])
