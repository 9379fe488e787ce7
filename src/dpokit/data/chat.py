"""Renders conversations with a model's chat template: the prompt as a server does, and the answers that follow it.

A conversation is rendered whole. Its answer is the text after the prompt that a server would be given for it, up to
the token that ends the answer's turn. Most rows need no more than one rendering: if a conversation has nothing that
the template treats in a special way, then its answer stands between the same two texts as a probe's.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpokit.data.control_words import find_searched
from dpokit.data.formats import Pair
from dpokit.data.messages import SAYINGS, Messages, UnusableError
from dpokit.data.template_box import check_template, refuse_template, render_in_bounds
from dpokit.errors import ModelError

PROBE = 'a probe: "x" <b>&\n\n  it\'s \u00e9'  # what a template may change: quotes, tags, lines, other letters
BEGINS = ("Yes", "a", "1", '"', "<", "`", "-", "\u00e9", "\u4f60")  # of answers
# The beginning of reasoning at the end of a prompt, in the forms of today's models.
REASONING = re.compile(r"(<(?P<tag>[\w:]*think\w*)>|\[THINK\])\s*$")
OPEN, CLOSE = "<think>", "</think>"
THINKING_SWITCHES = ("enable_thinking", "thinking")  # arguments of templates: Qwen's, DeepSeek's
CLOSE_REASONING = "\n{close}\n\n"  # as DeepSeek-R1 writes it, whose template does not
# Words that structure the prompts of today's models, by which a prompt for another model is recognised.
FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|begin_of_text|user|assistant|system|endoftext)\|>|"
    r"<(?:start|end)_of_turn>|\[/?INST\]|<\uff5c(?:User|Assistant)\uff5c>"
)
CALL_OF_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # transformers offers this function to templates


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


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: with a chat template and an EOS token.
        is_boundary: returns whether two texts have the same token ids apart and joined.
        template_date: for templates that write a date, as `2026-11-29`; None for the current date.

    Attributes:
        end: the token, or tokens, that end an assistant's turn; EOS if the template writes none.
        ends: token ids at which an answer ends, EOS first.

    Raises: ModelError for a template that cannot render a conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_boundary: Callable[[str, str], bool],
        template_date: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._is_boundary = is_boundary
        templates = tokenizer.chat_template
        self._text = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
        # Only of a template that writes a date: else prepared data would be of one day.
        day = date.today() if template_date is None else date.fromisoformat(template_date)
        self._today = day if CALL_OF_DATE.search(self._text) else None
        if isinstance(templates, dict) and "default" not in templates:
            raise refuse_template(tokenizer, f"is one of several ({', '.join(templates)}), and none is named default")
        check_template(tokenizer)
        self._special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._in_parts = False
        self._begins_with_bos = False
        self._tail = self._probe()
        run = self._find_tokens(self._tail)
        self.end: str = run or str(tokenizer.eos_token)
        self._begin, self._generation = self._find_turns()
        self._ends = tuple(dict.fromkeys((self.end.strip(), str(tokenizer.eos_token))))
        # The words for which a conversation is rendered whole.
        searched = (OPEN, CLOSE, *find_searched(self._text), *self._ends, tokenizer.bos_token, self._begin)
        searched += (self._generation.strip(),)
        self._searched = tuple(dict.fromkeys(word for word in searched if word))
        self._frames: dict[tuple[str, ...], _Frame | None] = {}
        self._left_out: dict[str, str] = {}
        self.ends = self._find_ends()

    def __getstate__(self) -> dict[str, Any]:
        # `datasets` recognises prepared data by the pickled renderer.
        return self.__dict__ | {"_frames": {}, "_left_out": {}}

    # -- the template itself -------------------------------------------------------------------------------------------

    def apply(self, messages: Messages, **options: Any) -> str:
        """Returns the text of a conversation. Raises: UnusableError if the template refuses it; ModelError."""
        if self._in_parts:
            messages = [_in_parts(message) for message in messages]
        if self._today is not None:
            options["chat_template"] = self._with_date(options.get("chat_template"), options.get("tools"))
        try:
            return render_in_bounds(self._tokenizer, messages, **options)
        except ModelError:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            raise UnusableError("refused_by_template") from error

    def _with_date(self, template: str | None, tools: Any) -> str:
        """Returns a template, by default the tokenizer's, with the run's date in place of the current one."""
        template = template or str(self._tokenizer.get_chat_template(tools=tools))
        return CALL_OF_DATE.sub(lambda call: json.dumps(self._today.strftime(call[2]) if self._today else ""), template)

    def open(self, messages: Messages, **options: Any) -> str:
        """Returns the text of a prompt up to its answer; a last message of the assistant's is continued."""
        if messages[-1]["role"] == "assistant":
            return self.apply(messages, continue_final_message=True, **options)
        return self.apply(messages, add_generation_prompt=True, **options)

    def _probe(self) -> str:
        """Returns what the template writes after an answer. Raises: ModelError if it leaves the answer out."""
        question = {"role": "user", "content": "a question"}
        answer = {"role": "assistant", "content": PROBE}
        system = {"role": "system", "content": "a system prompt"}
        is_repeated = False
        for in_parts in (False, True):  # templates of models that take images expect a list of parts
            self._in_parts = in_parts
            for conversation in ([question, answer], [system, question, answer]):  # some demand a system turn
                try:
                    whole = self.apply(conversation)
                except UnusableError:
                    continue
                is_repeated = is_repeated or whole.count(PROBE) > 1
                if whole.count(PROBE) == 1:
                    self._begins_with_bos = whole.startswith(self._tokenizer.bos_token or "\0")
                    return whole.partition(PROBE)[2]
        raise refuse_template(self._tokenizer, f"{'repeats' if is_repeated else 'leaves out'} the assistant's answer")

    def _find_turns(self) -> tuple[str, str]:
        """Returns the word that begins a conversation, after a BOS, and the text that begins an answer.

        A text without a control token of today's models is returned as an empty text.
        """
        question: Messages = [{"role": "user", "content": "a question"}]
        try:
            before, _, after = self.open(question).partition("a question")
        except UnusableError:
            return "", ""
        bos, end = str(self._tokenizer.bos_token), self.end.strip()
        before = before.removeprefix(bos).lstrip()
        word = next((token for token in self._special if before.startswith(token)), before.split(" ")[0].split("\n")[0])
        generation = after.lstrip().removeprefix(end).lstrip()
        return word if self._has_control(word) else "", generation if self._has_control(generation) else ""

    def _has_control(self, text: str) -> bool:
        return any(word in text for word in self._special) or FOREIGN.search(text) is not None

    def _find_tokens(self, tail: str) -> str:
        """Returns the added tokens that a text begins with, up to other text; empty if it begins with none."""
        begin = tail[: len(tail) - len(tail.lstrip())]
        rest, tokens = tail[len(begin) :], ""
        longest_first = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        while token := next((token for token in longest_first if rest.startswith(token)), ""):
            tokens, rest = tokens + token, rest[len(token) :]
        return begin + tokens if tokens else ""

    def _find_ends(self) -> tuple[int, ...]:
        """Returns EOS, the last token of `end`, and the token that ends a turn with a tool call."""
        texts = [self.end]
        call = {"type": "function", "id": "probe1234", "function": {"name": "probe_tool", "arguments": {}}}
        question: Messages = [{"role": "user", "content": "a question"}]
        answer: Messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        with suppress(UnusableError):  # a template without tools
            texts.append(self._render(question, (answer, answer), None, {}).chosen.text)
        ids = [int(self._tokenizer.eos_token_id)]
        ids += [self._tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in texts]
        return tuple(dict.fromkeys(ids))

    # -- pairs ---------------------------------------------------------------------------------------------------------

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

    def is_rendered(self, prompt: str) -> bool:
        """Whether a text is a rendered conversation, not one that mentions a control token.

        Raises: UnusableError if it is rendered for another model.
        """
        text = self._without_bos(prompt).lstrip()
        generation = self._generation.strip()
        if (self._begin and text.startswith(self._begin)) or (generation and generation in text):
            return True
        foreign = FOREIGN.findall(text)
        begins = FOREIGN.match(re.sub(r"^(<s>|<bos>)\s*", "", text)) is not None
        if begins and len(foreign) > 1 and not any(word in self._text for word in foreign):
            raise UnusableError("rendered_for_other_model")
        return False

    def render_after(self, pair: Pair) -> RenderedPair:
        """Returns the texts of a pair whose prompt is already rendered: as they are, with an end and a BOS once.

        The answers may repeat the prompt, or the text that begins an answer.
        """
        parts = (pair.prompt, pair.chosen, pair.rejected)
        if pair.tools or pair.template_kwargs or not all(isinstance(part, str) for part in parts):
            raise UnusableError("rendered_prompt")
        prompt, *texts = (self._without_bos(str(part)) for part in parts)
        for repeated in (prompt, self._generation):
            if repeated and all(text.startswith(repeated) for text in texts):
                texts = [text[len(repeated) :] for text in texts]
                prompt = prompt.removesuffix(self._generation) + self._generation if repeated != prompt else prompt
        texts = [self._strip_ends(text) for text in texts]
        if not all(text.strip() for text in texts):
            raise UnusableError("empty_answer")
        if any(self.is_rendered(text) for text in texts):
            raise UnusableError("rendered_answer")
        bos = str(self._tokenizer.bos_token) if self._begins_with_bos else ""
        chosen, rejected = (RenderedAnswer(text + self.end) for text in texts)
        return RenderedPair(bos + prompt, chosen, rejected, frozenset({"rendered_already"}), is_joined=True)

    def _is_plain(self, pair: Pair, prompt: Messages) -> bool:
        """Whether each message has only text, and none that the template searches for."""
        if pair.tools or pair.template_kwargs or prompt[-1]["role"] == "assistant":
            return False
        if any(message.keys() != {"role", "content"} for message in prompt):
            return False
        texts = [pair.chosen, pair.rejected, *(message["content"] for message in prompt)]
        return all(isinstance(text, str) and not self._is_treated(text) for text in texts)

    def _is_treated(self, text: str) -> bool:
        """Whether a text has words that the template or `_clean` treats in a special way."""
        return any(word in text for word in self._searched) or FOREIGN.match(text) is not None

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
        if not probe or after != self.end or not all(self._is_boundary(rendered.prompt, begin) for begin in begins):
            return None
        spaces = {rendered.chosen.text: "stripped", f"{before} \n{PROBE} \n{after}": "kept"}
        options = next((o for text, o, _ in self._openings(prompt, {}) if text == rendered.prompt), {})
        if self.open(prompt, **options) != rendered.prompt:
            return None
        return _Frame(options, before, after, spaces.get(rendered.rejected.text, "unclear"), rendered.notes)

    def _render_in(self, frame: _Frame, prompt: Messages, answers: tuple[str, str]) -> RenderedPair | None:
        texts = [answer.strip() for answer in answers] if frame.spaces == "stripped" else list(answers)
        text = self.open(prompt, **frame.options)
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
        prompt = [self._clean(message) for message in prompt]
        chosen, rejected = ([self._clean(message, is_answer=True) for message in answer] for answer in answers)
        if not all(map(_says_something, (chosen[-1], rejected[-1]))):
            raise UnusableError("empty_answer")
        refusals = []
        for form in _find_forms([*prompt, *chosen, *rejected]):
            try:
                return self._render_as(
                    [form(message) for message in prompt],
                    [[form(message) for message in answer] for answer in (chosen, rejected)],
                    options,
                    frozenset({"other_role"}) if form.keywords["rename"] else frozenset(),
                )
            except UnusableError as error:
                refusals.append(error)
        raise refusals[0]

    def _render_as(
        self, prompt: Messages, answers: list[Messages], options: dict[str, Any], notes_of_form: frozenset[str]
    ) -> RenderedPair:
        wholes = [self.apply(_join(prompt, answer), **options) for answer in answers]
        for answer in answers:
            self._check_roles(_join(prompt, answer), options)
        is_open = all(answer[0]["role"] == "assistant" for answer in answers)
        for opening, used, note in self._openings(prompt, options, is_open=is_open):  # noqa: B007, used after the loop
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
            opening, note = self.open(prompt, **options), "reasoning_rebuilt"
            if not is_open or any(len(answer) > 1 for answer in answers):
                raise UnusableError("changed_by_template")
            texts = [self._rebuild(opening, whole, answer[0]) for answer, whole in zip(answers, wholes, strict=True)]
            scored = [None, None]
        notes = {*notes_of_form, *([note] if note else [])}
        if not all(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self._text) for name in options if name != "tools"):
            notes.add("argument_left_out")
        if (tools := options.get("tools")) and not all(_name(tool) in wholes[0] for tool in tools):
            notes.add("tools_left_out")
        rendered = []
        for text, spans, answer in zip(texts, scored, answers, strict=True):
            rendered.append(RenderedAnswer(self._end_turn(text), spans))
            if text.count(CLOSE) > sum(max(_text_of(message).count(CLOSE), 1) for message in answer):
                raise UnusableError("reasoning_doubled_by_template")
            for message in answer:
                if message["role"] == "assistant":
                    notes |= _check_written(message, text)
        is_joined = "reasoning_rebuilt" not in notes  # else the template never writes the common text
        return RenderedPair(opening, rendered[0], rendered[1], frozenset(notes), is_joined=is_joined)

    def _openings(
        self, prompt: Messages, options: Mapping[str, Any], *, is_open: bool = True
    ) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Yields the prompts that a server may be given: text, arguments, and a key of `tally.NOTES` or an empty text.

        `is_open`: whether the assistant's turn follows; else the text ends with the last message.
        """
        if not is_open:
            yield self.apply(prompt, **options), dict(options), ""
            return
        yield self.open(prompt, **options), dict(options), ""
        for switch in THINKING_SWITCHES:
            if switch in self._text and not options.keys() & THINKING_SWITCHES:
                for value in (True, False):
                    changed = {**options, switch: value}
                    yield self.open(prompt, **changed), changed, "other_thinking_mode"

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
        reasoning = _reasoning_of(answer, begin[1], close)
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
            openings = [text for text, *_ in self._openings(messages[:at], options) if whole.startswith(text)]
            if at == 0 or not openings:
                raise UnusableError("changed_by_template")
            until = len(whole) + len(self.end)  # the end may be added to what the template writes
            if at < len(messages) - 1:
                until = self._find_end_of_turn(whole, len(openings[0]), self.apply(messages[: at + 1], **options))
            spans.append((max(len(openings[0]), begin) - begin, until - begin))
        return tuple(spans)

    def _find_end_of_turn(self, whole: str, begin: int, turn: str) -> int:
        """Returns where an assistant's turn ends in a conversation, after the token that ends it.

        Args:
            whole: the rendered conversation.
            begin: where the turn begins in it.
            turn: the rendered conversation up to this turn, which may write it in another way.
        """
        body = turn.removesuffix(self._tail)
        if not whole.startswith(body):
            body = whole[: max(whole.find(self.end, begin), 0)]
        if len(body) <= begin:
            raise UnusableError("changed_by_template")
        end = next((token for token in (self.end, *self._special) if whole.startswith(token, len(body))), "")
        return len(body) + len(end)

    def _end_turn(self, text: str) -> str:
        """Returns an answer's text up to the token that ends its turn."""
        if text.endswith(self._tail):
            return text[: len(text) - len(self._tail)] + self.end
        if text.rstrip().endswith(self._special):  # such as a tool call's own end
            return text.rstrip()
        return text + self.end

    def _strip_ends(self, text: str) -> str:
        """Returns a text without an end that its row has written, which the template writes."""
        while text.rstrip().endswith(self._ends):
            for end in self._ends:
                text = text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text
        return text

    def _without_bos(self, text: str) -> str:
        bos = self._tokenizer.bos_token
        while bos and text.startswith(bos):
            text = text.removeprefix(bos)
        return text

    def _clean(self, message: dict[str, Any], *, is_answer: bool = False) -> dict[str, Any]:
        """Returns a message without the BOS, the ends and, of an answer, the beginning that the template writes itself.

        Raises: UnusableError for a rendered conversation in a message.
        """
        text = message.get("content")
        if not isinstance(text, str) or not self._has_control(text):
            return message
        text = self._strip_ends(self._without_bos(text))
        if is_answer and self._generation:
            text = text.removeprefix(self._generation)
        if message["role"] in ("user", "assistant") and self.is_rendered(text):
            raise UnusableError("rendered_answer" if is_answer else "rendered_prompt")
        return {**message, "content": text}

    def _check_roles(self, messages: Messages, options: Mapping[str, Any]) -> None:
        """Raises UnusableError if the template leaves out a message, or a tool call, in a conversation of this shape.

        A probe of the same shape shows it, once for each shape: its texts occur nowhere else.
        """
        shape = json.dumps([[_describe_shape(message) for message in messages], bool(options.get("tools"))])
        if shape not in self._left_out:
            self._left_out[shape] = self._find_left_out(messages, options)
        if self._left_out[shape]:
            raise UnusableError("left_out_by_template", self._left_out[shape])

    def _find_left_out(self, messages: Messages, options: Mapping[str, Any]) -> str:
        """Returns the role of the first message that the template leaves out, or "tool_calls"; else an empty text."""
        probes, marks = [], []
        for number, message in enumerate(messages):
            probe = dict(message)
            if message["role"] != "assistant" and _text_of(message).strip():
                probe["content"] = f"probe {number} of a text"
                marks.append((str(probe["content"]), str(message["role"])))
            if message.get("tool_calls"):
                probe["tool_calls"] = [
                    _rename_call(call, f"probe_{number}_{place}") for place, call in enumerate(message["tool_calls"])
                ]
                marks += [
                    (f"probe_{number}_{place}{end}", "tool_calls")
                    for place in range(len(probe["tool_calls"]))
                    for end in ("_", "x")
                ]
            probes.append(probe)
        try:
            whole = self.apply(probes, **options)
        except UnusableError:  # a template that compares texts, such as the names of tools
            return ""
        return next((kind for mark, kind in marks if mark not in whole), "")


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _join(prompt: Messages, answer: Messages) -> Messages:
    """Returns the conversation; an answer to a prompt that ends with the assistant's words continues them."""
    if prompt[-1]["role"] != "assistant":
        return [*prompt, *answer]
    first = {**prompt[-1], **answer[0], "content": _text_of(prompt[-1]) + _text_of(answer[0])}
    return [*prompt[:-1], first, *answer[1:]]


def _name(tool: Mapping[str, Any]) -> str:
    return str((tool.get("function") or tool).get("name") or "")


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(_text_of(message).strip()) or any(map(message.get, SAYINGS))


def _reasoning_of(message: Mapping[str, Any], begin: str = OPEN, close: str = CLOSE) -> str:
    """Returns the reasoning of a message, from its own key or from its text between `begin` and `close`."""
    apart = next((message[key] for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)), "")
    text = _text_of(message)
    return str(apart) or (text.partition(close)[0].rpartition(begin)[2] if close in text else "")


def _check_written(message: Mapping[str, Any], text: str) -> set[str]:
    """Returns a note if the text of an answer lacks the message's reasoning.

    Raises: UnusableError if it lacks the message's content, or says nothing without the reasoning.
    """
    content = _text_of(message)
    content = _squeeze(content.partition(CLOSE)[2] if CLOSE in content else content)
    if content not in _squeeze(text):
        raise UnusableError("left_out_by_template")
    if _squeeze(_reasoning_of(message)) in _squeeze(text):
        return set()
    if not content and not message.get("tool_calls"):
        raise UnusableError("left_out_by_template", "reasoning")
    return {"reasoning_left_out"}


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _describe_shape(message: Mapping[str, Any]) -> list[Any]:
    """Returns what decides which parts of a message a template writes, but not their texts."""
    calls = message.get("tool_calls") or ()
    arguments = [type((call.get("function") or call).get("arguments")).__name__ for call in calls]
    return [message["role"], bool(_text_of(message).strip()), arguments, sorted(message)]


def _rename_call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a tool call with the name `name_` and one argument with the value `name` + "x"."""
    function = dict(call.get("function") or call)
    arguments = {"probe": f"{name}x"}
    function["name"] = f"{name}_"
    function["arguments"] = json.dumps(arguments) if isinstance(function.get("arguments"), str) else arguments
    return {**call, "function": function} if "function" in call else function


# Roles that not every template knows, and the roles that say the same.
OTHER_ROLES = {"developer": "system", "function": "tool", "ipython": "tool"}


def _find_forms(messages: Messages) -> Iterator["partial[dict[str, Any]]"]:
    """Yields the forms in which published rows and templates write the same messages, the usual form first.

    The arguments of a tool call are a mapping or JSON; a call without text has "" or None; reasoning is part of the
    text, or of `reasoning_content`; and a role has another name.
    """
    has_calls = any(message.get("tool_calls") for message in messages)
    has_reasoning = any(CLOSE in _text_of(message) for message in messages)
    has_other_role = any(message["role"] in OTHER_ROLES for message in messages)
    for rename in (False, True)[: 1 + has_other_role]:
        for is_apart in (False, True)[: 1 + has_reasoning]:
            for empty in ("", None)[: 1 + has_calls]:
                for as_json in (False, True)[: 1 + has_calls]:
                    yield partial(_in_form, empty=empty, as_json=as_json, is_apart=is_apart, rename=rename)


def _in_form(
    message: dict[str, Any], *, empty: str | None, as_json: bool, is_apart: bool, rename: bool
) -> dict[str, Any]:
    if rename and message["role"] in OTHER_ROLES:
        message = {**message, "role": OTHER_ROLES[message["role"]]}
    text = _text_of(message)
    if is_apart and message["role"] == "assistant" and CLOSE in text and not message.get("reasoning_content"):
        reasoning, _, text = text.partition(CLOSE)
        reasoning = reasoning.rpartition(OPEN)[2].strip("\n")
        message = {**message, "content": text.lstrip("\n"), "reasoning_content": reasoning}
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or call)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise UnusableError("bad_arguments") from None
        function["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_json else arguments
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "content": message.get("content") or empty, "tool_calls": calls}
