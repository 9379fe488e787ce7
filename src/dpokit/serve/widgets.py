"""The data that all pages share, and the widgets of a page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from dpokit.data.messages import Messages
from dpokit.serve.markup import PLACES, name_side, show_facts, show_status
from dpokit.serve.question_queue import QuestionQueue
from dpokit.serve.request_limits import MOST_SEED, MOST_TEMPERATURE, RateLimit, SamplingSettings
from dpokit.serve.sessions import Sessions
from dpokit.serve.votes import CHOICES

CHOICE_LABELS = ("Left is better", "Right is better", "Tie", "Both are bad")


@dataclass
class Site:
    """The data that all pages share.

    Attributes:
        queue: the queue of questions.
        votes: the file of votes; None if votes are disabled.
        examples: conversations that end with a held-out question.
        rate: the limit of questions of each client.
        run_token: the token of the run, which is stored with each vote; None without a run.
        sessions: the sessions of the open pages.
    """

    queue: QuestionQueue
    votes: Path | None
    examples: Sequence[Messages]
    rate: RateLimit
    run_token: str | None = None
    sessions: Sessions = field(default_factory=Sessions)

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(self.queue.models.names)

    @property
    def takes_votes(self) -> bool:
        return self.votes is not None and len(self.sides) == 2


class Widgets:
    """The widgets of the page, without their event handlers."""

    def __init__(self, site: Site, defaults: SamplingSettings) -> None:
        self.site = site
        self.names = site.queue.models.names
        self.is_pair = len(site.sides) == 2
        self._draw(defaults)

    def _draw(self, defaults: SamplingSettings) -> None:
        gr.Markdown("# Base beside tuned" if self.is_pair else "# Talk to the model")
        self.conversation = gr.State(time_to_live=6 * 3600)
        self.status = gr.HTML(show_status("Connecting ..."), elem_id="status")
        self.past = gr.HTML(visible=False, elem_id="past")
        self.answers, self.notes = [], []
        with gr.Row():
            for place, side in enumerate(self.site.sides):
                with gr.Column(min_width=280):
                    self.answers.append(
                        gr.Textbox(
                            label=name_side(side, self.names),
                            lines=8,
                            max_lines=24,
                            interactive=False,
                            elem_id=f"answer-{place}",
                        )
                    )
                    self.notes.append(gr.HTML(elem_id=f"note-{place}"))
        self._draw_votes()
        self.question = gr.Textbox(
            label="Your question",
            lines=1,  # with more than one, Enter would start a new line
            max_lines=12,
            placeholder="Enter sends the question, Shift+Enter starts a new line.",
            autofocus=True,
            elem_id="question",
        )
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
            self.anew = gr.Button("New conversation", elem_id="anew")
        self._draw_settings(defaults)
        self.examples = gr.Dataset(
            label="Held-out questions of the run",
            components=[gr.Textbox(visible=False)],
            samples=[[messages[-1]["content"]] for messages in self.site.examples],
            type="index",
            samples_per_page=8,
            visible=bool(self.site.examples),
            elem_id="examples",
        )
        with gr.Accordion("What is this?", open=False):
            self.facts = gr.HTML(show_facts(self.site.queue.models.run, self.names), elem_id="facts")
        self.timer = gr.Timer(3.0)

    def _draw_votes(self) -> None:
        shown = self.site.takes_votes
        with gr.Row(visible=shown):
            self.buttons = [
                gr.Button(label, interactive=False, elem_id=f"vote-{choice}", min_width=120)
                for choice, label in zip(CHOICES, CHOICE_LABELS, strict=True)
            ]
        with gr.Row(visible=self.is_pair):
            with gr.Column(min_width=240):  # below each other on a phone
                self.followed = gr.Radio(
                    list(PLACES),
                    value=PLACES[-1],
                    label="The conversation continues with the answer on the",
                    elem_id="goes-on",
                )
            with gr.Column(min_width=240):
                self.blind = gr.Checkbox(
                    label="Blind: sides shuffled, names hidden until the vote", visible=shown, elem_id="blind"
                )
        self.tally = gr.HTML(visible=shown, elem_id="tally")

    def _draw_settings(self, defaults: SamplingSettings) -> None:
        most = self.site.queue.limits.new_tokens
        with gr.Accordion("How answers are sampled", open=False), gr.Row():
            self.settings = [
                gr.Slider(0, MOST_TEMPERATURE, defaults.temperature, step=0.05, label="Temperature (0: greedy)"),
                gr.Slider(0.01, 1, defaults.top_p, step=0.01, label="Top-p"),
                gr.Slider(1, most, min(defaults.max_new_tokens, most), step=1, label="Most tokens of an answer"),
                gr.Number(defaults.seed, precision=0, minimum=0, maximum=MOST_SEED, label="Seed (repeats an answer)"),
            ]
