"""What a test needs (markers `root`, `rootless`, `data`, `microvm`); CI fails when a test was skipped that should have run."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Generator
from typing import TypeVar

import pytest

NEEDS = ("root", "rootless", "data", "microvm")
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "may_skip(reason): CI accepts a skip of this test, for that reason")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("data") and importlib.util.find_spec("pandas") is None:
            item.add_marker(pytest.mark.skip(reason="needs the data extra: pip install fumehood[data]"))


def pytest_collection_finish() -> None:
    """What all tests and their libraries are made of is not looked through by each collection of theirs, half a second long."""
    gc.collect()
    gc.freeze()


def _fail_if_skipped(report: Report, accepted: bool) -> Report:
    if report.skipped and not hasattr(report, "wasxfail") and not accepted and os.environ.get("CI") == "true":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"CI=true: this test must run, but it was skipped: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _fail_if_skipped(report, item.get_closest_marker("may_skip") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _fail_if_skipped(report, accepted=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Who ran, and how many tests needed what."""
    reports = [r for kind in ("passed", "failed", "error", "skipped") for r in terminalreporter.stats.get(kind, [])]
    ran = {r.nodeid: r.keywords for r in reports if getattr(r, "when", "") in ("call", "setup")}
    counts = ", ".join(f"{need}: {sum(need in keywords for keywords in ran.values())}" for need in NEEDS)
    terminalreporter.write_line(f"ran as uid {os.geteuid()}; of {len(ran)} tests, by need: {counts}")
