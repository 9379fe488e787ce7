"""The card in a real browser, as a site shows it: nothing runs, and nothing but its own pictures is fetched."""

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


def test_a_hostile_card_runs_nothing_and_fetches_its_own_pictures_alone(tmp_path):
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
        seen = site.measure("run/card.html", LOOK)
        pictures = {f"/run/figures/{path.name}" for path in (run / "figures").iterdir()}
        assert set(seen["fetched"]) == pictures
        assert seen["broken"] == 0
        assert seen["elements"] == 1  # the icon's link of this very test
        assert "ran" not in seen["title"]
        assert "<script>top.document.title = 'ran'</script>" in seen["text"]
        assert {path for path in site.asked if path != "/favicon.ico"} == pictures | {"/measure.html", "/run/card.html"}
