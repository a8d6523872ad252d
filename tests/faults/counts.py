"""Counts the cases and the losses of the fault tests, and prints the counts after the tests."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

KEY = "faults"
NAMES = ("kill points", "random kills", "resumes", "disk-full points", "hostile files")
totals: Counter[str] = Counter()


class Tally:
    """The counts of one test."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.losses: list[str] = []

    @contextmanager
    def case(self, name: str, description: str) -> Iterator[None]:
        """Count a case. If a check in the `with` block fails, the case is a loss, and the test continues."""
        self.counts[name] += 1
        try:
            yield
        except AssertionError as error:
            self.losses.append(f"{description}: {error}")

    def check(self) -> None:
        """Fail if there was a loss."""
        assert not self.losses, "\n\n".join(self.losses)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, content in report.user_properties:
        if name == KEY and report.when == "teardown":
            totals.update(content)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if totals:
        found = ", ".join(f"{totals[name]} {name}" for name in NAMES)
        terminalreporter.write_line(f"faults: {found}; {totals['lost']} lost")
