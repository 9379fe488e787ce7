"""The page in a real browser: questions, streaming, stop, votes, keyboard, narrow screens, two tabs."""

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
# The folder for screenshots; without it none are taken.
SCREENSHOTS = os.environ.get("DPOKIT_SCREENSHOTS")
HOSTILE = (
    "<img src=/stolen onerror=\"document.title='ran'\"><script>document.title='ran'</script> ${7*7} {{7*7}} <b>x</b>"
)


@pytest.fixture(scope="module")
def run(tiny_gpt2, tmp_path_factory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("<b>run"), tiny_gpt2, use_peft=True)


@pytest.fixture(scope="module")
def url(run) -> Iterator[str]:
    with serve(str(run.path), "--use_cpu", "--per-minute", "100000", "--max-prompt-characters", "500") as served_page:
        yield served_page.url


@pytest.fixture(scope="module")
def browser():
    skip_because(install(("chromium",), ("chromium",)), unless="CI_MUST_RUN_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture
def context(browser):
    served_page = browser.new_context(viewport={"width": 1200, "height": 1000})
    served_page.set_default_timeout(PATIENCE_MS)
    yield served_page
    served_page.close()


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
    for _ in range(20):  # a slider that is still being drawn may reset to its first value
        field.fill(str(tokens))
        field.press("Tab")
        page.wait_for_timeout(200)
        if slider.input_value() == str(tokens):
            return
    raise AssertionError(f"the slider shows {slider.input_value()}")


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


def test_an_answer_grows_and_can_be_stopped(context, run):
    with serve(str(run.path), "--use_cpu", program=AILING, AILING_SECONDS="0.05") as served_page:
        page = open_page(context, served_page.url)
        ask(page, tokens=200)
        box = page.locator("#answer-0 textarea")
        expect(box).not_to_have_value("")
        states = {box.input_value()}
        for _ in range(400):
            states.add(box.input_value())
            if len(states) > 3:
                break
            page.wait_for_timeout(5)
        assert len(states) > 3
        page.locator("#stop").click()
        expect(page.locator("#status")).to_contain_text("Stopped.")
        expect(page.locator("#vote-left")).to_be_disabled()
        shoot(page, "stopped")
        ask(page, "And now?", tokens=None)
        expect(page.locator("#past")).to_contain_text("And now?")


@pytest.mark.parametrize(("choice", "preferred"), [("left", "base"), ("right", "tuned"), ("tie", None)])
def test_a_vote_is_stored_and_counted_once(page, run, choice, preferred):
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


def test_a_blind_vote_hides_names_before_the_vote(page, run):
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


def test_a_conversation_follows_the_preferred_answer(page):
    ask(page, tokens=20)
    left, _ = wait_for_answers(page)
    page.locator("#vote-left").click()
    expect(page.locator("#goes-on input").first).to_be_checked()
    ask(page, "And then?")
    expect(page.locator("#past .turn")).to_have_count(3)
    shown = page.locator("#past .turn p").nth(1).inner_text()
    # An untrained model writes characters that no page shows.
    assert [letter for letter in shown if letter.isalnum()] == [letter for letter in left if letter.isalnum()]
    wait_for_answers(page)
    shoot(page, "second-turn")
    page.locator("#anew").click()
    expect(page.locator("#past .turn")).to_have_count(0)
    expect(page.locator("#answer-0 textarea")).to_have_value("")


@pytest.mark.parametrize("way", ["anew", "example"])
def test_a_new_conversation_shows_nothing_of_the_old_answers(context, run, way):
    with serve(str(run.path), "--use_cpu", program=AILING, AILING_SECONDS="0.02") as served_page:
        page = open_page(context, served_page.url)
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
        states = set()
        for _ in range(20):
            page.wait_for_timeout(100)
            states.add((box.input_value(), page.locator("#status").inner_text()))
        assert states == {("", "")}
        expect(page.locator("#vote-left")).to_be_disabled()
        ask(page, "And now?")
        page.locator("#stop").click()
        expect(page.locator("#status")).to_contain_text("Stopped.")
        expect(page.locator("#past .turn")).to_have_count(1)


def test_the_page_works_after_a_reload_during_an_answer(page):
    ask(page, tokens=200)
    expect(page.locator("#answer-0 textarea")).not_to_have_value("")
    page.reload()
    expect(page.locator("#status")).to_contain_text("Ready.")
    ask(page)
    assert all(wait_for_answers(page))


def test_two_tabs_have_separate_conversations(context, url):
    first, second = open_page(context, url), open_page(context, url)
    ask(first, "The question of one?")
    ask(second, "The question of the other?")
    for page, own_text, other_text in ((first, "of one?", "of the other?"), (second, "of the other?", "of one?")):
        wait_for_answers(page)
        expect(page.locator("#past")).to_contain_text(own_text)
        expect(page.locator("#past")).not_to_contain_text(other_text)
    first.locator("#vote-tie").click()
    expect(first.locator("#status")).to_contain_text("your vote is kept")
    expect(second.locator("#vote-tie")).to_be_enabled()


def test_a_click_on_an_example_fills_the_question(page):
    page.locator("#examples").get_by_text(re.compile("How do I bake")).first.click()
    expect(page.locator("#question textarea")).to_have_value(re.compile("How do I bake .*bread number"))


def test_the_page_works_with_the_keyboard_alone(page, run):
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
def test_a_narrow_page_does_not_scroll_sideways(context, url, width):
    page = open_page(context, url)
    page.set_viewport_size({"width": width, "height": 800})
    ask(page, "word" * 60)
    wait_for_answers(page)
    page.get_by_role("button", name="What is this?").click()
    page.get_by_role("button", name="How answers are sampled").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shoot(page, f"narrow-{width}")


def test_hostile_text_is_shown_and_never_run(context, url):
    fetched, troubles = [], []
    page = context.new_page()
    page.on("request", lambda request: fetched.append(request.url))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.goto(url)
    expect(page.locator("#status")).to_contain_text("Ready.")
    ask(page, HOSTILE, tokens=16)  # longer answers might fill the context before the second question
    wait_for_answers(page)
    ask(page, "And then?")
    wait_for_answers(page)
    page.get_by_role("button", name="What is this?").click()
    expect(page.locator("#past .turn p").first).to_have_text(HOSTILE)
    expect(page.locator("#facts")).to_contain_text("<b>run")
    assert page.title() == "dpokit: base beside tuned"
    assert page.locator("#past b:not(.turn > b)").count() == 0
    assert page.locator("#past img, #past script, #facts b").count() == 0
    own_text = tuple(
        f"{scheme}{rest}" for scheme in ("", "data:", "blob:") for rest in ((url,) if not scheme else ("",))
    )
    assert [name for name in fetched if not name.startswith(own_text)] == []
    assert not [name for name in fetched if "stolen" in name]
    assert troubles == []


def test_a_refused_question_can_be_corrected(page):
    ask(page, "x" * 501)
    expect(page.locator("#status")).to_contain_text("at most 500")
    expect(page.locator("#question textarea")).to_have_value("x" * 501)
    shoot(page, "refused")
    ask(page, "Why?")
    wait_for_answers(page)
