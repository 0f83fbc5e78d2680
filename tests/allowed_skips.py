"""With `--allowed-skips=FILE`, a test that is skipped for any other reason fails.

The file holds one reason a line, as a regular expression found in what the skip says; empty lines
and lines that begin with # say nothing. Without the option every skip is a skip.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", type=Path, metavar="FILE", help="other skips are failures")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test, or a fixture of it, was skipped."""
    report = yield
    _judge(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A whole file was skipped, as by `importorskip`."""
    report = yield
    _judge(report, collector.config)
    return report


def _judge(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    """Make the report of a skip that is not allowed one of a failure."""
    file: Path | None = config.getoption("--allowed-skips")
    if file is None or not report.skipped or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)  # of a skip: file, line, "Skipped: REASON"
    reason = report.longrepr[2]
    lines = (line.strip() for line in file.read_text().splitlines())
    if not any(re.search(line, reason) for line in lines if line and not line.startswith("#")):
        report.outcome = "failed"
        report.longrepr = f"{reason}\n(a reason to skip that {file} does not list)"
