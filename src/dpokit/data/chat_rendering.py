"""Renders conversations with a model's chat template: the prompt as a server does, and the answers that follow it.

A conversation is rendered whole. Its answer is the text after the prompt that a server would be given for it, up to
the token that ends the answer's turn. Most rows need no more than one rendering: if a conversation has nothing that
the template treats in a special way, then its answer stands between the same two texts as a probe's.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dpokit.data.chat_template import PROBE, ChatTemplate
from dpokit.data.formats import Pair
from dpokit.data.message_forms import CLOSE, find_forms, read_content, read_reasoning, says_something
from dpokit.data.messages import Messages, UnusableError

BEGINS = ("Yes", "a", "1", '"', "<", "`", "-", "\u00e9", "\u4f60")  # of answers
# The beginning of reasoning at the end of a prompt, in the forms of today's models.
REASONING = re.compile(r"(<(?P<tag>[\w:]*think\w*)>|\[THINK\])\s*$")
CLOSE_REASONING = "\n{close}\n\n"  # as DeepSeek-R1 writes it, whose template does not


@dataclass(frozen=True)
class RenderedAnswer:
    """An answer's text, from the end of the prompt to the end of its last turn.

    Attributes:
        scored: the parts, as (begin, end) in characters, that the assistant wrote; None for the whole text.
    """

    text: str
    scored: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class RenderedPair:
    """The texts of a pair.

    Attributes:
        notes: keys of `tally.NOTES`.
        is_joined: whether the token ids of prompt and answer must be taken from their common text, because a token
            might lie across both.
    """

    prompt: str
    chosen: RenderedAnswer
    rejected: RenderedAnswer
    notes: frozenset[str] = frozenset()
    is_joined: bool = False


@dataclass(frozen=True)
class _Frame:
    """How a plain answer is rendered after prompts of certain roles.

    Attributes:
        options: arguments of the template for the prompt.
        before, after: the text around an answer.
        spaces: what happens to spaces around an answer: "kept", "stripped", or "unclear".
    """

    options: Mapping[str, Any]
    before: str
    after: str
    spaces: str
    notes: frozenset[str]


class ChatRenderer:
    """Renders pairs with a chat template.

    Args:
        template: the tokenizer's chat template.
        is_boundary: returns whether two texts have the same token ids apart and joined.

    Attributes:
        ends: token ids at which an answer ends, EOS first.
    """

    def __init__(self, template: ChatTemplate, is_boundary: Callable[[str, str], bool]) -> None:
        self.template = template
        self._is_boundary = is_boundary
        self._frames: dict[tuple[str, ...], _Frame | None] = {}
        self.ends = self._find_ends()

    def __getstate__(self) -> dict[str, Any]:
        # `datasets` recognises prepared data by the pickled renderer.
        return self.__dict__ | {"_frames": {}}

    def _find_ends(self) -> tuple[int, ...]:
        """Returns EOS, the last token of `end`, and the token that ends a turn with a tool call."""
        texts = [self.template.end]
        call = {"type": "function", "id": "probe1234", "function": {"name": "probe_tool", "arguments": {}}}
        question: Messages = [{"role": "user", "content": "a question"}]
        answer: Messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        with suppress(UnusableError):  # a template without tools
            texts.append(self._render(question, (answer, answer), None, {}).chosen.text)
        ids = [int(self.template.tokenizer.eos_token_id)]
        ids += [self.template.tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in texts]
        return tuple(dict.fromkeys(ids))

    def render(self, pair: Pair, prompt: Messages) -> RenderedPair:
        """Returns the texts of a pair whose prompt has these messages.

        Raises: UnusableError with a reason for dropping the pair; ModelError if the template does not end.
        """
        if isinstance(pair.chosen, str) and isinstance(pair.rejected, str) and self._is_plain(pair, prompt):
            frame = self._find_frame(tuple(message["role"] for message in prompt))
            rendered = None if frame is None else self._render_in(frame, prompt, (pair.chosen, pair.rejected))
            if rendered is not None:
                return rendered
        chosen, rejected = (
            [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            for answer in (pair.chosen, pair.rejected)
        )
        return self._render(prompt, (chosen, rejected), pair.tools, pair.template_kwargs)

    def render_after(self, pair: Pair) -> RenderedPair:
        """Returns the texts of a pair whose prompt is already rendered: as they are, with an end and a BOS once.

        The answers may repeat the prompt, or the text that begins an answer.
        """
        parts = (pair.prompt, pair.chosen, pair.rejected)
        if pair.tools or pair.template_kwargs or not all(isinstance(part, str) for part in parts):
            raise UnusableError("rendered_prompt")
        prompt, *texts = (self.template.remove_bos(str(part)) for part in parts)
        start = self.template.answer_start
        for repeated in (prompt, start):
            if repeated and all(text.startswith(repeated) for text in texts):
                texts = [text[len(repeated) :] for text in texts]
                prompt = prompt.removesuffix(start) + start if repeated != prompt else prompt
        texts = [self.template.strip_ends(text) for text in texts]
        if not all(text.strip() for text in texts):
            raise UnusableError("empty_answer")
        if any(self.template.is_rendered(text) for text in texts):
            raise UnusableError("rendered_answer")
        chosen, rejected = (RenderedAnswer(text + self.template.end) for text in texts)
        return RenderedPair(
            self.template.bos + prompt, chosen, rejected, frozenset({"rendered_already"}), is_joined=True
        )

    def _is_plain(self, pair: Pair, prompt: Messages) -> bool:
        """Whether each message has only text, and none that the template searches for."""
        if pair.tools or pair.template_kwargs or prompt[-1]["role"] == "assistant":
            return False
        if any(message.keys() != {"role", "content"} for message in prompt):
            return False
        texts = [pair.chosen, pair.rejected, *(message["content"] for message in prompt)]
        return all(isinstance(text, str) and not self.template.is_treated(text) for text in texts)

    def _find_frame(self, roles: tuple[str, ...]) -> _Frame | None:
        """Returns how plain answers are rendered after these roles, learned from probes; None if it depends."""
        if roles not in self._frames:
            try:
                self._frames[roles] = self._learn(roles)
            except UnusableError:  # the pair itself shows the reason
                self._frames[roles] = None
        return self._frames[roles]

    def _learn(self, roles: tuple[str, ...]) -> _Frame | None:
        prompt = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]
        first, second = ([{"role": "assistant", "content": text}] for text in (PROBE, f" \n{PROBE} \n"))
        rendered = self._render(prompt, (first, second), None, {})
        before, probe, after = rendered.chosen.text.partition(PROBE)
        begins = [before] if before else BEGINS
        if not probe or after != self.template.end:
            return None
        if not all(self._is_boundary(rendered.prompt, begin) for begin in begins):
            return None
        spaces = {rendered.chosen.text: "stripped", f"{before} \n{PROBE} \n{after}": "kept"}
        options = next((o for text, o, _ in self.template.openings(prompt, {}) if text == rendered.prompt), {})
        if self.template.open(prompt, **options) != rendered.prompt:
            return None
        return _Frame(options, before, after, spaces.get(rendered.rejected.text, "unclear"), rendered.notes)

    def _render_in(self, frame: _Frame, prompt: Messages, answers: tuple[str, str]) -> RenderedPair | None:
        texts = [answer.strip() for answer in answers] if frame.spaces == "stripped" else list(answers)
        text = self.template.open(prompt, **frame.options)
        for answer in texts:
            if frame.spaces == "unclear" and answer != answer.strip():
                return None
            if not frame.before and answer[0].isspace():  # a token may lie across prompt and answer
                return None
        chosen, rejected = (RenderedAnswer(frame.before + answer + frame.after) for answer in texts)
        return RenderedPair(text, chosen, rejected, frame.notes)

    def _render(
        self,
        prompt: Messages,
        answers: tuple[Messages, Messages],
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any],
    ) -> RenderedPair:
        """Renders whole conversations, in the first form of their messages that the template writes."""
        options = dict(kwargs) | ({"tools": tools} if tools else {})
        prompt = [self.template.clean(message) for message in prompt]
        chosen, rejected = ([self.template.clean(message, is_answer=True) for message in answer] for answer in answers)
        if not all(map(says_something, (chosen[-1], rejected[-1]))):
            raise UnusableError("empty_answer")
        refusals = []
        for form in find_forms([*prompt, *chosen, *rejected]):
            try:
                rendered = self._render_as(
                    [form.write(message) for message in prompt],
                    [[form.write(message) for message in answer] for answer in (chosen, rejected)],
                    options,
                )
            except UnusableError as error:
                refusals.append(error)
            else:
                return replace(rendered, notes=rendered.notes | {"other_role"}) if form.renames_roles else rendered
        raise refusals[0]

    def _render_as(self, prompt: Messages, answers: list[Messages], options: dict[str, Any]) -> RenderedPair:
        wholes = [self.template.apply(_join(prompt, answer), **options) for answer in answers]
        for answer in answers:
            self.template.check_roles(_join(prompt, answer), options)
        is_open = all(answer[0]["role"] == "assistant" for answer in answers)
        for opening, used, note in self.template.openings(prompt, options, is_open=is_open):  # noqa: B007, used after the loop
            if all(whole.startswith(opening) for whole in wholes):
                texts = [whole[len(opening) :] for whole in wholes]
                scored = [
                    None
                    if is_open and len(answer) == 1
                    else self._find_scored(_join(prompt, answer), len(answer), whole, len(opening), used)
                    for answer, whole in zip(answers, wholes, strict=True)
                ]
                break
        else:
            opening, note = self.template.open(prompt, **options), "reasoning_rebuilt"
            if not is_open or any(len(answer) > 1 for answer in answers):
                raise UnusableError("changed_by_template")
            texts = [self._rebuild(opening, whole, answer[0]) for answer, whole in zip(answers, wholes, strict=True)]
            scored = [None, None]
        notes = {note} if note else set()
        if not all(self.template.reads(name) for name in options if name != "tools"):
            notes.add("argument_left_out")
        if (tools := options.get("tools")) and not all(_name(tool) in wholes[0] for tool in tools):
            notes.add("tools_left_out")
        rendered = []
        for text, spans, answer in zip(texts, scored, answers, strict=True):
            rendered.append(RenderedAnswer(self.template.end_turn(text), spans))
            if text.count(CLOSE) > sum(max(read_content(message).count(CLOSE), 1) for message in answer):
                raise UnusableError("reasoning_doubled_by_template")
            for message in answer:
                if message["role"] == "assistant":
                    notes |= _check_written(message, text)
        is_joined = "reasoning_rebuilt" not in notes  # else the template never writes the common text
        return RenderedPair(opening, rendered[0], rendered[1], frozenset(notes), is_joined=is_joined)

    def _rebuild(self, opening: str, whole: str, answer: Mapping[str, Any]) -> str:
        """Returns an answer for a prompt that opens reasoning, though the template writes none there, as DeepSeek-R1's.

        Raises: UnusableError if the template writes the prompt in another way once an answer follows.
        """
        begin = REASONING.search(opening)
        if begin is None or not whole.startswith(opening[: begin.start()]):
            raise UnusableError("changed_by_template")
        rest = whole[begin.start() :]
        if rest.startswith(begin[1]):  # it differs only in what follows the tag
            return rest[len(begin[1]) :].removeprefix(opening[begin.end(1) :])
        close = f"</{begin['tag']}>" if begin["tag"] else "[/THINK]"
        reasoning = read_reasoning(answer, begin[1], close)
        return reasoning.strip("\n") + CLOSE_REASONING.format(close=close) + rest.lstrip("\n")

    def _find_scored(
        self, messages: Messages, number: int, whole: str, begin: int, options: Mapping[str, Any]
    ) -> tuple[tuple[int, int], ...]:
        """Returns the assistant's parts of the last messages, as positions after `begin`.

        Args:
            messages: the conversation.
            number: how many messages the answers have.
            whole: the rendered conversation.
            begin: where the answers begin in it.
            options: arguments of the template.
        """
        spans = []
        for at in range(len(messages) - number, len(messages)):
            if messages[at]["role"] != "assistant":
                continue
            openings = [text for text, *_ in self.template.openings(messages[:at], options) if whole.startswith(text)]
            if at == 0 or not openings:
                raise UnusableError("changed_by_template")
            until = len(whole) + len(self.template.end)  # the end may be added to what the template writes
            if at < len(messages) - 1:
                turn = self.template.apply(messages[: at + 1], **options)
                until = self.template.find_end_of_turn(whole, len(openings[0]), turn)
            spans.append((max(len(openings[0]), begin) - begin, until - begin))
        return tuple(spans)


def _join(prompt: Messages, answer: Messages) -> Messages:
    """Returns the conversation; an answer to a prompt that ends with the assistant's words continues them."""
    if prompt[-1]["role"] != "assistant":
        return [*prompt, *answer]
    first = {**prompt[-1], **answer[0], "content": read_content(prompt[-1]) + read_content(answer[0])}
    return [*prompt[:-1], first, *answer[1:]]


def _name(tool: Mapping[str, Any]) -> str:
    return str((tool.get("function") or tool).get("name") or "")


def _check_written(message: Mapping[str, Any], text: str) -> set[str]:
    """Returns a note if the text of an answer lacks the message's reasoning.

    Raises: UnusableError if it lacks the message's content, or says nothing without the reasoning.
    """
    content = read_content(message)
    content = _squeeze(content.partition(CLOSE)[2] if CLOSE in content else content)
    if content not in _squeeze(text):
        raise UnusableError("left_out_by_template")
    if _squeeze(read_reasoning(message)) in _squeeze(text):
        return set()
    if not content and not message.get("tool_calls"):
        raise UnusableError("left_out_by_template", "reasoning")
    return {"reasoning_left_out"}


def _squeeze(text: str) -> str:
    return "".join(text.split())
