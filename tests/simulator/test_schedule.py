"""Ticks are multiples of the interval, whatever happens to the clock."""

import asyncio

from runtime.clock import ManualClock
from services.simulator.schedule import Due, Schedule
from tests.harness import eventually

START_MS = 1_760_000_003_700  # 3.7 s past a multiple of ten seconds


async def _next(schedule: Schedule, clock: ManualClock, *advances_s: float) -> Due:
    """The next tick, moving the clock on whenever the schedule sleeps."""
    task = asyncio.create_task(schedule.next())
    for seconds in advances_s:
        await eventually(lambda: clock.sleepers == 1)
        assert not task.done()
        clock.advance(seconds)
    return await asyncio.wait_for(task, 5)


async def test_ticks_are_aligned_to_the_epoch_and_do_not_drift() -> None:
    clock = ManualClock(now_ms=START_MS)
    schedule = Schedule(clock, interval_ms=10_000, most_late=60)
    first = await _next(schedule, clock, 6.3)
    assert first == Due(tick=176_000_001, time_ms=1_760_000_010_000, skipped=0)
    for number in range(1, 120):
        clock.advance(0.037)  # work after each tick: an interval added to "now" would drift by 4 s
        due = await _next(schedule, clock, 9.963)
        assert due == Due(tick=first.tick + number, time_ms=first.time_ms + number * 10_000, skipped=0)


async def test_an_early_waking_waits_again() -> None:
    clock = ManualClock(now_ms=START_MS)
    schedule = Schedule(clock, interval_ms=10_000, most_late=60)
    task = asyncio.create_task(schedule.next())
    await eventually(lambda: clock.sleepers == 1)
    clock.set_now_ms(START_MS - 500)  # the clock is corrected a little while we sleep
    clock.advance(6.3)
    await eventually(lambda: clock.sleepers == 1)
    assert not task.done()
    clock.advance(0.5)
    assert (await asyncio.wait_for(task, 5)).time_ms == 1_760_000_010_000


async def test_late_ticks_are_given_out_one_by_one() -> None:
    clock = ManualClock(now_ms=START_MS)
    schedule = Schedule(clock, interval_ms=10_000, most_late=60)
    clock.advance(56.3)
    dues = [await _next(schedule, clock) for _ in range(6)]
    assert [due.time_ms for due in dues] == list(range(1_760_000_010_000, 1_760_000_070_000, 10_000))
    assert sum(due.skipped for due in dues) == 0


async def test_what_is_too_late_is_skipped_and_counted() -> None:
    clock = ManualClock(now_ms=START_MS)
    schedule = Schedule(clock, interval_ms=10_000, most_late=3)
    clock.advance(106.3)  # eleven ticks are due
    dues = [await _next(schedule, clock) for _ in range(4)]
    assert [due.skipped for due in dues] == [7, 0, 0, 0]
    assert [due.time_ms for due in dues] == list(range(1_760_000_080_000, 1_760_000_120_000, 10_000))


async def test_a_measurement_takes_the_latest_tick_only() -> None:
    clock = ManualClock(now_ms=START_MS)
    schedule = Schedule(clock, interval_ms=10_000, most_late=0)
    clock.advance(56.3)
    assert await _next(schedule, clock) == Due(tick=176_000_006, time_ms=1_760_000_060_000, skipped=5)


async def test_a_clock_set_back_does_not_silence_the_fleet() -> None:
    clock = ManualClock(now_ms=START_MS)
    schedule = Schedule(clock, interval_ms=10_000, most_late=60)
    await _next(schedule, clock, 6.3)
    clock.set_now_ms(START_MS - 3_600_000)
    due = await _next(schedule, clock, 6.3)
    assert due.time_ms == 1_760_000_010_000 - 3_600_000
