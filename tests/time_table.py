"""Reports seconds and cases of each package of tests: a line when a package has ended, and a table at the end.

So the log of an interrupted run lists the packages that passed. time_budget.toml has the seconds that a package may
take on two cores; a package that takes longer is reported, and does not fail.
"""

import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BUDGET = Path(__file__).with_name("time_budget.toml")


def find_package(name: str) -> str:
    """`data` for tests/data/test_any.py::test_it; for a file directly in tests/, its name without `test_`."""
    parts = name.partition("::")[0].split("/")
    return parts[-2] if len(parts) > 2 else parts[-1].removeprefix("test_").removesuffix(".py")


class TimeTable:
    """The pytest plugin, for the reporting process.

    Args:
        budget: {package: seconds}.
    """

    def __init__(self, config: pytest.Config, budget: dict[str, float]) -> None:
        self.config = config
        self.budget = budget
        self.waiting: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.cases: Counter[str] = Counter()
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        if not self.waiting:  # every worker collects the same tests
            self._expect(ids)

    def _expect(self, ids: Sequence[str]) -> None:
        self.waiting.update(map(find_package, ids))

    def pytest_runtest_logreport(self, report: Any) -> None:
        package = find_package(report.nodeid)
        self.seconds[package] += report.duration
        if report.outcome != "passed" or report.when == "call":
            outcome = "failed" if report.failed else report.outcome
            self.outcomes[package][outcome] += 1
        if report.when == "teardown":
            self.cases[package] += 1
            self.waiting[package] -= 1
            if self.waiting[package] == 0:
                self._say(f"{package}: {self._describe(package)} in {self.seconds[package]:.0f} s")

    def _describe(self, package: str) -> str:
        return ", ".join(f"{number} {outcome}" for outcome, number in sorted(self.outcomes[package].items()))

    def _say(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line)
            reporter.flush()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if len(self.cases) < 2:
            return
        terminalreporter.section("seconds of each package")
        terminalreporter.write_line(f"{'package':<16}{'seconds':>9}{'budget':>8}{'cases':>7}")
        for package, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            budget = self.budget.get(package)
            over = "  over its budget" if budget is not None and seconds > budget else ""
            shown = "-" if budget is None else f"{budget:.0f}"
            terminalreporter.write_line(f"{package:<16}{seconds:>9.0f}{shown:>8}{self.cases[package]:>7}{over}")


def read_budget() -> dict[str, float]:
    return dict(tomllib.loads(BUDGET.read_text())["seconds"])
