"""What the containers said, beside each test that fails."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.harness.compose import ComposePod


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of the containers' logs to the report."""
    report = yield
    pod = item.funcargs.get("pod")
    if report.failed and isinstance(pod, ComposePod):
        report.sections.append(("containers", pod.compose("logs", "--tail", "20")))
    return report
