"""A tokenizer's chat template: the text that it makes of a conversation, and how it begins and ends a turn."""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpokit.data.control_words import find_searched
from dpokit.data.message_forms import CLOSE, OPEN, read_content
from dpokit.data.messages import CONTROL_TOKENS, Messages, UnusableError, find_control_tokens
from dpokit.data.template_box import check_template, refuse_template, render_in_bounds
from dpokit.errors import ModelError

PROBE = 'a probe: "x" <b>&\n\n  it\'s \u00e9'  # what a template may change: quotes, tags, lines, other letters
THINKING_SWITCHES = ("enable_thinking", "thinking")  # arguments of templates: Qwen's, DeepSeek's
CALL_OF_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # transformers offers this function to templates


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: with a chat template and an EOS token.
        template_date: for templates that write a date, as `2026-11-29`; None for the current date.

    Attributes:
        bos: the BOS with which it begins a conversation, or an empty text.
        answer_start: the control tokens that begin an answer, or an empty text.
        end: the token, or tokens, that end an assistant's turn; EOS if the template writes none.

    Raises: ModelError for a template that cannot render a conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_date: str | None = None) -> None:
        self.tokenizer = tokenizer
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
        self.bos = ""
        self._tail = self._probe()
        run = self._find_tokens(self._tail)
        self.end: str = run or str(tokenizer.eos_token)
        self._begin, self.answer_start = self._find_turns()
        self._ends = tuple(dict.fromkeys((self.end.strip(), str(tokenizer.eos_token))))
        # The words for which a conversation is rendered whole.
        searched = (OPEN, CLOSE, *find_searched(self._text), *self._ends, tokenizer.bos_token, self._begin)
        searched += (self.answer_start.strip(),)
        self._searched = tuple(dict.fromkeys(word for word in searched if word))
        self._left_out: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # `datasets` recognises prepared data by the pickled renderer.
        return self.__dict__ | {"_left_out": {}}

    def apply(self, messages: Messages, **options: Any) -> str:
        """Returns the text of a conversation. Raises: UnusableError if the template refuses it; ModelError."""
        if self._in_parts:
            messages = [_in_parts(message) for message in messages]
        if self._today is not None:
            options["chat_template"] = self._with_date(options.get("chat_template"), options.get("tools"))
        try:
            return render_in_bounds(self.tokenizer, messages, **options)
        except ModelError:
            raise
        except Exception as error:  # a template is a program, and may fail in any way
            raise UnusableError("refused_by_template") from error

    def _with_date(self, template: str | None, tools: Any) -> str:
        """Returns a template, by default the tokenizer's, with the run's date in place of the current one."""
        template = template or str(self.tokenizer.get_chat_template(tools=tools))
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
                    bos = str(self.tokenizer.bos_token or "")
                    self.bos = bos if whole.startswith(bos) else ""
                    return whole.partition(PROBE)[2]
        raise refuse_template(self.tokenizer, f"{'repeats' if is_repeated else 'leaves out'} the assistant's answer")

    def _find_turns(self) -> tuple[str, str]:
        """Returns the word that begins a conversation, after a BOS, and the text that begins an answer.

        A text without a control token of today's models is returned as an empty text.
        """
        question: Messages = [{"role": "user", "content": "a question"}]
        try:
            before, _, after = self.open(question).partition("a question")
        except UnusableError:
            return "", ""
        bos, end = str(self.tokenizer.bos_token), self.end.strip()
        before = before.removeprefix(bos).lstrip()
        word = next((token for token in self._special if before.startswith(token)), before.split(" ")[0].split("\n")[0])
        generation = after.lstrip().removeprefix(end).lstrip()
        return word if self._has_control(word) else "", generation if self._has_control(generation) else ""

    def _has_control(self, text: str) -> bool:
        return any(word in text for word in self._special) or CONTROL_TOKENS.search(text) is not None

    def _find_tokens(self, tail: str) -> str:
        """Returns the added tokens that a text begins with, up to other text; empty if it begins with none."""
        begin = tail[: len(tail) - len(tail.lstrip())]
        rest, tokens = tail[len(begin) :], ""
        longest_first = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        while token := next((token for token in longest_first if rest.startswith(token)), ""):
            tokens, rest = tokens + token, rest[len(token) :]
        return begin + tokens if tokens else ""

    def is_rendered(self, prompt: str) -> bool:
        """Whether a text is a rendered conversation, not one that mentions a control token.

        Raises: UnusableError if it is rendered for another model.
        """
        text = self.remove_bos(prompt).lstrip()
        generation = self.answer_start.strip()
        if (self._begin and text.startswith(self._begin)) or (generation and generation in text):
            return True
        foreign = find_control_tokens(text)
        if foreign and not any(word in self._text for word in foreign):
            raise UnusableError("rendered_for_other_model")
        return False

    def reads(self, name: str) -> bool:
        """Whether the template has this word, such as the name of one of its arguments."""
        return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", self._text) is not None

    def is_treated(self, text: str) -> bool:
        """Whether a text has words that the template or `clean` treats in a special way."""
        return any(word in text for word in self._searched) or CONTROL_TOKENS.match(text) is not None

    def openings(
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

    def end_turn(self, text: str) -> str:
        """Returns an answer's text up to the token that ends its turn."""
        if text.endswith(self._tail):
            return text[: len(text) - len(self._tail)] + self.end
        if text.rstrip().endswith(self._special):  # such as a tool call's own end
            return text.rstrip()
        return text + self.end

    def find_end_of_turn(self, whole: str, begin: int, turn: str) -> int:
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

    def strip_ends(self, text: str) -> str:
        """Returns a text without an end that its row has written, which the template writes."""
        while text.rstrip().endswith(self._ends):
            for end in self._ends:
                text = text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text
        return text

    def remove_bos(self, text: str) -> str:
        """Returns a text without the BOS, or several, at its beginning."""
        bos = self.tokenizer.bos_token
        while bos and text.startswith(bos):
            text = text.removeprefix(bos)
        return text

    def clean(self, message: dict[str, Any], *, is_answer: bool = False) -> dict[str, Any]:
        """Returns a message without the BOS, the ends and, of an answer, the beginning that the template writes itself.

        Raises: UnusableError for a rendered conversation in a message.
        """
        text = message.get("content")
        if not isinstance(text, str) or not self._has_control(text):
            return message
        text = self.strip_ends(self.remove_bos(text))
        if is_answer and self.answer_start:
            text = text.removeprefix(self.answer_start)
        if message["role"] in ("user", "assistant") and self.is_rendered(text):
            raise UnusableError("rendered_answer" if is_answer else "rendered_prompt")
        return {**message, "content": text}

    def check_roles(self, messages: Messages, options: Mapping[str, Any]) -> None:
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
            if message["role"] != "assistant" and read_content(message).strip():
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


def _describe_shape(message: Mapping[str, Any]) -> list[Any]:
    """Returns what decides which parts of a message a template writes, but not their texts."""
    calls = message.get("tool_calls") or ()
    arguments = [type((call.get("function") or call).get("arguments")).__name__ for call in calls]
    return [message["role"], bool(read_content(message).strip()), arguments, sorted(message)]


def _rename_call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a tool call with the name `name_` and one argument with the value `name` + "x"."""
    function = dict(call.get("function") or call)
    arguments = {"probe": f"{name}x"}
    function["name"] = f"{name}_"
    function["arguments"] = json.dumps(arguments) if isinstance(function.get("arguments"), str) else arguments
    return {**call, "function": function} if "function" in call else function
