"""A plugin of pytest for runs that may be killed: `pytest -p benchmarks.at_once`.

It prints why a test failed when it fails: pytest prints reasons at its end, which a run that is killed never reaches.
And a run fails if it skipped all of its tests, which pytest calls a success.
"""

from __future__ import annotations

import pytest


class AtOnce:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal
        self.ran = False

    @pytest.hookimpl(trylast=True)  # after the outcome is written
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran |= report.when == "call" and not report.skipped
        if report.failed:
            self.terminal.write_line(f"\n{report.longreprtext}")

    @pytest.hookimpl(tryfirst=True)  # before the summary, which shows the status
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK and not self.ran:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
            self.terminal.write_line("\nno test ran: all were skipped")


@pytest.hookimpl(trylast=True)  # after the terminal's
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if isinstance(terminal, pytest.TerminalReporter):
        config.pluginmanager.register(AtOnce(terminal), "at once")
