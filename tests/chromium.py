"""A real headless Chromium for tests: screenshots, PDF, and JavaScript that measures a page."""

import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from debian import install, skip_because

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
# The page under test must not contain scripts, so another page of the same origin shows it in a frame and measures it.
MEASURING_PAGE = """<!DOCTYPE html><title>waiting</title><iframe src="PAGE" width="WIDTH" height="900"></iframe><script>
onload = () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const value = (() => { return EXPRESSION; })();
  document.documentElement.innerHTML = "<body><pre></pre></body>";
  document.querySelector("pre").textContent = JSON.stringify(value);
};</script>"""


def skip_without_chromium() -> None:
    """Skips the test if Chromium cannot be installed; with CI_MUST_RUN_CHROMIUM=1 the test fails instead."""
    skip_because(install(("chromium",), ("chromium",)), unless="CI_MUST_RUN_CHROMIUM")


def run_chromium(*flags: str) -> str:
    """Chromium's standard output."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def colour_flag(dark: bool) -> str:
    return f"--blink-settings=preferredColorScheme={0 if dark else 1}"


class Site:
    """A folder that is served on this machine only; `asked` lists every requested path."""

    def __init__(self, folder: Path, asked: list[str], port: int) -> None:
        self.folder, self.asked, self.address = folder, asked, f"http://127.0.0.1:{port}"

    def measure(self, page: str, expression: str, *, width: int = 1200, dark: bool = False) -> Any:
        """The value of a JavaScript expression over `frame` and `page`, with the page in a frame of that width."""
        text = MEASURING_PAGE.replace("PAGE", page).replace("WIDTH", str(width)).replace("EXPRESSION", expression)
        (self.folder / "measure.html").write_text(text)
        shown = run_chromium(
            colour_flag(dark), "--virtual-time-budget=5000", "--dump-dom", f"{self.address}/measure.html"
        )
        (self.folder / "measure.html").unlink()
        assert "<pre>" in shown, shown
        written = shown.partition("<pre>")[2].partition("</pre>")[0]
        return json.loads(written.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@contextmanager
def serve(folder: Path) -> Iterator[Site]:
    """Serves the folder while the block runs."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Site(folder, asked, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
