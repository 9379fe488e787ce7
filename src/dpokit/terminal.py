"""Escapes untrusted text for a terminal, so that it can neither move the cursor nor change colours. No torch."""

import re
import sys

# Control characters, surrogates, line separators, and marks that change the direction of the following text.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]")


def escape_controls(text: str) -> str:
    r"""The text with escapes like `\x1b` in place of control characters; newlines and tabs stay."""
    return CONTROLS.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match), text)


def one_line(text: object) -> str:
    """The escaped text in one line, with a space for each line end, so that a value cannot forge an output line."""
    return CONTROLS.sub(_escape, re.sub(r"\s*[\r\n]\s*", " ", str(text)))


def _escape(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


def echo(text: object, *, err: bool = False) -> None:
    """Prints escaped text on stdout, or on stderr."""
    print(escape_controls(str(text)), file=sys.stderr if err else sys.stdout, flush=True)
