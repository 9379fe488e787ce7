"""The report in a real browser: no script runs, nothing is fetched, and the page fits."""

import json

import pytest
from chromium import colour_flag, run_chromium, serve, skip_without_chromium
from run_folders import add_evaluation, make_run, make_starts, make_steps

from dpokit.report.page import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _chromium():
    skip_without_chromium()


def hostile(address: str) -> list[str]:
    """Texts that must be shown as text. As markup, each would set a title or fetch a file from the test's server."""
    return [
        f"<script src='{address}/stolen-1'></script><script>top.document.title = document.title = 'ran'</script>",
        f"<img src={address}/stolen-2 onerror=\"document.title='ran'\">",
        f"</style></title></svg><style>@import '{address}/stolen-3'; p {{ background: url({address}/4) }}</style>",
        f"\"><iframe src='{address}/stolen-5'></iframe>",
        "{{ 7 * 7 }}{% raw %}<b onclick=alert(1)>&lt;</b>",
        f"javascript:fetch('{address}/stolen-6')",
    ]


def test_text_from_a_run_is_shown_and_never_executed(tmp_path):
    with serve(tmp_path) as site:
        texts = hostile(site.address)
        everything = "\n".join(texts)
        records = make_steps(12, every=4)
        for record in records:
            record[texts[0]] = None  # a metric's name
        names = ["<b>a", "<svg onload=top.document.title='ran'>", "$\\x{_"]
        folders = [
            make_run(
                tmp_path / name,
                records,
                settings={"model_name_or_path": everything, texts[1]: name, "seed": number},
                why=everything,
                placement=everything,
                generations=[start | {"host": everything} for start in make_starts(4)],
                versions={everything: everything},
            )
            for number, name in enumerate(names)
        ]
        for folder in folders:
            (folder / "data.json").write_text(json.dumps({"findings": [everything], "train": {"rows": 1, "kept": 0}}))
            add_evaluation(folder, prompt=everything, text=everything)
        pairs = json.loads((folders[0] / "eval" / "pairs.json").read_text())
        pairs |= {"verdict": {"text": everything}, "groups": {everything: [{"name": everything}]}}
        (folders[0] / "eval" / "pairs.json").write_text(json.dumps(pairs))
        write_report(folders[:1], output=tmp_path / "one.html")
        write_report(folders, output=tmp_path / "several.html")
        look = (
            "({title: document.title + page.title, text: page.body.textContent, fetched: "
            "frame.contentWindow.performance.getEntriesByType('resource').map(one => one.name), elements: "
            "page.querySelectorAll('script, iframe, img, object, b, main style, [onload], [onerror]').length})"
        )
        for page in ("one.html", "several.html"):
            view = site.measure(page, look)
            assert view["fetched"] == []
            assert view["elements"] == 0
            assert "ran" not in view["title"].replace(everything, "")
        assert all(text in site.measure("one.html", "page.body.textContent") for text in texts)
        assert {path for path in site.asked if "stolen" in path} == set()
        assert {"/measure.html", "/one.html", "/several.html"} >= {p for p in site.asked if p != "/favicon.ico"}


def test_the_test_server_records_the_requests_of_a_page(tmp_path):
    (tmp_path / "open.html").write_text("<img src='/stolen'><script src='/script.js'></script>")
    with serve(tmp_path) as site:
        fetched = site.measure("open.html", "frame.contentWindow.performance.getEntriesByType('resource').length")
        assert "/stolen" in site.asked
    assert fetched == 2


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_never_scrolls_sideways(width, tmp_path):
    name = "a_rather_long_name_of_a_run_" * 3
    folders = [
        make_run(tmp_path / f"{name}{n}", make_steps(60, every=10, seed=n), settings={"seed": n}) for n in (1, 2)
    ]
    add_evaluation(folders[0], prompt="word" * 200)
    write_report(folders[:1], output=tmp_path / "one.html")
    write_report(folders, output=tmp_path / "several.html")
    with serve(tmp_path) as site:
        for page in ("one.html", "several.html"):
            view = site.measure(
                page,
                "({wide: page.documentElement.scrollWidth, inner: frame.contentWindow.innerWidth, svg: "
                "Math.min(...[...page.querySelectorAll('figure svg')].map(one => one.getBoundingClientRect().width))})",
                width=width,
            )
            assert view["inner"] == width
            assert view["wide"] <= width
            assert view["svg"] >= 250


def test_labels_neither_overlap_nor_leave_their_figure(tmp_path):
    folders = []
    for number, scale in enumerate((1, 37, 2500)):  # steps of one to six digits
        records = [record | {"step": record["step"] * scale} for record in make_steps(60, every=10, seed=number)]
        folders.append(make_run(tmp_path / f"{'W' * 30}{number}", records, generations=make_starts(20 * scale)))
    pages = [f"{number}.html" for number in range(3)]
    for folder, page in zip(folders, pages, strict=True):
        write_report([folder], output=tmp_path / page)
    write_report(folders, output=tmp_path / "several.html")
    find_clashes = """[...page.querySelectorAll("figure")].flatMap(figure => {
      const box = figure.getBoundingClientRect(), texts = [...figure.querySelectorAll("text")];
      const boxes = texts.map(one => one.getBoundingClientRect());
      const outside = texts.filter((_, at) => boxes[at].left < box.left - 1 || boxes[at].right > box.right + 4
        || boxes[at].top < box.top - 1 || boxes[at].bottom > box.bottom + 1);
      const over = texts.filter((_, at) => boxes.some((other, its) => its > at && other.left < boxes[at].right
        && boxes[at].left < other.right && other.top + 2 < boxes[at].bottom && boxes[at].top + 2 < other.bottom));
      return [...outside, ...over].map(one => figure.id + ": " + one.textContent);
    })"""
    with serve(tmp_path) as site:
        for page in (*pages, "several.html"):
            assert site.measure(page, find_clashes) == [], page


def test_the_page_follows_the_colour_scheme_with_enough_contrast(tmp_path):
    write_report([make_run(tmp_path / "run", make_steps(60, every=10))], output=tmp_path / "one.html")
    colours = (
        "['body', 'figure text', '.verdict', '.note'].map(name => {const it = page.querySelector(name),"
        " look = frame.contentWindow.getComputedStyle(it); return name == 'figure text' ? look.fill : look.color})"
        ".concat([frame.contentWindow.getComputedStyle(page.body).backgroundColor])"
    )
    with serve(tmp_path) as site:
        for dark in (False, True):
            *texts, paper = (luminance(colour) for colour in site.measure("one.html", colours, dark=dark))
            assert (paper < 0.05) == dark
            for text in texts:
                low, high = sorted((text, paper))
                assert (high + 0.05) / (low + 0.05) >= 4.5


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_report_file_prints_and_renders_in_both_schemes(tmp_path):
    folder = make_run(tmp_path / "run", make_steps(60, every=10), generations=make_starts(20))
    add_evaluation(folder)
    address = write_report([folder]).report.resolve().as_uri()
    run_chromium(f"--print-to-pdf={tmp_path / 'run.pdf'}", "--no-pdf-header-footer", colour_flag(True), address)
    assert (tmp_path / "run.pdf").read_bytes().startswith(b"%PDF")
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        run_chromium(colour_flag(dark), "--window-size=1280,2400", f"--screenshot={picture}", address)
        assert (corner(picture) < 60) == dark


def corner(picture) -> int:
    from PIL import Image

    return Image.open(picture).convert("L").getpixel((3, 3))
