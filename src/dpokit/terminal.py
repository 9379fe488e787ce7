"""Text on a terminal: whatever wrote it, it neither moves the cursor nor colours the screen. No torch."""

import re
import sys

# Control characters, halves of a character, line separators, and those that turn the direction of what follows.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]")


def escape_controls(text: str) -> str:
    r"""The text, which may have several lines, with `\x1b` and the like in the place of control characters."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in "\n\t" else _escape(found), text)


def one_line(text: object) -> str:
    """The same in one line, so that a name or a value cannot forge a line of ours; a space for each line end."""
    return CONTROLS.sub(_escape, re.sub(r"\s*[\r\n]\s*", " ", str(text)))


def _escape(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def echo(text: object, *, err: bool = False) -> None:
    """Prints an answer for humans: on stdout, or on stderr."""
    print(escape_controls(str(text)), file=sys.stderr if err else sys.stdout, flush=True)
