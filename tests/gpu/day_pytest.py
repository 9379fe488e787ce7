"""Runs marked tests inside this process and records the outcome of each as soon as it has ended."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest


class Recorder:
    """A plugin of pytest.

    Args:
        record: takes the id of a test, and as keywords its outcome, and why it was skipped or failed.
    """

    def __init__(self, record: Callable[..., None]) -> None:
        self.record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        name, seconds = report.nodeid.rpartition("/")[2], round(report.duration, 1)
        if report.skipped:
            self.record(name, outcome="skipped", why=str(report.longrepr[2]).removeprefix("Skipped: "))
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.record(name, error=(crash.message if crash else str(report.longrepr))[:300], seconds=seconds)
        elif report.when == "call":
            self.record(name, outcome="passed", seconds=seconds)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.record(report.nodeid.rpartition("/")[2], error=str(report.longrepr)[-300:])


def find_files(folder: Path) -> list[Path]:
    """The files with tests that need a GPU."""
    return [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def run_pytest(files: Iterable[Path], marks: str, record: Callable[..., None], done: set[str], basetemp: Path) -> None:
    """Runs the tests of these files with these marks, except those that are done."""

    class Deselect:
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items[:] = [item for item in items if item.nodeid.rpartition("/")[2] not in done]

    words = [*map(str, files), "-m", marks, "-q", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={basetemp}"]
    code = pytest.main(words, plugins=[Recorder(record), Deselect()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        record("pytest", error=f"pytest ended with {code!r}")
