"""Pairs -> token ids: the prompt rendered as the model will meet it, answers that end with EOS, one cut for both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpokit.data.columns import FEATURES
from dpokit.data.control_words import ControlWords
from dpokit.data.formats import Format, Messages, Pair, UnusableError, parse_transcript, render_transcript
from dpokit.data.template_box import PROBES, check_template, render_in_bounds
from dpokit.errors import ModelError

Ids = list[int]
PROBE = "probe answer"
# Some tokenizers end the process on gigabytes; this many letters are some 2 million tokens.
TEXT_LETTERS = 8 << 20


@dataclass(frozen=True)
class Limits:
    """The most tokens of a prompt, of an answer, and of both together; None is no limit."""

    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    total_tokens: int | None = None


def cut(prompt: Ids, chosen: Ids, rejected: Ids, limits: Limits, *, keep_first: bool = False) -> tuple[Ids, Ids, Ids]:
    """Cuts a pair to its limits: a prompt keeps its end, an answer its start, both answers share one prompt.

    Where prompt and answer exceed `total_tokens`, the prompt's head yields first (down to one token, from which the
    answer's first is predicted), then the answer's tail.

    Args:
        keep_first: the prompt's first token is a BOS, which stays.

    Raises:
        UnusableError: `no_room` where the limits leave no prompt token and answer token.
    """
    chosen, rejected = chosen[: limits.answer_tokens], rejected[: limits.answer_tokens]
    fixed = int(keep_first)
    room = len(prompt) if limits.prompt_tokens is None else limits.prompt_tokens
    if limits.total_tokens is not None:
        longest = max(len(chosen), len(rejected))
        room = min(room, max(limits.total_tokens - longest, fixed + 1))
        answer_room = limits.total_tokens - min(room, len(prompt))
        chosen, rejected = chosen[: max(answer_room, 0)], rejected[: max(answer_room, 0)]
    if len(prompt) > room:
        if room <= fixed:
            raise UnusableError("no_room")
        prompt = prompt[:fixed] + prompt[len(prompt) - room + fixed :]
    if not chosen or not rejected:
        raise UnusableError("no_room")
    return prompt, chosen, rejected


class Renderer:
    """Turns a pair into the texts that a tokenizer gets: by its chat template, or as an HH transcript.

    Raises: ModelError for a tokenizer without EOS (no answer could end), or with a template that hides the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, so no answer could ever end",
                expected="an EOS token",
                do="set eos_token in the model folder's tokenizer_config.json, or use another model",
            )
        self.tokenizer = tokenizer
        self.eos: str = tokenizer.eos_token
        self.is_chat = tokenizer.chat_template is not None
        self.lead: str = ""
        self.tail: str = self.eos
        if self.is_chat:
            check_template(tokenizer)
            self.lead, self.tail = self._probe_template()
        self.spaces_alone = self._probe_spaces()
        self.fast = self._find_fast()
        self.control_words = ControlWords(tokenizer)

    def _probe_template(self) -> tuple[str, str]:
        """What the template puts before an answer (a think block, say) and after it, up to what ends the turn."""
        question: Messages = [{"role": "user", "content": "probe question"}]
        prompt = self._apply(question, open_turn=True)
        whole = self._apply([*question, {"role": "assistant", "content": PROBE}], open_turn=False)
        before, found, after = whole.rpartition(PROBE)
        if not found:
            raise ModelError(
                "the chat template leaves the assistant's answer out",
                expected="a template that renders user and assistant turns",
                do="use a tokenizer with a chat template for conversations",
            )
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        if self.eos in after:
            return lead, after[: after.index(self.eos)] + self.eos
        # Gemma and others end a turn with a special token that is not the EOS: generation stops there just the same.
        ends = [(after.index(t), t) for t in self.tokenizer.get_added_vocab() if t in after]
        return lead, after[: min(ends)[0]] + min(ends)[1] if ends else self.eos

    def _apply(self, messages: Messages, *, open_turn: bool, template: str | None = None) -> str:
        return render_in_bounds(self.tokenizer, messages, chat_template=template, add_generation_prompt=open_turn)

    def _probe_spaces(self) -> bool:
        """Whether the tokenizer writes a space before every text that stands alone, as SentencePiece does."""
        alone = self.tokenizer(" yes", add_special_tokens=False)["input_ids"]
        after = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        return bool(self.tokenizer.decode(after + alone) != "\n yes")

    def encode(self, texts: list[str], *, special: bool = False) -> list[Ids]:
        """Token ids of each text, with the tokenizer's BOS and EOS where `special`."""
        if self.fast is not None:
            return [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=special)]
        ids: list[Ids] = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return ids

    def _find_fast(self) -> Any:
        """The Rust tokenizer, which needs no masks and character offsets, where it gives the same ids; else None."""
        text = f" {PROBE}, \u00e9\u4f60 1\n\n{self.eos}{self.tail}"
        usual = [self.tokenizer([text], add_special_tokens=special)["input_ids"] for special in (False, True)]
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            return None
        same = [[one.ids for one in fast.encode_batch_fast([text], add_special_tokens=s)] for s in (False, True)]
        return fast if same == usual else None

    def prompt(self, prompt: str | Messages, template: str | None = None) -> str:
        """The prompt's text, ready for the answer; by this chat template, if any, in place of the tokenizer's.

        Raises: UnusableError for none, or one the template refuses.
        """
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise UnusableError("empty_prompt")
        if self.is_chat:
            try:
                messages = parse_transcript(prompt) if isinstance(prompt, str) else prompt
                return self._apply(messages, open_turn=True, template=template)
            except TemplateError as error:  # no system turn, say, or two questions in a row
                raise UnusableError("refused_by_template") from error
        return prompt if isinstance(prompt, str) else render_transcript(prompt)

    def encode_prompts(self, texts: list[str]) -> list[Ids]:
        """Token ids of rendered prompts, open for the answer."""
        # A chat template writes its own BOS; a plain prompt gets the tokenizer's, as at inference.
        ids = self.encode(texts, special=not self.is_chat)
        # Tokenizers that close every text with EOS would end the prompt.
        end = [self.tokenizer.eos_token_id]
        return [
            row[:-1] if row[-1:] == end and not text.endswith(self.eos) else row
            for row, text in zip(ids, texts, strict=True)
        ]

    def encode_messages(self, messages: Messages) -> Ids:
        """Token ids of a conversation, open for the answer; control words in its messages stay text.

        Raises: UnusableError as `prompt` and `ControlWords.split`.
        """
        marked = self.control_words.mark(messages)
        if marked is None:
            return self.encode_prompts([self.prompt(messages)])[0]
        messages, mark = marked
        first, *others = self.prompt(messages, self._mark_template(mark)).split(mark)
        return [*self.encode_prompts([first])[0], *chain.from_iterable(self._continue(others))]

    def _mark_template(self, mark: str) -> str | None:
        """The template for messages with marks; None for the tokenizer's own, where the other is not like it."""
        template = self.control_words.mark_template(mark)
        for probe in PROBES if template is not None else ():
            try:
                if self._apply(probe, open_turn=True, template=template) != self._apply(probe, open_turn=True):
                    return None
            except TemplateError:  # no system turn, say
                continue
        return template

    def _continue(self, texts: list[str]) -> list[Ids]:
        """Ids of each text as it follows another: without a BOS, and without the space that some write before a text.

        Those that do write it before a newline, too, whose tokens are taken off again.
        """
        alone = [self.encode([letter])[0] for letter in "ab"]
        if self.tokenizer.decode(alone[0] + alone[1]) == "ab":
            return self.encode(texts)
        newline = self.encode(["\n"])[0]
        rows = zip(self.encode(["\n" + text for text in texts]), self.encode(texts), strict=True)
        return [row[len(newline) :] if row[: len(newline)] == newline else plain for row, plain in rows]

    def answer(self, answer: str, prompt: str | Messages) -> str:
        """The answer's text with its end, EOS exactly once. Raises: UnusableError for one without a word."""
        while answer.rstrip().endswith(self.eos):
            answer = answer.rstrip().removesuffix(self.eos)
        if not answer.strip():
            raise UnusableError("empty_answer")
        if self.is_chat:
            return self.lead + answer.strip() + self.tail
        if not isinstance(prompt, str):
            answer = " " + answer.strip()
        return answer + self.tail


@dataclass
class Encoder:
    """Rows of one format -> `prompt_ids`, `chosen_ids`, `rejected_ids`, in batches; each drop has its reason."""

    renderer: Renderer
    layout: Format
    limits: Limits

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """A batch of columns -> as many rows, with `dropped` (a reason, or empty) and `cut` (which parts were)."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        prompts, chosens, rejecteds, reasons = [], [], [], []
        for row in rows:
            texts, reason = self._texts(row)
            prompts.append(texts[0])
            chosens.append(texts[1])
            rejecteds.append(texts[2])
            reasons.append(reason)
        columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
        encoded = zip(
            self.renderer.encode_prompts(prompts), self._answer_ids(chosens), self._answer_ids(rejecteds), strict=True
        )
        for ids, reason, index in zip(encoded, reasons, indices, strict=True):
            ids, reason, parts = self._cut(ids, reason)
            for name, value in zip(columns, (*ids, index, reason, parts), strict=True):
                columns[name].append(value)
        return columns

    def encode_usable(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """The same without the rows that are dropped."""
        columns = self(batch, indices)
        used = [not reason for reason in columns["dropped"]]
        return {name: list(compress(values, used)) for name, values in columns.items()}

    def _texts(self, row: Mapping[str, Any]) -> tuple[tuple[str, str, str], str]:
        try:
            pair: Pair = self.layout.to_pair(row)
            turns = [pair.prompt] if isinstance(pair.prompt, str) else [turn["content"] for turn in pair.prompt]
            if max(len(text) for text in (pair.chosen, pair.rejected, *turns)) > TEXT_LETTERS:
                raise UnusableError("too_long_text")
            prompt = self.renderer.prompt(pair.prompt)
            chosen = self.renderer.answer(pair.chosen, pair.prompt)
            rejected = self.renderer.answer(pair.rejected, pair.prompt)
            if chosen == rejected:
                raise UnusableError("equal_answers")
        except UnusableError as reason:
            return ("", "", ""), str(reason)
        return (prompt, chosen, rejected), ""

    def _answer_ids(self, texts: list[str]) -> list[Ids]:
        """Ids of answers as they follow a prompt: by themselves, so that they begin on a token boundary; no BOS.

        SentencePiece tokenizers write a space before a text that stands alone. There the answer is encoded behind a
        newline, whose tokens are taken off again.
        """
        encode = self.renderer.encode
        if not self.renderer.spaces_alone:
            return encode(texts)
        newline = len(encode(["\n"])[0])
        return [row[newline:] for row in encode(["\n" + text for text in texts])]

    def _cut(self, ids: tuple[Ids, Ids, Ids], reason: str) -> tuple[tuple[Ids, Ids, Ids], str, str]:
        if reason:
            return ([], [], []), reason, ""
        keep_first = ids[0][:1] == [self.renderer.tokenizer.bos_token_id]
        try:
            short = cut(*ids, self.limits, keep_first=keep_first)
            if short[1] == short[2]:
                raise UnusableError("equal_after_cut")
        except UnusableError as error:
            return ([], [], []), str(error), ""
        parts = ["prompt"] if len(short[0]) < len(ids[0]) else []
        parts += ["answer"] if len(short[1]) < len(ids[1]) or len(short[2]) < len(ids[2]) else []
        return short, "", " ".join(parts)
