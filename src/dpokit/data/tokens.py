"""Turns pairs into token ids: the prompt as at inference, answers that end with EOS, both cut to the same limits."""

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
# Some tokenizers crash on gigabytes; this many characters are about 2 million tokens.
TEXT_LETTERS = 8 << 20


@dataclass(frozen=True)
class LengthLimits:
    """The most tokens of a prompt, of an answer, and of both together; None for no limit."""

    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    total_tokens: int | None = None


def cut(
    prompt: Ids, chosen: Ids, rejected: Ids, limits: LengthLimits, *, keep_first: bool = False
) -> tuple[Ids, Ids, Ids]:
    """Cuts a pair to the limits: the prompt keeps its end, the answers keep their start, and both have one prompt.

    If prompt and answer exceed `total_tokens`, the cut shortens the prompt's start first, down to the one token that
    predicts the answer's first token, and then the answer's end.

    Args:
        prompt, chosen, rejected: token ids.
        limits: the limits.
        keep_first: whether the prompt's first token is a BOS, which stays.

    Raises:
        UnusableError: `no_room` if the limits leave no token of the prompt or of an answer.
    """
    chosen, rejected = chosen[: limits.answer_tokens], rejected[: limits.answer_tokens]
    fixed = int(keep_first)
    prompt_limit = len(prompt) if limits.prompt_tokens is None else limits.prompt_tokens
    if limits.total_tokens is not None:
        longest = max(len(chosen), len(rejected))
        prompt_limit = min(prompt_limit, max(limits.total_tokens - longest, fixed + 1))
        answer_limit = max(limits.total_tokens - min(prompt_limit, len(prompt)), 0)
        chosen, rejected = chosen[:answer_limit], rejected[:answer_limit]
    if len(prompt) > prompt_limit:
        if prompt_limit <= fixed:
            raise UnusableError("no_room")
        prompt = prompt[:fixed] + prompt[len(prompt) - prompt_limit + fixed :]
    if not chosen or not rejected:
        raise UnusableError("no_room")
    return prompt, chosen, rejected


class Renderer:
    """Renders a pair as text, with the tokenizer's chat template or as an HH transcript, and encodes text.

    Raises: ModelError for a tokenizer without EOS, or with a template that leaves out the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token, so no answer can end",
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
        self.adds_space = self._probe_spaces()
        self.fast = self._find_fast()
        self.control_words = ControlWords(tokenizer)

    def _probe_template(self) -> tuple[str, str]:
        """Returns the template's text before an answer (such as a think block) and after it, to the end of the turn."""
        question: Messages = [{"role": "user", "content": "probe question"}]
        prompt = self._apply(question, open_turn=True)
        whole = self._apply([*question, {"role": "assistant", "content": PROBE}], open_turn=False)
        before, probe, after = whole.rpartition(PROBE)
        if not probe:
            raise ModelError(
                "the chat template leaves the assistant's answer out",
                expected="a template that renders user and assistant turns",
                do="use a tokenizer with a chat template for conversations",
            )
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        if self.eos in after:
            return lead, after[: after.index(self.eos)] + self.eos
        # Gemma and others end a turn with another special token than EOS; generation also stops at it.
        ends = [(after.index(t), t) for t in self.tokenizer.get_added_vocab() if t in after]
        return lead, after[: min(ends)[0]] + min(ends)[1] if ends else self.eos

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens that end a turn, EOS first."""
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *self.encode([self.tail])[0][-1:]]))

    def _apply(self, messages: Messages, *, open_turn: bool, template: str | None = None) -> str:
        return render_in_bounds(self.tokenizer, messages, chat_template=template, add_generation_prompt=open_turn)

    def _probe_spaces(self) -> bool:
        """Whether the tokenizer adds a space before every text, as SentencePiece does."""
        alone = self.tokenizer(" yes", add_special_tokens=False)["input_ids"]
        after = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        return bool(self.tokenizer.decode(after + alone) != "\n yes")

    def encode(self, texts: list[str], *, special: bool = False) -> list[Ids]:
        """Returns the token ids of each text, with the tokenizer's BOS and EOS if `special`."""
        if self.fast is not None:
            return [encoding.ids for encoding in self.fast.encode_batch_fast(texts, add_special_tokens=special)]
        ids: list[Ids] = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        return ids

    def _find_fast(self) -> Any:
        """Returns the Rust tokenizer, which skips masks and character offsets, if it gives the same ids; else None."""
        text = f" {PROBE}, \u00e9\u4f60 1\n\n{self.eos}{self.tail}"
        usual = [self.tokenizer([text], add_special_tokens=special)["input_ids"] for special in (False, True)]
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            return None
        ids = [[row.ids for row in fast.encode_batch_fast([text], add_special_tokens=s)] for s in (False, True)]
        return fast if ids == usual else None

    def prompt(self, prompt: str | Messages, template: str | None = None) -> str:
        """Returns the prompt's text up to the answer, rendered by `template` or by the tokenizer's chat template.

        Raises: UnusableError for an empty prompt, or a prompt that the template refuses.
        """
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise UnusableError("empty_prompt")
        if self.is_chat:
            try:
                messages = parse_transcript(prompt) if isinstance(prompt, str) else prompt
                return self._apply(messages, open_turn=True, template=template)
            except TemplateError as error:  # such as a system turn, or two questions in a row
                raise UnusableError("refused_by_template") from error
        return prompt if isinstance(prompt, str) else render_transcript(prompt)

    def encode_prompts(self, texts: list[str]) -> list[Ids]:
        """Returns the token ids of rendered prompts, without an EOS of the tokenizer."""
        # A chat template writes its own BOS; a plain prompt gets the tokenizer's, as at inference.
        ids = self.encode(texts, special=not self.is_chat)
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
            return self.encode_prompts([self.prompt(messages)])[0]
        messages, mark = marked
        first, *others = self.prompt(messages, self._mark_template(mark)).split(mark)
        return [*self.encode_prompts([first])[0], *chain.from_iterable(self._continue(others))]

    def _mark_template(self, mark: str) -> str | None:
        """Returns the template for messages with marks, or None if it renders the probes in another way."""
        template = self.control_words.mark_template(mark)
        for probe in PROBES if template is not None else ():
            try:
                if self._apply(probe, open_turn=True, template=template) != self._apply(probe, open_turn=True):
                    return None
            except TemplateError:  # such as a system turn
                continue
        return template

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

    def answer(self, answer: str, prompt: str | Messages) -> str:
        """Returns the answer's text with its end of turn and one EOS. Raises: UnusableError for an empty answer."""
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
    """Turns batches of rows into `prompt_ids`, `chosen_ids` and `rejected_ids`, or into a reason for dropping them."""

    renderer: Renderer
    layout: Format
    limits: LengthLimits

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Encodes a batch of columns, row by row; `dropped` is a reason or empty, `cut` names the shortened parts."""
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
        """Encodes a batch and leaves out the dropped rows."""
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
        """Returns the ids of answers without a BOS, encoded apart from the prompt: they begin at a token boundary.

        SentencePiece tokenizers add a space before every text. For them the answer is encoded after a newline, whose
        tokens are removed.
        """
        encode = self.renderer.encode
        if not self.renderer.adds_space:
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
