"""Text of others in a card: shown as it is, never markup, never a path of one machine. No torch."""

import re
from collections.abc import Iterable

from markupsafe import Markup

from dpokit.terminal import CONTROLS

# What begins or is markup anywhere in a line of Markdown, HTML, or what sites add to them (mentions, mathematics).
# An entity is never markup in any of them, so that one way of writing serves for a line, a cell and a block of HTML.
SIGNS = re.compile(
    r"[&<>\"\\`*{}\[\]#|~@$^]"
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # inside a word it is no markup: learning_rate
    r"|:(?=//)|(?<=www)\.|(?<=WWW)\."  # bare addresses become links
    r"|^(?:-{2,}|=+$|[-+](?=\s|$)|\d+[.)](?=\s|$))"  # at the head of a line: lists, rules, headings
)
LINE_ENDS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
LONG_WORD = re.compile(r"(\S{48})(?=\S)")  # nobody can break it, and a table would grow as wide
BREAK = "\ue000"  # of a private range: stands for <wbr> until the signs around it are escaped
# An absolute path, or one that begins at home or here; not the slash of an address or of rewards/chosen.
PATH = re.compile(r"(?<![\w/])(?:~[\w.-]*|\.{1,2})?/(?!/)[^\s\"'`<>|,;:()\[\]{}]+")


def escape(text: object) -> Markup:
    """One line of Markdown or HTML that shows the text."""
    return Markup(_escape_line(re.sub(r"[ \t]+", " ", LINE_ENDS.sub(" ", str(text))).strip()))


def escape_lines(text: str) -> Markup:
    """HTML that shows the text with its lines, in one line of source; to be put into an element."""
    lines = [_escape_line(line.expandtabs(4)) for line in LINE_ENDS.split(text.strip())]
    return Markup("<br>".join(re.sub(r"^ | (?= )", "&nbsp;", line) for line in lines))


def _escape_line(text: str) -> str:
    text = CONTROLS.sub(lambda found: f"<U+{ord(found[0]):04X}>", text.replace(BREAK, "?"))
    text = LONG_WORD.sub(rf"\1{BREAK}", text)
    return SIGNS.sub(lambda found: "".join(f"&#{ord(sign)};" for sign in found[0]), text).replace(BREAK, "<wbr>")


class Mask:
    """Leaves of every path of a machine its last name.

    Args:
        names: of files and folders that a run was given, also such as do not look like a path.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name: last_name(name) for name in names if "/" in name}

    def __call__(self, text: str) -> str:
        text = text.replace("file:///", "/")
        for name in sorted(self._names, key=len, reverse=True):
            text = text.replace(name, self._names[name])
        return PATH.sub(lambda found: last_name(found[0]), text)


def last_name(path: str) -> str:
    """The file's or folder's own name; `a folder` where the path has none."""
    name = path.rstrip("/").rpartition("/")[2]
    return "a folder" if name in ("", "~", ".", "..") else name
