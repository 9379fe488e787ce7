"""Looks for characters and data in texts that nobody wants to train on, and masks personal data. No torch."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpokit.credentials import HIDDEN, TOKENS, hide_secrets
from dpokit.data.messages import Messages, find_texts
from dpokit.terminal import CONTROLS

MOST_LETTERS = 600  # of a text of an example
_CONTROLS = re.compile(rf"(?![\n\r\t]){CONTROLS.pattern}")
# Characters that have no width or look like a space, although Python calls them printable.
_BLANK = frozenset("\u2800\u3164\uffa0\u115f\u1160")

# The characters that the bytes 0x80 to 0xbf become in Latin-1 and in Windows-1252.
_REST = re.escape("".join({chr(byte) + bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xC0)}))
# UTF-8 that was decoded as one of the two. A lead byte alone proves nothing: a French quotation may also end so.
_DAMAGE = re.compile(
    rf"[\u00c2\u00c3][{_REST}]"  # Latin letters, spaces
    rf"|\u00e2[\u20ac\u201a\u201e\u2026\u2020\u2030\u201d\u2022\u0080-\u0095][{_REST}]"  # quotes, dashes, signs
    rf"|(?:[\u00ce-\u00d1\u00d8\u00d9][{_REST}]){{2}}"  # Greek, Cyrillic, Arabic
    rf"|(?:[\u00e0-\u00e9][{_REST}]{{2}}){{2}}"  # Indian, Chinese, Japanese
    rf"|\u00f0[\u0178\u009f][{_REST}]{{2}}"  # emoji
    r"|\ufffd"  # a byte that was no UTF-8
)
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,4}\.[A-Za-z]{2,24}\b")
_SPACE = r"[ ./-]"  # between the parts of a phone number
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    # +49 30 1234567, 0049 30 1234567, +1(212)736-5000: 8 digits or more, 10 without a space; no decimal fraction.
    r"(?:\+|(?<!\d )00)(?!1[ .-]?\(?[01]|\d+\.\d+(?![ .-]?\d))(?=(?:[ ()./-]{0,3}\d){8})"
    rf"[1-9](?:\d{{9,14}}|\d{{0,5}}(?:{_SPACE}\d(?={_SPACE}))?"
    rf"(?:(?:{_SPACE}|{_SPACE}?\(\d{{1,4}}\)[ .-]?)\d{{2,10}}){{1,6}})"
    # (212) 736-5000
    r"|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])\d{3}[ .-]\d{4}"
    # 030 1234567, 0800 123 4567: the area, and 9 digits or more in all
    r"|(?<!\d )(?=(?:[ /-]?\d){9})0[1-9]\d{1,4}[ /-](?!0)\d{3,8}(?:[ -]\d{2,4}){0,3}"
    # 01 23 45 67 89
    r"|(?<!\d )0[1-9](?:[ .]\d\d){4}"
    r")(?![\w-]|[.,]\d)"
)


_DIGITS = re.compile(r"\d\d")
_ESCAPE = re.compile(r"(\\[bfnrt]|\\u[0-9a-fA-F]{4})")
# Up to its end, or to the end of the text.
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.S)
PATTERNS: Mapping[str, re.Pattern[str]] = {
    "control_characters": _CONTROLS,
    "damaged_text": _DAMAGE,
    "emails": _EMAIL,
    "phones": _PHONE,
    "keys": re.compile("|".join(f"(?:{token.pattern})" for token in TOKENS.values())),
}
# A pattern may take quadratic time, so a long text is searched in parts, which overlap.
_PART_LETTERS, _OVERLAP = 4000, 200


def join_texts(part: str | Messages) -> str:
    """Returns all texts of a prompt or an answer; of messages, their contents and what else they say."""
    if isinstance(part, str):
        return part
    texts = (find_texts({name: value for name, value in message.items() if name != "role"}) for message in part)
    return "\n\n".join("\n".join(several) for several in texts)


def find_place(kind: str, text: str) -> int | None:
    """Returns where a text has what a kind of finding is about, in characters; None if it is not in it."""
    for first in range(0, max(len(text) - _OVERLAP, 1), _PART_LETTERS):
        match = PATTERNS[kind].search(text[first : first + _PART_LETTERS + _OVERLAP])
        if match:
            return first + match.start()
    return None


# Quick tests that pass every text with the kind: most texts are printable apart from their line ends, and so on.
_QUICK: Mapping[str, Callable[[str], bool]] = {
    "control_characters": lambda text: not text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable(),
    "damaged_text": lambda text: not text.isascii(),
    "emails": lambda text: "@" in text,
    "phones": lambda text: _DIGITS.search(text) is not None,
    "keys": bool,
}


def is_invisible(text: str) -> bool:
    """Whether no character of a text can be seen."""
    return not any(letter.isprintable() and not letter.isspace() and letter not in _BLANK for letter in text)


def find_kinds(prompt: str, chosen: str, rejected: str) -> list[str]:
    """Returns the kinds of findings about the characters of a pair's texts."""
    texts = (prompt, chosen, rejected)
    kinds = [k for k, quick in _QUICK.items() if any(quick(text) and find_place(k, text) is not None for text in texts)]
    return kinds + (["invisible_answers"] if is_invisible(chosen) or is_invisible(rejected) else [])


def mask(text: str) -> str:
    """Returns a text with `***` for each key, e-mail address and phone number."""
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    # In JSON inside a text, the letter of an escape stands before the secret: \\nhf_...
    parts = _ESCAPE.split(text)
    if len(parts) > 1:
        text = "".join(part if number % 2 else _mask_part(part) for number, part in enumerate(parts))
    return _mask_part(text)


def _mask_part(text: str) -> str:
    return _PHONE.sub(HIDDEN, _EMAIL.sub(HIDDEN, hide_secrets(text)))


def mask_values(value: Any) -> Any:
    """Returns JSON values in which each text is masked and shortened, also the names in objects.

    A row must be masked before it becomes JSON, whose escapes hide where a secret begins.
    """
    if isinstance(value, Mapping):
        return {show_text(str(name)): mask_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_values(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else show_text(str(value))


def show_text(text: str, place: int = 0) -> str:
    """Returns a masked part of a text for an example, with the place (a number of characters) in it."""
    first = max(0, place - MOST_LETTERS // 2)
    # Masked before it is cut, so that no part of a key stays. A private key has up to 4,000 characters.
    base = max(0, first - 2 * _PART_LETTERS)
    before, shown = mask(text[base:first]), mask(text[base : first + MOST_LETTERS + 2 * _PART_LETTERS])
    shown = shown[len(before) :]
    return ("... " if first else "") + shorten(shown)


def shorten(masked: str) -> str:
    """Returns the beginning of a text that is masked already."""
    return masked[:MOST_LETTERS] + (" ..." if len(masked) > MOST_LETTERS else "")


def show_pair(source: str, texts: Sequence[str], kind: str = "", **more: Any) -> dict[str, str]:
    """Returns an example: where the pair is from, and its prompt, chosen and rejected answer."""
    shown = {
        name: show_text(text, (find_place(kind, text) if kind in PATTERNS else None) or 0)
        for name, text in zip(("prompt", "chosen", "rejected"), texts, strict=True)
    }
    return {"source": source, **shown, **more}
