"""Clock, background tasks, logs, redaction, and the harness itself."""

import asyncio
import io
import json
import logging
import random
import sys
import time
import unicodedata
from collections.abc import Awaitable, Callable, Iterator

import pytest

from runtime import deadline, logs
from runtime.clock import ManualClock, SystemClock
from runtime.errors import Unavailable
from runtime.redaction import redact, remember_secret
from runtime.tasks import Backoff, beside, run_forever, start
from services.metadata.access.secrets import new_session, new_setup_token, new_token
from tests.harness import eventually, free_port


async def test_the_systems_clock() -> None:
    clock = SystemClock()
    before_ms, now_ms, after_ms = int(time.time() * 1_000), clock.now_ms(), time.time() * 1_000
    assert before_ms <= now_ms <= after_ms
    started = clock.monotonic()
    async with asyncio.timeout(20):
        await clock.sleep(0.02)
        await clock.sleep_until(started)
    assert clock.monotonic() - started >= 0.02


async def test_a_manual_clock_wakes_sleepers_in_the_order_of_their_times() -> None:
    clock = ManualClock(now_ms=1_000)
    woken: list[int] = []

    async def sleeper(seconds: int) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    async with asyncio.TaskGroup() as group:
        for seconds in (3, 1, 2):
            group.create_task(sleeper(seconds))
        await eventually(lambda: clock.sleepers == 3)
        clock.advance(0.5)
        await asyncio.sleep(0)
        assert woken == []
        clock.advance(1.5)
        await eventually(lambda: woken == [1, 2])
        assert (clock.now_ms(), clock.sleepers) == (3_000, 1)
        clock.advance(10)
    assert woken == [1, 2, 3]


async def test_a_cancelled_sleeper_is_no_sleeper() -> None:
    clock = ManualClock()
    task = asyncio.create_task(clock.sleep(1))
    await eventually(lambda: clock.sleepers == 1)
    task.cancel()
    await asyncio.wait({task})
    assert clock.sleepers == 0
    clock.advance(2)


class SkippingClock(ManualClock):
    """Time that jumps over every sleep, and remembers how long it would have been."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.advance(seconds)
        await asyncio.sleep(0)


async def waits_of(work: Callable[[], Awaitable[None]], clock: SkippingClock, count: int) -> list[float]:
    backoff = Backoff(initial_s=1, max_s=4)
    task = asyncio.create_task(run_forever("ship", work, backoff, clock=clock, rng=random.Random(1)))
    await eventually(lambda: len(clock.waits) >= count)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return clock.waits[:count]


async def test_a_failing_task_is_logged_and_started_again_later_and_later(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ConnectionError("redis is away")

    waits = await waits_of(work, SkippingClock(), 6)
    assert 0.5 <= waits[0] <= 1
    assert 1 <= waits[1] <= 2
    assert all(2 <= wait <= 4 for wait in waits[2:])
    assert len(set(waits)) == 6  # jitter
    assert "background task ship failed: redis is away" in caplog.text


async def test_a_long_outage_is_said_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    """At the default level each try was a line: the log of a night held nothing else."""

    async def work() -> None:
        raise Unavailable("redis is away")

    caplog.set_level(logging.DEBUG, "runtime.tasks")
    await waits_of(work, SkippingClock(), 1_000)
    levels = [record.levelno for record in caplog.records if "redis is away" in record.getMessage()][:1_000]
    assert levels[:4] == [logging.INFO] * 4
    shown = [failures for failures, level in enumerate(levels) if level > logging.DEBUG]
    assert shown[4:] == [4, 8, 16, 32, 64, 128, 256, 512]


async def test_a_task_that_returns_is_started_again_and_a_long_run_resets_the_back_off() -> None:
    clock = SkippingClock()

    async def work() -> None:
        clock.advance(31)

    assert all(wait <= 1 for wait in await waits_of(work, clock, 6))


async def test_a_background_task_does_not_inherit_a_deadline() -> None:
    seen: list[float | None] = []
    token = deadline.current.set(deadline.CallDeadline(time.monotonic() + 1))

    async def work() -> None:
        seen.append(deadline.remaining_s())

    task = asyncio.create_task(run_forever("ship", work))
    deadline.current.reset(token)
    await eventually(lambda: seen)
    task.cancel()
    await asyncio.wait({task})
    assert seen[0] is None


async def test_a_started_task_never_fails_silently(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("oh")

    await asyncio.wait({start("one", fail())})
    async with beside("two", fail()):
        await eventually(lambda: "task two failed: oh" in caplog.text)
    assert "task one failed: oh" in caplog.text


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    logs.configure("cache", "INFO", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


def test_a_line_is_json_with_its_fields(lines: io.StringIO) -> None:
    log = logging.getLogger("test.logs")
    log.debug("not shown")
    log.info(
        "took %d ms\nreally", 5, extra={"rows": 3, "api_token": "abc", "odd": object, "bad": "\ud800", "big": 1 << 80}
    )
    try:
        1 // 0  # noqa: B018
    except ZeroDivisionError:
        log.exception("failed")
    first, second = (json.loads(line) for line in lines.getvalue().splitlines())
    assert first["time"].endswith("Z")
    assert len(first["time"]) == len("2026-01-01T00:00:00.000Z")
    assert first["message"] == "took 5 ms\nreally"
    assert (first["level"], first["process"], first["logger"]) == ("INFO", "cache", "test.logs")
    assert (first["rows"], first["api_token"], first["bad"]) == (3, "***", "?")
    assert "ZeroDivisionError" in second["exception"]
    assert "trace_id" not in first


def test_of_a_long_traceback_the_log_has_what_was_raised(lines: io.StringIO) -> None:
    """Its end was cut off: where many exceptions lead to one, as where a database is not reached, the reason."""

    def fail(depth: int) -> None:
        try:
            if depth:
                fail(depth - 1)
            raise ValueError(f"the first of {'many ' * 20}")
        except (ValueError, ZeroDivisionError) as error:
            raise ZeroDivisionError(f"the cause {depth}") from error

    try:
        fail(40)
    except ZeroDivisionError:
        logging.getLogger("test.logs").exception("failed")
    (line,) = lines.getvalue().splitlines()
    told = json.loads(line)["exception"]
    assert told.startswith("Traceback") and told.endswith("ZeroDivisionError: the cause 40")
    assert len(told) <= logs.MAX_TEXT_CHARS + 10


def test_whatever_a_caller_sends_one_event_is_one_line_and_no_command(lines: io.StringIO) -> None:
    sent = "caf\u00e9 \x85\u2028\u2029\n\r\x0b\x0c\x1b[2J\x9b2J"
    logging.getLogger("test.logs").info("refused", extra={"error": sent})
    (line,) = lines.getvalue().splitlines()
    assert json.loads(line)["error"] == sent
    assert not any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in line)


def test_configuring_twice_does_not_double_the_lines(lines: io.StringIO) -> None:
    logs.configure("cache", "INFO", lines)
    logging.getLogger("test.logs").warning("once")
    assert len(lines.getvalue().splitlines()) == 1


def test_no_secret_is_written(lines: io.StringIO) -> None:
    remember_secret("s3cr3t-of-this-install")
    log = logging.getLogger("test.logs")
    log.info("dial redis://user:pa55word@host:6379/0 and postgresql://a:b%40c@h/d", extra={"url": "http://x:hunter2@y"})
    log.info("got authorization: Bearer abcdefgh.ijk-123 and s3cr3t-of-this-install")
    try:
        raise ValueError("no login as redis://:hunter2@host")
    except ValueError:
        log.exception("failed")
    text = lines.getvalue()
    for secret in ("pa55word", "b%40c", "hunter2", "abcdefgh.ijk-123", "s3cr3t-of-this-install"):
        assert secret not in text
    assert "redis://user:***@host:6379/0" in text


def test_the_row_that_a_database_quotes_is_not_written() -> None:
    why = 'CheckViolationError: new row violates check constraint "c"'
    row = "\nDETAIL:  Failing row contains (Ada, scrypt$8$hash, why\nare you\n\nso slow)."
    rest = "\n\nThe above exception was the direct cause of the following exception:\n\nValueError: no"
    assert redact(why + row) == why + "\nDETAIL:  ***"
    assert redact(why + row + "\nHINT:  ask") == why + "\nDETAIL:  ***\nHINT:  ask"
    assert (
        redact(why + row + rest + "\n\n" + why + row) == why + "\nDETAIL:  ***" + rest + "\n\n" + why + "\nDETAIL:  ***"
    )


def test_a_token_that_somebody_takes_for_an_id_is_not_written() -> None:
    for prefix in ("om_", "om-setup_", "om-session_"):
        secret = f"{prefix}{'aB3_-' * 8}xyz"
        assert redact(f"id: '{secret}'; /v1/tokens/{secret}:rotate") == "id: '***'; /v1/tokens/***:rotate"
    assert {redact(made()) for made in (new_token, new_session, new_setup_token)} == {"***"}


def test_ordinary_text_is_not_redacted() -> None:
    for text in (
        "om_web-01",
        "random_" + "x" * 43,
        "10:30@noon",
        "a bearer of news",
        "http://host:80/path",
        "mail me@example.com",
        "DETAIL: a car",
    ):
        assert redact(text) == text


async def test_eventually_gives_up_with_what_it_saw_last() -> None:
    with pytest.raises(AssertionError, match=r"not true within 0\.05 s; last value: 0"):
        await eventually(lambda: 0, within_s=0.05)

    def never() -> bool:
        raise AssertionError("still not")

    with pytest.raises(AssertionError) as caught:
        await eventually(never, within_s=0.05)
    assert str(caught.value.__cause__) == "still not"

    async def soon() -> str:
        return "value"

    assert await eventually(soon) == "value"


async def test_a_free_port_can_be_listened_on() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", free_port())
    server.close()
    await server.wait_closed()
    assert sys.version_info >= (3, 11)
