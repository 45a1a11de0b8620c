"""Rules that hold for every test: nothing fails silently, nothing is skipped silently."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from runtime import telemetry
from runtime.process import NO_FORKS

os.environ.setdefault(*NO_FORKS)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # run by `&` of a script: every process it starts would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.harness.fault_report", "tests.harness.shared_product")

_skipped: dict[str, str] = {}


@pytest_asyncio.fixture(autouse=True)
async def _no_unhandled_loop_exceptions(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """An exception that only the event loop sees fails the test in whose time it happened."""
    seen: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: seen.append(context))
    yield
    loop.set_exception_handler(None)
    if seen and request.node.get_closest_marker("expects_loop_exceptions") is None:
        pytest.fail("\n".join(f"event loop: {context}" for context in seen))


@pytest.fixture(autouse=True)
def _no_tracing_left_on() -> Iterator[None]:
    """Tracing is the whole process's: a test that leaves it on changes how later tests' calls are made."""
    yield
    assert not telemetry.tracing_enabled(), "call telemetry.shutdown() at the test's end"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[report.nodeid] = reason


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names every skipped test with its reason."""
    if _skipped:
        terminalreporter.section(f"{len(_skipped)} skipped")
        for name, reason in sorted(_skipped.items()):
            terminalreporter.line(f"{name}: {reason.removeprefix('Skipped: ')}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI everything is installed, so a skip means that something was not tested: a failure."""
    if _skipped and os.environ.get("CI") == "true" and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
