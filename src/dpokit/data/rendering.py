"""Renders pairs and prompts as text, with or without a chat template, and encodes text as token ids."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpokit.data.chat_rendering import ChatRenderer, RenderedAnswer, RenderedPair
from dpokit.data.chat_template import ChatTemplate
from dpokit.data.control_words import ControlWords
from dpokit.data.formats import Pair
from dpokit.data.messages import Messages, UnusableError, count_letters, find_control_tokens, is_plain
from dpokit.data.template_box import PROBES
from dpokit.data.text_cache import TextCache
from dpokit.data.transcripts import (
    ASSISTANT,
    HUMAN,
    join_messages,
    open_transcript,
    parse_transcript,
    render_transcript,
)
from dpokit.errors import ModelError, SettingsError

Ids = list[int]
PROBE = "probe answer"
# Some tokenizers crash on gigabytes; this many characters are about 2 million tokens.
TEXT_LETTERS = 8 << 20


class Renderer:
    """Renders a pair as text, with the tokenizer's chat template or as an HH transcript, and encodes text.

    Args:
        tokenizer: of the model.
        template_date: for chat templates that write a date, as `2026-11-29`; None for the current date.
        prompt_format: how texts meet without a chat template: "transcript", or "raw" for texts as they are.

    Attributes:
        prompt_form: the form of the prompts, for data.json: "chat template", "HH transcript" or "raw".
        end: the text that ends an answer: EOS, or what the chat template writes.
        ends: token ids at which an answer ends, EOS first.
        end_count: how many of them `end` has; 1 for most templates.

    Raises: ModelError for a tokenizer without EOS, or with a template that cannot render a conversation. SettingsError
        for raw texts with a chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template_date: str | None = None, prompt_format: str = "transcript"
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, so no answer can end",
                expected="an EOS token",
                do="set eos_token in the model folder's tokenizer_config.json, or use another model",
            )
        self.tokenizer = tokenizer
        self._cache = TextCache()
        self.eos: str = tokenizer.eos_token
        self.adds_space = self._probe_spaces()
        self.fast = self._find_fast()
        self.chat: ChatRenderer | None = None
        if tokenizer.chat_template:
            self.chat = ChatRenderer(ChatTemplate(tokenizer, template_date), self._is_boundary)
        self.is_raw = prompt_format == "raw"
        if self.is_raw and self.chat is not None:
            raise SettingsError(
                "--prompt_format raw, but the model has a chat template, which joins prompts and answers",
                expected="a model without a chat template",
                do="leave --prompt_format out",
            )
        self.prompt_form = "chat template" if self.chat is not None else "raw" if self.is_raw else "HH transcript"
        self.end = self.eos if self.chat is None else self.chat.template.end
        self.ends = (int(tokenizer.eos_token_id),) if self.chat is None else self.chat.ends
        self.end_count = sum(number in self.ends for number in self.encode_continued([self.end])[0])
        self.control_words = ControlWords(tokenizer)

    def is_rendered(self, prompt: str) -> bool:
        """Whether a text is a conversation that is already rendered with the chat template."""
        return self.chat is not None and self.chat.template.is_rendered(prompt)

    def drop_tokens(self, text: str, number: int) -> str:
        """Returns a text without its first tokens; space at its start stays."""
        space = text[: len(text) - len(text.lstrip())]
        if not self.tokenizer.is_fast:
            rest = self.tokenizer.decode(self.encode([text])[0][number:])
        else:
            spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            rest = text[spans["offset_mapping"][number][0] :]
        return space + rest.lstrip()

    def _probe_spaces(self) -> bool:
        """Whether the tokenizer adds a space before every text, as SentencePiece does."""
        alone = self.tokenizer(" yes", add_special_tokens=False)["input_ids"]
        after = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        return bool(self.tokenizer.decode(after + alone) != "\n yes")

    def encode(self, texts: list[str], *, special: bool = False) -> list[Ids]:
        """Returns the token ids of each text, with the tokenizer's BOS and EOS if `special`.

        Equal texts share one list, which nobody may change. A text of the cache is not encoded again.
        """
        kept = ((text, self._cache.get(text, special=special)) for text in dict.fromkeys(texts))
        ids_of = {text: ids for text, ids in kept if ids is not None}
        new = [text for text in dict.fromkeys(texts) if text not in ids_of]
        for text, ids in zip(new, self._encode(new, special=special), strict=True):
            ids_of[text] = ids
            self._cache.add(text, ids, special=special)
        return [ids_of[text] for text in texts]

    def _encode(self, texts: list[str], *, special: bool) -> list[Ids]:
        if not texts:
            return []
        if self.fast is not None:
            return [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=special)]
        ids: list[Ids] = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return ids

    def _find_fast(self) -> Any:
        """Returns the Rust tokenizer, which skips masks and character offsets, if it gives the same ids; else None."""
        text = f" {PROBE}, \u00e9\u4f60 1\n\n{self.eos}{''.join(list(self.tokenizer.get_added_vocab())[:99])}"
        usual = [self.tokenizer([text], add_special_tokens=special)["input_ids"] for special in (False, True)]
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            return None
        ids = [[row.ids for row in fast.encode_batch_fast([text], add_special_tokens=s)] for s in (False, True)]
        return fast if ids == usual else None

    def open(self, messages: Messages, template: str | None = None) -> str:
        """Returns the text of a conversation up to the answer, rendered by `template` or by the tokenizer's template.

        Raw texts stay as they are, with an empty line between two of them.

        Raises: UnusableError for an empty conversation, or one that the template refuses.
        """
        if not messages:
            raise UnusableError("empty_prompt")
        if self.chat is not None:
            return self.chat.template.open(messages, **({} if template is None else {"chat_template": template}))
        return join_messages(messages) if self.is_raw else render_transcript(messages)

    def render(self, pair: Pair) -> RenderedPair:
        """Returns the texts of a pair. Raises: UnusableError with the reason for dropping the pair."""
        check_texts(pair)
        rendered = self._render_plain(pair) if self.chat is None else self._render_chat(self.chat, pair)
        if rendered.chosen == rendered.rejected:
            raise UnusableError("equal_answers")
        return rendered

    def _render_chat(self, chat: ChatRenderer, pair: Pair) -> RenderedPair:
        if not isinstance(pair.prompt, str):
            return chat.render(pair, pair.prompt)
        if chat.template.is_rendered(pair.prompt):
            return chat.render_after(pair)
        prompt = parse_transcript(pair.prompt)
        answers = (_strip_separator(answer, pair.prompt) for answer in (pair.chosen, pair.rejected))
        chosen, rejected = answers
        return chat.render(replace(pair, chosen=chosen, rejected=rejected), prompt)

    def _render_plain(self, pair: Pair) -> RenderedPair:
        """Renders a pair without a chat template; conversations become transcripts as in HH."""
        if pair.tools:
            raise UnusableError("needs_template", "tools")
        if self.is_raw and not all(map(_is_one_text, (pair.prompt, pair.chosen, pair.rejected))):
            raise UnusableError("raw_conversation")
        if isinstance(pair.prompt, str):
            return self._render_text(pair, pair.prompt)
        if self.is_raw:  # a single question, as `chat` and `serve` ask it
            return self._render_text(pair, pair.prompt[0]["content"])
        if pair.prompt[-1]["role"] == "assistant":  # the answers continue it
            prompt, is_apart = render_transcript(pair.prompt[:-1]) + f" {pair.prompt[-1]['content'].lstrip()}", False
        else:
            prompt, is_apart = render_transcript(pair.prompt), True
        chosen, rejected = (
            self._render_plain_answer(answer, is_apart=is_apart) for answer in (pair.chosen, pair.rejected)
        )
        return RenderedPair(prompt, chosen, rejected)

    def _render_text(self, pair: Pair, text: str) -> RenderedPair:
        """Renders a pair with a plain prompt and without a chat template: as a transcript, or as it is."""
        answers, notes = [pair.chosen, pair.rejected], frozenset[str]()
        foreign = find_control_tokens(text)
        if self.is_raw:
            prompt, begins_turn = text, False
            if not text[-1].isspace() and not all(
                answer[:1].isspace() for answer in answers if isinstance(answer, str)
            ):
                notes = frozenset({"no_separator"})
        elif foreign:
            if not all(word in self.tokenizer.get_added_vocab() for word in foreign):
                raise UnusableError("rendered_for_other_model")
            prompt, begins_turn, notes = text, False, frozenset({"rendered_already"})
        else:
            prompt, begins_turn = open_transcript(text)
        if begins_turn:  # as the model's own answer begins
            answers = [f" {a}" if isinstance(a, str) and not a[:1].isspace() else a for a in answers]
        chosen, rejected = (self._render_plain_answer(answer, is_apart=False) for answer in answers)
        return RenderedPair(prompt, chosen, rejected, notes)

    def _render_plain_answer(self, answer: str | Messages, *, is_apart: bool) -> RenderedAnswer:
        """Renders an answer; `is_apart` puts a space before it."""
        turns: Messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        text, scored = "", []
        for number, turn in enumerate(turns):
            transcript = render_transcript([turn]).removesuffix(ASSISTANT)
            if turn["role"] != "assistant":
                text += transcript
                continue
            content = turn["content"]
            if number:
                text += ASSISTANT
            while content.rstrip().endswith(self.eos):
                content = content.rstrip().removesuffix(self.eos)
            if not content.strip():
                raise UnusableError("empty_answer")
            content = f" {content.strip()}" if is_apart or number else content
            scored.append((len(text), len(text) + len(content)))
            text += content
        scored[-1] = (scored[-1][0], len(text) + len(self.eos))
        return RenderedAnswer(text + self.eos, tuple(scored) if len(turns) > 1 else None)

    def encode_prompts(self, texts: list[str]) -> list[Ids]:
        """Returns the token ids of rendered prompts, without an EOS of the tokenizer."""
        # A chat template writes its own BOS; a plain prompt gets the tokenizer's, as at inference.
        ids = self.encode(texts, special=self.chat is None)
        # Some tokenizers end every text with EOS, which would end the prompt.
        end = [self.tokenizer.eos_token_id]
        return [
            row[:-1] if row[-1:] == end and not text.endswith(self.eos) else row
            for row, text in zip(ids, texts, strict=True)
        ]

    def encode_messages(self, messages: Messages) -> Ids:
        """Returns the token ids of a conversation up to the answer; control words in its messages stay text.

        Raises: UnusableError as `prompt` and `ControlWords.split`.
        """
        marked = self.control_words.mark(messages)
        if marked is None:
            return self.encode_prompts([self.open(messages)])[0]
        messages, mark = marked
        first, *others = self.open(messages, self._mark_template(mark)).split(mark)
        return [*self.encode_prompts([first])[0], *chain.from_iterable(self._continue(others))]

    def _mark_template(self, mark: str) -> str | None:
        """Returns the template for messages with marks, or None if it renders the probes in another way."""
        template = self.control_words.mark_template(mark)
        for probe in PROBES if template is not None else ():
            try:
                if self.open(probe, template) != self.open(probe):
                    return None
            except UnusableError:  # such as a system turn
                continue
        return template

    def encode_continued(self, texts: list[str]) -> list[Ids]:
        """Returns the ids of answers without a BOS, encoded apart from the prompt: they begin at a token boundary.

        SentencePiece tokenizers add a space before every text. For them the answer is encoded after a newline, whose
        tokens are removed.
        """
        if not self.adds_space:
            return self.encode(texts)
        newline = len(self.encode(["\n"])[0])
        return [row[newline:] for row in self.encode(["\n" + text for text in texts])]

    def _is_boundary(self, before: str, after: str) -> bool:
        """Whether a prompt and the beginning of an answer have the same token ids apart and joined."""
        return self.encode([before])[0] + self.encode_continued([after])[0] == self.encode([before + after])[0]

    def find_mask(self, prompt: str, answer: RenderedAnswer, ids: Ids) -> list[int]:
        """Returns 1 for each token of an answer that the assistant wrote, else 0.

        Args:
            prompt: the text before the answer.
            answer: with its scored parts.
            ids: of the answer, encoded after the prompt or after one of the texts of `encode_continued`.

        Raises: UnusableError for a tokenizer that does not tell where its tokens stand.
        """
        if not self.tokenizer.is_fast:
            raise UnusableError("needs_fast_tokenizer")
        for before in (prompt, "\n", ""):
            encoded = self.tokenizer(
                before + answer.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            first = len(encoded["input_ids"]) - len(ids)
            if first >= 0 and encoded["input_ids"][first:] == ids:
                begins = _find_begins(encoded["offset_mapping"])[first:]
                places = [max(begin - len(before), 0) for begin in begins]
                return [int(any(a <= place < b for a, b in answer.scored or ())) for place in places]
        raise UnusableError("needs_fast_tokenizer")

    def _continue(self, texts: list[str]) -> list[Ids]:
        """Returns the ids of each text as a continuation: without a BOS, and without a space that the tokenizer adds.

        A tokenizer that adds a space also adds it before a newline, so the text is encoded after a newline, whose
        tokens are removed.
        """
        alone = [self.encode([letter])[0] for letter in "ab"]
        if self.tokenizer.decode(alone[0] + alone[1]) == "ab":
            return self.encode(texts)
        newline = self.encode(["\n"])[0]
        rows = zip(self.encode(["\n" + text for text in texts]), self.encode(texts), strict=True)
        return [row[len(newline) :] if row[: len(newline)] == newline else plain for row, plain in rows]


def check_texts(pair: Pair) -> None:
    """Raises UnusableError for a pair that no model can use: a prompt or an answer is empty or too long."""
    if not (pair.prompt.strip() if isinstance(pair.prompt, str) else pair.prompt):
        raise UnusableError("empty_prompt")
    if max(count_letters(part) for part in (pair.prompt, pair.chosen, pair.rejected)) > TEXT_LETTERS:
        raise UnusableError("too_long_text")
    for answer in (pair.chosen, pair.rejected):
        if not (answer.strip() if isinstance(answer, str) else answer):
            raise UnusableError("empty_answer")


def _is_one_text(part: str | Messages) -> bool:
    """Whether a prompt or an answer is one text, without a system turn or further turns, whose roles would be lost."""
    return isinstance(part, str) or (len(part) == 1 and part[0]["role"] in ("user", "assistant") and is_plain(part[0]))


def _find_begins(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Returns where each token begins: some tokenizers leave white space out of the spans of its tokens."""
    begins, end = [], 0
    for first, last in spans:
        begins.append(min(first, end) if last > first else end)  # the tokens of one letter's bytes have the same span
        end = max(end, last)
    return begins


def _strip_separator(answer: str | Messages, prompt: str) -> str | Messages:
    """Returns an answer without the space that separates it from a plain prompt; an indented answer stays as it is."""
    if not isinstance(answer, str):
        return answer
    if HUMAN in prompt:
        return answer.strip()
    return answer[1:] if answer[:1] == " " and not answer[1:2].isspace() else answer
