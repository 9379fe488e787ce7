"""Escapes foreign text for a card, so that it is never markup, and shortens local paths. No torch."""

import re
from collections.abc import Iterable

from markupsafe import Markup

from dpokit.terminal import CONTROLS

# Characters that are or begin markup in Markdown, in HTML, or in extensions of sites (mentions, mathematics). An HTML
# entity is markup in none of them, so the same escapes serve for a line, a cell and a block of HTML.
MARKUP = re.compile(
    r"[&<>\"\\`*{}\[\]#|~@$^]"
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # not inside a word, where it is not markup: learning_rate
    r"|:(?=//)|(?<=www)\.|(?<=WWW)\."  # bare addresses become links
    r"|^(?:-{2,}|=+$|[-+](?=\s|$)|\d+[.)](?=\s|$))"  # at the start of a line: lists, rules, headings
)
LINE_ENDS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
LONG_WORD = re.compile(r"(\S{48})(?=\S)")  # a browser cannot break it, so it would make a table too wide
BREAK = "\ue000"  # a private character in place of <wbr> until the other characters are escaped
# An absolute path, or one that starts with ~, . or ..; not an address, and not rewards/chosen.
PATH = re.compile(r"(?<![\w/])(?:~[\w.-]*|\.{1,2})?/(?!/)[^\s\"'`<>|,;:()\[\]{}]+")


def escape(text: object) -> Markup:
    """Escapes a text as one line of Markdown or HTML."""
    return Markup(_escape_line(re.sub(r"[ \t]+", " ", LINE_ENDS.sub(" ", str(text))).strip()))


def escape_lines(text: str) -> Markup:
    """Escapes a text as HTML in one line of source, with <br> for its line ends; for use inside an element."""
    lines = [_escape_line(line.expandtabs(4)) for line in LINE_ENDS.split(text.strip())]
    return Markup("<br>".join(re.sub(r"^ | (?= )", "&nbsp;", line) for line in lines))


def _escape_line(text: str) -> str:
    text = CONTROLS.sub(lambda match: f"<U+{ord(match[0]):04X}>", text.replace(BREAK, "?"))
    text = LONG_WORD.sub(rf"\1{BREAK}", text)
    return MARKUP.sub(lambda match: "".join(f"&#{ord(letter)};" for letter in match[0]), text).replace(BREAK, "<wbr>")


class Mask:
    """Replaces each local path in a text by its last part.

    Args:
        names: files and folders in the run's settings, which are replaced even if they do not look like a path.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name: last_name(name) for name in names if "/" in name}

    def __call__(self, text: str) -> str:
        text = text.replace("file:///", "/")
        for name in sorted(self._names, key=len, reverse=True):
            text = text.replace(name, self._names[name])
        return PATH.sub(lambda match: last_name(match[0]), text)


def last_name(path: str) -> str:
    """The last part of a path; `a folder` if it has none."""
    name = path.rstrip("/").rpartition("/")[2]
    return "a folder" if name in ("", "~", ".", "..") else name
