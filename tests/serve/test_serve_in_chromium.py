"""The page in a real browser: asked, streamed, stopped, voted on; by keyboard, on a phone, in two tabs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian import install, skip_because
from served import AILING, make_run, serve

from dpokit.report.votes import read_votes
from dpokit.rundir import RunDir

pytestmark = pytest.mark.slow
pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)
# Where screenshots are kept to be looked at; none are made without it.
SCREENSHOTS = os.environ.get("DPOKIT_SCREENSHOTS")
HOSTILE = (
    "<img src=/stolen onerror=\"document.title='ran'\"><script>document.title='ran'</script> ${7*7} {{7*7}} <b>x</b>"
)


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("<b>run"), tiny_gpt2, use_peft=True)


@pytest.fixture(scope="module")
def url(run) -> Iterator[str]:
    with serve(str(run.path), "--use_cpu", "--per-minute", "100000", "--max-prompt-characters", "500") as made:
        yield made.url


@pytest.fixture(scope="module")
def browser():
    skip_because(install(("chromium",), ("chromium",)), unless="CI_MUST_RUN_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def context(browser):
    made = browser.new_context(viewport={"width": 1200, "height": 1000})
    made.set_default_timeout(PATIENCE_MS)
    yield made
    made.close()


def open_page(context, url):
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("Ready.")
    return page


@pytest.fixture
def page(context, url):
    return open_page(context, url)


def ask(page, question="How do I bake bread?", *, tokens=None):
    if tokens is not None:
        set_tokens(page, tokens)
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()


def set_tokens(page, tokens):
    page.get_by_role("button", name="How answers are sampled").click()
    field = page.get_by_label("number input for Most tokens of an answer")
    slider = page.get_by_label("range slider for Most tokens of an answer")
    for _ in range(20):  # a slider that is just being drawn may take its first value once more
        field.fill(str(tokens))
        field.press("Tab")
        page.wait_for_timeout(200)
        if slider.input_value() == str(tokens):
            return
    raise AssertionError(f"the slider stands at {slider.input_value()}")


def wait_for_answers(page):
    expect(page.locator("#status")).to_contain_text("Answered in")
    return [page.locator(f"#answer-{place} textarea").input_value() for place in (0, 1)]


def shoot(page, name):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def test_a_question_is_answered_side_by_side_with_rewards(page):
    shoot(page, "empty")
    expect(page.locator("#answer-0 label")).to_contain_text("base:")
    expect(page.locator("#answer-1 label")).to_contain_text("tuned:")
    ask(page)
    answers = wait_for_answers(page)
    assert all(answers)
    for place in (0, 1):
        expect(page.locator(f"#note-{place}")).to_contain_text("implicit reward")
    expect(page.locator("#past")).to_contain_text("How do I bake bread?")
    expect(page.locator("#question textarea")).to_have_value("")
    shoot(page, "answered")


def test_an_answer_grows_while_it_is_written_and_stops_when_told(context, run):
    with serve(str(run.path), "--use_cpu", program=AILING, AILING_SECONDS="0.05") as made:
        page = open_page(context, made.url)
        ask(page, tokens=200)
        box = page.locator("#answer-0 textarea")
        expect(box).not_to_have_value("")
        seen = {box.input_value()}
        for _ in range(400):
            seen.add(box.input_value())
            if len(seen) > 3:
                break
            page.wait_for_timeout(5)
        assert len(seen) > 3
        page.locator("#stop").click()
        expect(page.locator("#status")).to_contain_text("Stopped.")
        expect(page.locator("#vote-left")).to_be_disabled()
        shoot(page, "stopped")
        ask(page, "And now?", tokens=None)
        expect(page.locator("#past")).to_contain_text("And now?")


@pytest.mark.parametrize(("choice", "preferred"), [("left", "base"), ("right", "tuned"), ("tie", None)])
def test_a_vote_is_kept_and_counted_once(page, run, choice, preferred):
    before = len(read_votes(run.votes_jsonl))
    ask(page)
    answers = wait_for_answers(page)
    page.locator(f"#vote-{choice}").click()
    expect(page.locator("#status")).to_contain_text("your vote is kept")
    expect(page.locator("#tally")).to_contain_text(f"votes: {before + 1},")
    for name in ("left", "right", "tie", "both_bad"):
        expect(page.locator(f"#vote-{name}")).to_be_disabled()
    votes = read_votes(run.votes_jsonl)
    assert len(votes) == before + 1
    assert votes[-1]["vote"] == (preferred or choice)
    assert votes[-1]["answers"] == {"base": answers[0], "tuned": answers[1]}
    shoot(page, f"voted-{choice}")


def test_a_blind_vote_hides_names_until_it_is_given(page, run):
    page.locator("#blind input").check()
    ask(page)
    answers = wait_for_answers(page)
    for place, name in enumerate(("Answer A", "Answer B")):
        expect(page.locator(f"#answer-{place} label")).to_contain_text(name)
        expect(page.locator(f"#note-{place}")).not_to_contain_text("reward")
    shoot(page, "blind")
    page.locator("#vote-right").click()
    expect(page.locator("#note-0")).to_contain_text("implicit reward")
    vote = read_votes(run.votes_jsonl)[-1]
    left = vote["left"]
    expect(page.locator("#answer-0 label")).to_contain_text(f"{left}:")
    assert vote["blind"]
    assert vote["answers"][left] == answers[0]
    assert vote["vote"] == ("tuned" if left == "base" else "base")
    shoot(page, "blind-voted")


def test_a_conversation_goes_on_with_the_preferred_answer_and_begins_anew(page):
    ask(page, tokens=20)
    left, _ = wait_for_answers(page)
    page.locator("#vote-left").click()
    expect(page.locator("#goes-on input").first).to_be_checked()
    ask(page, "And then?")
    expect(page.locator("#past .turn")).to_have_count(3)
    shown = page.locator("#past .turn p").nth(1).inner_text()
    # What an untrained model writes holds characters that no page shows.
    assert [letter for letter in shown if letter.isalnum()] == [letter for letter in left if letter.isalnum()]
    wait_for_answers(page)
    shoot(page, "second-turn")
    page.locator("#anew").click()
    expect(page.locator("#past .turn")).to_have_count(0)
    expect(page.locator("#answer-0 textarea")).to_have_value("")


@pytest.mark.parametrize("way", ["anew", "example"])
def test_a_page_that_begins_something_else_sees_no_more_of_the_old_answers(context, run, way):
    with serve(str(run.path), "--use_cpu", program=AILING, AILING_SECONDS="0.02") as made:
        page = open_page(context, made.url)
        page.locator("#blind input").check()
        ask(page, tokens=200)
        box = page.locator("#answer-0 textarea")
        expect(box).not_to_have_value("")
        if way == "anew":
            page.locator("#anew").click()
        else:
            page.locator("#examples").get_by_text(re.compile("How do I bake")).first.click()
        expect(box).to_have_value("")
        expect(page.locator("#stop")).to_be_disabled()
        expect(page.locator("#status")).to_have_text("", use_inner_text=True)
        seen = set()
        for _ in range(20):
            page.wait_for_timeout(100)
            seen.add((box.input_value(), page.locator("#status").inner_text()))
        assert seen == {("", "")}
        expect(page.locator("#vote-left")).to_be_disabled()
        ask(page, "And now?")
        page.locator("#stop").click()
        expect(page.locator("#status")).to_contain_text("Stopped.")
        expect(page.locator("#past .turn")).to_have_count(1)


def test_a_reload_in_the_middle_of_an_answer_leaves_a_page_that_works(page):
    ask(page, tokens=200)
    expect(page.locator("#answer-0 textarea")).not_to_have_value("")
    page.reload()
    expect(page.locator("#status")).to_contain_text("Ready.")
    ask(page)
    assert all(wait_for_answers(page))


def test_two_tabs_do_not_see_each_other(context, url):
    one, other = open_page(context, url), open_page(context, url)
    ask(one, "The question of one?")
    ask(other, "The question of the other?")
    for page, own, foreign in ((one, "of one?", "of the other?"), (other, "of the other?", "of one?")):
        wait_for_answers(page)
        expect(page.locator("#past")).to_contain_text(own)
        expect(page.locator("#past")).not_to_contain_text(foreign)
    one.locator("#vote-tie").click()
    expect(one.locator("#status")).to_contain_text("your vote is kept")
    expect(other.locator("#vote-tie")).to_be_enabled()


def test_a_held_out_question_is_taken_with_a_click(page):
    page.locator("#examples").get_by_text(re.compile("How do I bake")).first.click()
    expect(page.locator("#question textarea")).to_have_value(re.compile("How do I bake .*bread number"))


def test_everything_can_be_done_with_the_keyboard_alone(page, run):
    before = len(read_votes(run.votes_jsonl))
    expect(page.locator("#question textarea")).to_be_focused()
    page.keyboard.type("How do I bake bread?")
    page.keyboard.press("Enter")
    wait_for_answers(page)
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.id") == "vote-left":
            break
    assert page.evaluate("document.activeElement.id") == "vote-left"
    shoot(page, "keyboard")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("your vote is kept")
    assert len(read_votes(run.votes_jsonl)) == before + 1


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_narrow_page_never_scrolls_sideways(context, url, width):
    page = open_page(context, url)
    page.set_viewport_size({"width": width, "height": 800})
    ask(page, "word" * 60)
    wait_for_answers(page)
    page.get_by_role("button", name="What is this?").click()
    page.get_by_role("button", name="How answers are sampled").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"narrow-{width}")


def test_text_is_shown_and_never_run_and_nothing_is_fetched_from_elsewhere(context, url):
    fetched, troubles = [], []
    page = context.new_page()
    page.on("request", lambda request: fetched.append(request.url))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("Ready.")
    ask(page, HOSTILE, tokens=16)  # longer ones might leave no room for a second question
    wait_for_answers(page)
    ask(page, "And then?")
    wait_for_answers(page)
    page.get_by_role("button", name="What is this?").click()
    expect(page.locator("#past .turn p").first).to_have_text(HOSTILE)
    expect(page.locator("#facts")).to_contain_text("<b>run")
    assert page.title() == "dpokit: base beside tuned"
    assert page.locator("#past b:not(.turn > b)").count() == 0
    assert page.locator("#past img, #past script, #facts b").count() == 0
    own = tuple(f"{scheme}{rest}" for scheme in ("", "data:", "blob:") for rest in ((url,) if not scheme else ("",)))
    assert [name for name in fetched if not name.startswith(own)] == []
    assert not [name for name in fetched if "stolen" in name]
    assert troubles == []


def test_a_refused_question_is_told_and_can_be_mended(page):
    ask(page, "x" * 501)
    expect(page.locator("#status")).to_contain_text("at most 500")
    expect(page.locator("#question textarea")).to_have_value("x" * 501)
    shoot(page, "refused")
    ask(page, "Why?")
    wait_for_answers(page)
