"""Renders a card with a real Markdown renderer that keeps HTML, as the Hub's does."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

from dpokit.card.card import write_card
from dpokit.card.front_matter import BLOCK
from dpokit.rundir import RunDir

# The elements of a card; any other element comes from text that was not escaped.
TAGS = {
    "a",
    "blockquote",
    "br",
    "code",
    "details",
    "em",
    "h1",
    "h2",
    "h3",
    "img",
    "li",
    "p",
    "pre",
    "strong",
    "summary",
}
TAGS |= {"table", "tbody", "td", "th", "thead", "tr", "ul", "wbr", "b"}
VOID = {"br", "hr", "img", "input", "wbr"}
ATTRIBUTES = {("a", "href"), ("img", "src"), ("img", "alt"), ("code", "class"), ("td", "valign")}
ATTRIBUTES |= {("td", "style"), ("th", "style")}  # a column's alignment


@dataclass
class Page(HTMLParser):
    """The elements of a page, its text, and the elements that were not closed."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""
    headings: list[str] = field(default_factory=list)
    unclosed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "br":
            self.text += "\n"
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.unclosed and self.unclosed[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data


def body_of(card: str) -> str:
    block = BLOCK.match(card)
    assert block is not None
    return card[block.end() :]


def show(card: str) -> str:
    """A card's body as HTML."""
    return str(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body_of(card)))


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


def check_page(page: Page) -> None:
    """Checks that a page has only a card's elements, its own pictures, and links to huggingface.co."""
    assert page.unclosed == []
    assert set(page.tags) <= TAGS
    assert {(tag, name) for tag, name, _ in page.attributes} <= ATTRIBUTES
    for _, name, value in page.attributes:
        if name == "src":
            assert value.startswith("figures/"), value
        if name == "href":
            assert value.startswith("https://huggingface.co/"), value
        if name == "style":
            assert value.startswith("text-align:"), value


def card_of(folder: Path, **more: object) -> str:
    return write_card(RunDir(folder), **{"license": "mit", **more}).read_text()
