"""How soon a page of `dpokit serve` can be used, how soon a token is seen, and 20 users at once for a minute.

    PYTHONPATH=tests python tests/benchmarks/serve.py runs/quickstart [--seconds 60] [--users 20]

In a real Chromium (Debian's). The run may be any with held-out questions, such as the quickstart's.
"""

import argparse
import json
import re
import statistics
import sys
import threading
import time
from collections import Counter
from datetime import date

import psutil
from asking import Asker, read_text
from playwright.sync_api import sync_playwright
from served import serve

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage")
QUESTIONS = 20
# Notes when each answer's first text was painted: a frame after it stood in the page.
WATCH = """() => { window.seen = null; const box = document.querySelector("#answer-0 textarea");
  const look = () => { if (box.value && !window.seen) { window.seen = Date.now() } else requestAnimationFrame(look) };
  look(); }"""
# The real server, which also says when the first token of each question was there.
TELLING = """
import sys
from dpokit.serve import question_queue
answer = question_queue.QuestionQueue._answer
def answer_and_print(queue, job):
    answer(queue, job)
    print("first token", job.token_times[job.order[0]], file=sys.stderr, flush=True)
question_queue.QuestionQueue._answer = answer_and_print
from dpokit.cli import main
main()
"""


def measure_page(run: str) -> dict[str, float]:
    """Seconds from the server being up to a page that takes a question, with a cold browser cache each time."""
    seconds = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        for _ in range(3):
            with serve(run) as made:
                page = browser.new_context().new_page()
                began = time.perf_counter()
                page.goto(made.url)
                page.locator("#question textarea").fill("Can I ask?")
                page.locator("#ask").wait_for()
                seconds.append(time.perf_counter() - began)
        browser.close()
    return {"page_usable_seconds": statistics.median(seconds), "page_usable_seconds_worst": max(seconds)}


def find_questions(url: str) -> list[str]:
    """The held-out questions that the page shows: those of another kind may be answered with nothing."""
    parts = Asker(url).config["components"]
    shown = next(part["props"] for part in parts if part["props"].get("elem_id") == "examples")
    return [sample[0] for sample in shown["samples"]][:QUESTIONS]


def measure_first_token(run: str) -> dict[str, float]:
    """Milliseconds from the first token being there to its being seen, by one clock."""
    seen = []
    with sync_playwright() as playwright, serve(run, "--per-minute", "1000", program=("-c", TELLING)) as made:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        page = browser.new_page()
        page.set_default_timeout(120_000)
        for question in find_questions(made.url):
            page.goto(made.url)
            page.get_by_text("Ready.").wait_for()
            page.evaluate(WATCH)
            page.locator("#question textarea").fill(question)
            page.locator("#ask").click()
            page.wait_for_function("window.seen")
            page.get_by_text(re.compile("Answered in")).wait_for()
            seen.append(page.evaluate("window.seen"))
        browser.close()
    there = [1000 * float(line.split()[-1]) for line in made.said if line.startswith("first token")]
    delays = [late - early for late, early in zip(seen, there, strict=True)]
    return {"first_token_ms": statistics.median(delays), "first_token_ms_worst": max(delays)}


def measure_users(run: str, *, users: int, seconds: float) -> dict[str, object]:
    """Outcomes of all questions, and the server's memory at ten points of the time."""
    outcomes: Counter[str] = Counter()
    memory: list[float] = []
    with serve(run, "--per-minute", "1000000") as made:
        [question, *_] = find_questions(made.url)
        while "Answered in" not in read_text(Asker(made.url).ask(question)):
            time.sleep(0.5)
        until = time.monotonic() + seconds

        def use() -> None:
            asker = Asker(made.url)
            while time.monotonic() < until:
                asker.press("anew", None)  # a conversation that goes on outgrows the model
                told = read_text(asker.ask(question, settings=(0.7, 0.95, 60, 0)))
                kind = "answered" if "Answered in" in told else "busy" if "The server is busy" in told else "error"
                outcomes[kind] += 1
                if kind == "error":
                    print(told[-2000:], file=sys.stderr, flush=True)
                if kind == "busy":
                    time.sleep(1.0)  # as somebody would who was told so

        threads = [threading.Thread(target=use) for _ in range(users)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(psutil.Process(made.process.pid).memory_info().rss / 2**20)
            time.sleep(seconds / 10)
    return {**outcomes, "memory_mib": [round(value) for value in memory]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--users", type=int, default=20)
    asked = parser.parse_args()
    measures = (
        lambda: {"date": date.today().isoformat()},
        lambda: measure_page(asked.run),
        lambda: measure_first_token(asked.run),
        lambda: measure_users(asked.run, users=asked.users, seconds=asked.seconds),
    )
    for measure in measures:
        print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    main()
