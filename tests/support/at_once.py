"""For a machine that is lent for minutes: what is known is printed at once, and a SIGTERM loses none of it.

    timeout --kill-after 30 600 python -m pytest -p tests.support.at_once tests/placement/test_placement.py

A failure is shown when it happens, and again at the end; what takes a second or more says how long it took. SIGTERM is
to pytest what Ctrl-C is: it ends the ranks, shows where they were, and sums up.
"""

import signal
import time

import pytest


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.pluginmanager.register(_AtOnce(config))


class _AtOnce:
    def __init__(self, config: pytest.Config) -> None:
        self.config, self.start = config, time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or (report.duration < 1 and not report.failed):
            return
        terminal.ensure_newline()
        terminal.write_line(
            f"after {time.monotonic() - self.start:.0f} s: {report.nodeid} {report.when} {report.outcome}, "
            f"{report.duration:.1f} s"
        )
        if report.failed:
            terminal.write_line(report.longreprtext)
        terminal.flush()
