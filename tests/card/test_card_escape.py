"""Foreign text stays text: in a line of Markdown, in a cell, in a block of HTML."""

import json

import pytest
from card_pages import card_of, check_page, parse, show
from markdown_it import MarkdownIt
from run_folders import add_evaluation, make_run, make_steps

from dpokit.card.escape import Mask, escape, escape_lines, last_name

HOSTILE = [
    "</details></td></tr></table><script>top.document.title = 'ran'</script>",
    "<img src=http://evil.example/1.png onerror=alert(1)>",
    "![picture](http://evil.example/2.png)",
    "[link](javascript:alert(1)) [ref]: http://evil.example/3",
    "```\n```python\nprint(1)\n~~~\n",
    "---\nlicense: evil\n---\n# Heading\n\n## Another\n\nTitle\n=====\n",
    "| a | b |\n|---|---|\n| c | d |",
    "thanks @someone, see #123, https://evil.example/4, www.evil.example, ftp://evil.example, me@evil.example",
    "**bold** __bold__ *em* _em_ ~~gone~~ `code` ``more`` <b>b</b> <!-- never closed",
    "- item\n+ item\n* item\n1. item\n2) item\n> quote\n    indented code\n\tindented\n",
    "turned \u202e back \u2066 and on",
    "&lt;script&gt; &#60; &amp; &copy; \\* \\[ \\\\",
    "$$x^2$$ \\(y\\) {{ 7 * 7 }} {% raw %} :smile: [^1] - [x] done",
    "\r\n\x0b\x0c\x85\u2028\u2029 lines \x00\x1b[31m red \ud800 half",
    "<style>@import 'http://evil.example/5'</style><iframe src=//evil.example>",
    "]]>--><?php ?><![CDATA[ <svg/onload=alert(1)>",
    "word" * 60,
    "",
]


def plain(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())


def visible(text: str) -> str:
    """A hostile text as a card shows it, with invisible characters named, and without white space."""
    return plain(parse(f"<p>{escape_lines(text)}</p>").text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_in_a_line_a_cell_and_a_block(text):
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    line, lines = escape(text), escape_lines(text)
    assert "\n" not in line + lines
    for source in (line, f"# {line}", f"- {line}", f"> {line}", f"| a |\n| --- |\n| {line} |", f"<pre>{lines}</pre>"):
        shown = parse(page.render(f"{source}\n\nafter\n"))
        assert not {"script", "img", "a", "b", "em", "strong", "s", "style", "iframe", "svg", "hr"} & set(shown.tags)
        assert len([tag for tag in shown.tags if tag in ("ul", "ol", "h1", "h2", "table", "blockquote")]) <= 1
        assert plain(shown.text).endswith(visible(text) + "after"), source


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("learning_rate", "learning_rate"),
        ("rewards/chosen", "rewards/chosen"),
        ("0.6931 (0.6800 to 0.7000)", "0.6931 (0.6800 to 0.7000)"),
        ("-140.2", "-140.2"),
        ("It's better: 11.0 % more.", "It's better: 11.0 % more."),
        ("a<b & c", "a&#60;b &#38; c"),
        ("1. first", "&#49;&#46; first"),
        ("\u202eabc", "&#60;U+202E&#62;abc"),
    ],
)
def test_plain_text_and_numbers_stay_readable_in_the_source(text, shown):
    assert escape(text) == shown


@pytest.mark.parametrize("text", HOSTILE)
def test_a_card_shows_every_character_of_a_text(text):
    named = visible(text)
    if not any(sign in text for sign in "\u202e\x00"):
        assert named == plain(text.replace("\t", " "))
    else:
        assert "<U+" in named


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/pairs.jsonl, split train", "pairs.jsonl, split train"),
        ('["/home/me/a", "b"]', '["a", "b"]'),
        ("~/runs/mine and ../other/base/", "mine and base"),
        ("file:///home/me/log.txt", "log.txt"),
        ("no space (/scratch/me/mine)", "no space (mine)"),
        ("rewards/chosen, samples/s, and/or, 1/2, n / a", "rewards/chosen, samples/s, and/or, 1/2, n / a"),
        ("https://huggingface.co/datasets/a/b", "https://huggingface.co/datasets/a/b"),
        ("Anthropic/hh-rlhf, split test", "Anthropic/hh-rlhf, split test"),
        ("data/pairs of others", "pairs of others"),
        ("~me/x", "x"),
    ],
)
def test_a_path_is_shortened_to_its_last_part(text, shown):
    assert Mask(["data/pairs", "gpt2"])(text) == shown


def test_a_path_without_a_last_part_is_called_a_folder():
    assert [last_name(path) for path in ("/", "~/", "../..", "/a/b/", "c")] == ["a folder"] * 3 + ["b", "c"]


def make_hostile(folder, everything: str, *, steps: int = 0):
    """A run with a hostile text in every place for text; with logged steps it has pictures."""
    name = everything.replace("/", "|").replace("\x00", "")[:100].encode(errors="replace").decode()
    records = make_steps(steps, every=3)
    for record in records:
        record[everything] = None
    run = make_run(
        folder / name,
        records,
        settings={"model_name_or_path": everything, everything: everything, "loss_type": [everything]},
        state=everything,
        why=everything,
        placement=everything,
        versions={everything: everything},
        machine={"device": everything, "nodes": everything},
        alarms=[{"step": everything, "text": everything}],
        best={"step": everything, "metric": everything, "value": everything},
    )
    add_evaluation(run, prompt=everything, text=everything)
    split = {"rows": 5, "kept": 3, "source": everything, "format": everything, "dropped": {everything: 2}}
    (run / "data.json").write_text(json.dumps({"train": split, "findings": [everything], "fingerprint": everything}))
    pairs = json.loads((run / "eval" / "pairs.json").read_text())
    pairs |= {"verdict": {"text": everything}, "groups": {everything: [{"name": everything}]}}
    pairs["data"] |= {"name": everything, "pairs": everything}
    (run / "eval" / "pairs.json").write_text(json.dumps(pairs))
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": everything}))
    (run / "merged").mkdir()
    (run / "merged" / "merge.json").write_text(json.dumps({"dtype": everything, "mean_drift": everything}))
    return run


@pytest.mark.parametrize("weights", ["adapter", "both"])
def test_a_hostile_text_adds_no_element_to_a_card(weights, tmp_path):
    benign = parse(
        show(card_of(make_hostile(tmp_path / "benign", "some plain words"), weights=weights, contact="words"))
    )
    for number, text in enumerate([*HOSTILE[:-1], "\n".join(HOSTILE)]):
        run = make_hostile(tmp_path / str(number), text)
        page = parse(show(card_of(run, weights=weights, contact=text)))
        check_page(page)
        assert [tag for tag in page.tags if tag not in ("br", "wbr")] == [
            tag for tag in benign.tags if tag not in ("br", "wbr")
        ]
        assert page.headings[1:] == benign.headings[1:]
        assert visible(text)[:200] in plain(page.text)
