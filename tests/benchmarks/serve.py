"""How soon a page of `dpokit serve` can be used, how soon a token appears in it, and many users at once.

In a real Chromium (Debian's). The run may be any with held-out questions, such as the quickstart's.
"""

import re
import statistics
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import psutil
from benchmarks.benchmark import Benchmark
from benchmarks.workloads import make_model
from playwright.sync_api import Browser, Playwright, sync_playwright

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage")
# Notes when each answer's first text was painted: a frame after it was in the page.
WATCH = """() => { window.seen = null; const box = document.querySelector("#answer-0 textarea");
  const look = () => { if (box.value && !window.seen) { window.seen = Date.now() } else requestAnimationFrame(look) };
  look(); }"""
# The real server, which also prints when the first token of each question was generated.
PRINTING = """
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


def prepare(options: SimpleNamespace) -> None:
    """Without a run to serve, trains a few steps of a tiny model."""
    if not options.run:
        from served import make_run

        make_run(options.folder, make_model(options.folder, "tiny"))


def measure(options: SimpleNamespace) -> dict[str, Any]:
    run = options.run or str(options.folder / "run")
    return {"page": measure_page, "token": measure_first_token, "users": measure_users}[options.case](run, options)


def launch_chromium(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))


def measure_page(run: str, options: SimpleNamespace) -> dict[str, Any]:
    """Seconds from the server being up to a page that takes a question, with a cold browser cache each time."""
    from served import serve

    seconds = []
    with sync_playwright() as playwright:
        browser = launch_chromium(playwright)
        for _ in range(options.pages):
            with serve(run) as server:
                page = browser.new_context().new_page()
                began = time.perf_counter()
                page.goto(server.url)
                page.locator("#question textarea").fill("Can I ask?")
                page.locator("#ask").wait_for()
                seconds.append(time.perf_counter() - began)
        browser.close()
    return {"median": statistics.median(seconds), "worst": max(seconds)}


def find_questions(url: str) -> list[str]:
    """The held-out questions that the page shows: others may get an empty answer."""
    from asking import Asker

    parts = Asker(url).config["components"]
    shown = next(part["props"] for part in parts if part["props"].get("elem_id") == "examples")
    return [sample[0] for sample in shown["samples"]]


def measure_first_token(run: str, options: SimpleNamespace) -> dict[str, Any]:
    """Seconds from the generation of the first token to its appearance, by one clock."""
    from served import serve

    painted = []
    with sync_playwright() as playwright, serve(run, "--per-minute", "1000", program=("-c", PRINTING)) as server:
        browser = launch_chromium(playwright)
        page = browser.new_page()
        page.set_default_timeout(120_000)
        for question in find_questions(server.url)[: options.questions]:
            page.goto(server.url)
            page.get_by_text("Ready.").wait_for()
            page.evaluate(WATCH)
            page.locator("#question textarea").fill(question)
            page.locator("#ask").click()
            page.wait_for_function("window.seen")
            page.get_by_text(re.compile("Answered in")).wait_for()
            painted.append(page.evaluate("window.seen") / 1000)
        browser.close()
    generated = [float(line.split()[-1]) for line in server.said if line.startswith("first token")]
    delays = [late - early for late, early in zip(painted, generated, strict=True)]
    return {"median": statistics.median(delays), "worst": max(delays)}


def measure_users(run: str, options: SimpleNamespace) -> dict[str, Any]:
    """Outcomes of all questions, and the server's memory before and after."""
    from asking import Asker, read_text
    from served import serve

    outcomes: Counter[str] = Counter(answers=0, busy=0, errors=0)
    with serve(run, "--per-minute", "1000000") as server:
        question = find_questions(server.url)[0]
        while "Answered in" not in read_text(Asker(server.url).ask(question)):
            time.sleep(0.5)
        memory = psutil.Process(server.process.pid).memory_info
        before, until = memory().rss, time.monotonic() + options.seconds

        def use() -> None:
            asker = Asker(server.url)
            while time.monotonic() < until:
                asker.press("anew", None)  # a conversation that continues outgrows the model
                text = read_text(asker.ask(question, settings=(0.7, 0.95, 60, 0)))
                kind = "answers" if "Answered in" in text else "busy" if "The server is busy" in text else "errors"
                outcomes[kind] += 1
                if kind == "errors":
                    print(text[-2000:], file=sys.stderr, flush=True)
                if kind == "busy":
                    time.sleep(1.0)  # as a user would

        users = [threading.Thread(target=use) for _ in range(options.users)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        return {**outcomes, "mib_before": before / 2**20, "mib_after": memory().rss / 2**20}


BENCHMARK = Benchmark(
    title="Serve",
    about="""
The quickstart's model and a real Chromium. The page can be used some time after its server is up; a token appears
some time after the model generates it. 20 users ask without a pause for 90 s; the memory is the server's.
""",
    columns={
        "case": ("case", ""),
        "median": ("median, s", "#.2g"),
        "worst": ("worst, s", "#.2g"),
        "answers": ("answers", ".0f"),
        "busy": ('"busy"', ".0f"),
        "errors": ("errors", ".0f"),
        "mib_before": ("MiB before", ".0f"),
        "mib_after": ("MiB after", ".0f"),
    },
    cases={"page": "the page can be used", "token": "a token appears", "users": "20 users"},
    measure=measure,
    prepare=prepare,
    options={"run": "runs/quickstart", "pages": 3, "questions": 20, "users": 20, "seconds": 90.0},
    quick={"run": "", "pages": 1, "questions": 1, "users": 2, "seconds": 1.0, "cases": ["token", "users"]},
)
