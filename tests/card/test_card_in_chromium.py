"""The card in a real browser: no script runs, and only its own pictures are fetched."""

import pytest
from card_pages import card_of, show
from chromium import serve, skip_without_chromium
from test_card_escape import HOSTILE, make_hostile

pytestmark = pytest.mark.slow

LOOK = """({
  title: document.title + page.title,
  fetched: frame.contentWindow.performance.getEntriesByType("resource").map(one => new URL(one.name).pathname),
  elements: page.querySelectorAll(
    "script, iframe, object, style, link, svg, form, [onload], [onerror]").length,
  broken: [...page.images].filter(one => !one.naturalWidth).length,
  text: page.body.textContent})"""


@pytest.fixture(scope="module", autouse=True)
def _chromium():
    skip_without_chromium()


def test_a_hostile_card_runs_no_script_and_fetches_no_others(tmp_path):
    with serve(tmp_path) as site:
        texts = [
            text.replace("http://evil.example", site.address).replace("//evil.example", site.address)
            for text in HOSTILE
        ]
        run = make_hostile(tmp_path, "\n".join(texts), steps=6)
        page = show(card_of(run, weights="adapter"))
        (run / "card.html").write_text(
            f"<!DOCTYPE html><meta charset=utf-8><link rel=icon href='data:,'>{page}", errors="replace"
        )
        (tmp_path / "run").symlink_to(run.name)
        view = site.measure("run/card.html", LOOK)
        pictures = {f"/run/figures/{path.name}" for path in (run / "figures").iterdir()}
        assert set(view["fetched"]) == pictures
        assert view["broken"] == 0
        assert view["elements"] == 1  # the icon's link, which this test adds
        assert "ran" not in view["title"]
        assert "<script>top.document.title = 'ran'</script>" in view["text"]
        assert {path for path in site.asked if path != "/favicon.ico"} == pictures | {"/measure.html", "/run/card.html"}
