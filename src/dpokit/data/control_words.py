"""Keeps control words in a message as text: a visitor's <|im_end|> does not end a turn."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from dpokit.data.messages import Messages, UnusableError, find_texts

_FORM = re.compile(r"<[|\uff5c].*[|\uff5c]>")  # DeepSeek writes a wide bar
# Unicode's private use planes, which have no characters of any language.
_PRIVATE = range(0xF0000, 0x10FFFE)


class ControlWords:
    """A tokenizer's control words: the added tokens that structure a conversation.

    An added token is a control word if the tokenizer calls it special, the chat template writes it, or it has the form
    <|...|>. Other added tokens are ordinary words, such as Gemma's HTML tags or terms of a field.

    A tokenizer recognises control words in any text. Therefore a mark splits each control word in a message after its
    first character, the template renders the conversation, and each text between marks is encoded separately.

    Attributes:
        ids: token ids of the control words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        contents = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip() and (token.special or self._is_control(token.content))
        }
        self.ids = frozenset(contents)
        self._contents = frozenset(contents.values())
        longest_first = sorted(contents.values(), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def _is_control(self, word: str) -> bool:
        return bool(_FORM.fullmatch(word)) or (word in self._template and not word.strip().isalnum())

    def split(self, text: str) -> list[str]:
        """Splits a text into parts without control words; a text without control words is one part.

        Raises: UnusableError for a control word of one character, which cannot be split.
        """
        parts = [text]
        while True:  # words may overlap, so that a cut can leave another word whole
            cuts = [list(_find_cuts(part, spans)) for part, spans in zip(parts, self._find(parts), strict=True)]
            if not any(cuts):
                return parts
            parts = [
                part[start:end]
                for part, places in zip(parts, cuts, strict=True)
                for start, end in pairwise([0, *places, len(part)])
            ]

    def _find(self, texts: list[str]) -> Iterator[list[tuple[int, int]]]:
        """Yields the spans of the control words in each text."""
        if not self._tokenizer.is_fast:
            yield from ([word.span() for word in self._pattern.finditer(text)] for text in texts)
            return
        # By the tokens, because a normalizer can turn other characters, such as wide ones, into control words.
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rows = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for text, numbers, spans in rows:
            yield [
                (start, end)
                for number, (start, end) in zip(numbers, spans, strict=True)
                if number in self.ids and not self._is_unknown(number, text[start:end])
            ]

    def _is_unknown(self, number: int, text: str) -> bool:
        """Whether the token replaces a character that the vocabulary lacks, as <unk> does."""
        is_letter = number == self._tokenizer.unk_token_id or len(text.strip()) < 2
        return is_letter and text.strip() not in self._contents

    def mark(self, messages: Messages) -> tuple[Messages, str] | None:
        """Returns the messages with each control word split by a mark, and the mark; None without control words.

        The mark is a character that is in no message. Raises: UnusableError as `split`.
        """
        texts = list(find_texts(messages))
        if all(len(self.split(text)) == 1 for text in texts):
            return None
        letters = {letter for text in texts for letter in text}
        mark = next(letter for letter in map(chr, _PRIVATE) if letter not in letters)
        return _map_texts(messages, lambda text: mark.join(self.split(text))), mark

    def mark_template(self, mark: str) -> str | None:
        """Returns the chat template with marks in the control words that it searches for; None without a template.

        Qwen3's template searches messages for </think>, to leave out the reasoning of earlier answers, and must find
        it as `mark` has split it. Control words that a template writes stay whole.
        """
        if not self._template:
            return None
        values, searched = _lex(self._template)
        for place in searched:
            values[place] = mark.join(self.split(values[place]))
        return "".join(values)


def find_searched(template: str) -> tuple[str, ...]:
    """Returns the texts that a chat template searches messages for, such as `</think>`; not names, such as roles."""
    values, searched = _lex(template)
    texts = {values[place][1:-1] for place in searched}
    return tuple(sorted(text for text in texts if text.strip("\\ntr ") and not text.isidentifier()))


def _lex(template: str) -> tuple[list[str], list[int]]:
    """Returns the parts of a template, which make the template when joined, and the indices of searched strings."""
    lexed = list(ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).lex(template))
    values = [value for _, _, value in lexed]
    code = [place for place, (_, kind, _) in enumerate(lexed) if kind != "whitespace"]
    searched = []
    for at, place in enumerate(code):
        before = [values[other] for other in code[max(0, at - 3) : at]]
        after = [values[other] for other in code[at + 1 : at + 3]]
        if lexed[place][1] == "string" and _is_searched(before, after):
            searched.append(place)
    return values, searched


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a copy of nested lists and mappings with each text changed."""
    if isinstance(value, Mapping):
        return {name: _map_texts(part, change) for name, part in value.items()}
    if isinstance(value, list):
        return [_map_texts(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


def _find_cuts(text: str, spans: Iterable[tuple[int, int]]) -> Iterator[int]:
    """Yields the position after the first character of each word."""
    for start, end in spans:
        word = text[start:end].strip()  # some tokens include the spaces around them
        if len(word) < 2:
            raise UnusableError("control_word")
        yield text.index(word, start) + 1


def _is_searched(before: list[str], after: list[str]) -> bool:
    """Whether a template compares the string between these tokens, or passes it to a method or filter first."""
    signs = (["=="], ["!="], ["in"])
    is_compared = before[-1:] in signs or after[:1] in signs or after == ["not", "in"]
    return is_compared or (len(before) == 3 and before[0] in (".", "|") and before[2] == "(")
