"""The pages of the documentation, and the commands in them."""

import re
from pathlib import Path

from conftest import ROOT

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))


def read_pages() -> str:
    """The text of all pages, with continued lines joined."""
    return join_lines("\n".join(page.read_text() for page in PAGES))


def join_lines(text: str) -> str:
    return text.replace("\\\n", " ")


def list_commands(start: str = "") -> list[str]:
    """The commands in the bash blocks of all pages that begin with `start`."""
    blocks = re.findall(r"^```bash\n(.*?)^```", read_pages(), re.M | re.S)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line and not line.startswith("#") and line.startswith(start)})


def remove_code(text: str) -> str:
    """The page without fenced blocks and inline code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def list_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def read_section(page: Path, heading: str) -> str:
    """The text from a heading to the next one of level two."""
    return page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
