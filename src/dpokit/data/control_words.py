"""Control words that stand in a message stay text: a visitor's <|im_end|> ends nobody's turn."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from dpokit.data.formats import Messages, UnusableError

_FORM = re.compile(r"<[|\uff5c].*[|\uff5c]>")  # DeepSeek writes a wide bar
# Where no letter of any language stands: Unicode gives these planes to whoever wants them.
_PRIVATE = range(0xF0000, 0x10FFFE)


class ControlWords:
    """The tokens of a tokenizer that steer a conversation, and how messages are kept from making them.

    A token steers where the tokenizer calls it special, where the chat template writes it, and where it has the form
    <|...|>. The others that were added to a vocabulary are ordinary words: Gemma's HTML tags, terms of a field.

    A tokenizer finds these words in any text that it gets. So each one that stands in a message is cut behind its first
    character by a mark, the conversation is rendered, and what stands between the marks is encoded by itself.

    Attributes:
        ids: of the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        words = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip() and (token.special or self._steers(token.content))
        }
        self.ids = frozenset(words)
        self._words = frozenset(words.values())
        longest_first = sorted(words.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _steers(self, word: str) -> bool:
        return bool(_FORM.fullmatch(word)) or (word in self._template and not word.strip().isalnum())

    def split(self, text: str) -> list[str]:
        """The text in parts of which none holds a control word; one part where it holds none.

        Raises: UnusableError: a control word of one character, which cannot be cut.
        """
        parts = [text]
        while True:  # words may overlap, so that a cut leaves another one whole
            cuts = [list(_find_cuts(part, spans)) for part, spans in zip(parts, self._find(parts), strict=True)]
            if not any(cuts):
                return parts
            parts = [
                part[start:end]
                for part, places in zip(parts, cuts, strict=True)
                for start, end in pairwise([0, *places, len(part)])
            ]

    def _find(self, texts: list[str]) -> Iterator[list[tuple[int, int]]]:
        """Where the control words of each text stand."""
        if not self._tokenizer.is_fast:
            yield from ([word.span() for word in self._pattern.finditer(text)] for text in texts)
            return
        # By the tokens themselves: a normalizer makes control words of other letters, of wide ones for instance.
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for text, numbers, spans in rows:
            yield [
                (start, end)
                for number, (start, end) in zip(numbers, spans, strict=True)
                if number in self.ids and not self._is_unknown(number, text[start:end])
            ]

    def _is_unknown(self, number: int, text: str) -> bool:
        """Whether the token is there for letters that the model does not know, as <unk> is."""
        is_letter = number == self._tokenizer.unk_token_id or len(text.strip()) < 2
        return is_letter and text.strip() not in self._words

    def mark(self, messages: Messages) -> tuple[Messages, str] | None:
        """The messages with each control word cut by a mark, and the mark; None where they hold no control word.

        The mark is a character that no message holds. Raises: UnusableError as `split`.
        """
        parts = [{name: self.split(value) for name, value in message.items()} for message in messages]
        if all(len(split) == 1 for message in parts for split in message.values()):
            return None
        letters = {letter for message in messages for value in message.values() for letter in value}
        mark = next(letter for letter in map(chr, _PRIVATE) if letter not in letters)
        return [{name: mark.join(split) for name, split in message.items()} for message in parts], mark

    def mark_template(self, mark: str) -> str | None:
        """The chat template with the control words cut that it looks for in messages; None without a template.

        Qwen3's looks for </think>, to leave the thoughts of earlier answers out: there it must find the word as `mark`
        has left it. What a template writes stays whole.
        """
        if not self._template:
            return None
        lexed = list(ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).lex(self._template))
        values = [value for _, _, value in lexed]
        code = [place for place, (_, kind, _) in enumerate(lexed) if kind != "whitespace"]
        for at, place in enumerate(code):
            before = [values[other] for other in code[max(0, at - 3) : at]]
            after = [values[other] for other in code[at + 1 : at + 3]]
            if lexed[place][1] == "string" and _is_looked_for(before, after):
                values[place] = mark.join(self.split(values[place]))
        return "".join(values)


def _find_cuts(text: str, spans: Iterable[tuple[int, int]]) -> Iterator[int]:
    """A place behind the first character of each word."""
    for start, end in spans:
        word = text[start:end].strip()  # some tokens take the spaces around them, too
        if len(word) < 2:
            raise UnusableError("control_word")
        yield text.index(word, start) + 1


def _is_looked_for(before: list[str], after: list[str]) -> bool:
    """Whether a text of a template between these words is compared, or the first argument of a method."""
    signs = (["=="], ["!="], ["in"])
    is_compared = before[-1:] in signs or after[:1] in signs or after == ["not", "in"]
    return is_compared or (len(before) == 3 and before[0] == "." and before[2] == "(")
