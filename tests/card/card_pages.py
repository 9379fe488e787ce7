"""A card as a site shows it: through a real Markdown renderer that, like the Hub's, keeps HTML."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt

from dpokit.card.card import write_card
from dpokit.card.front_matter import BLOCK
from dpokit.rundir import RunDir

# What a card is made of; a sample that brings any other has got out of its cell.
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
    """The elements of a page, its text, and how many of its elements were left open."""

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
    """HTML of a card's body."""
    return str(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body_of(card)))


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


def check_page(page: Page) -> None:
    """Nothing in the page but what a card is made of; it asks for its own pictures and leads to known places alone."""
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
