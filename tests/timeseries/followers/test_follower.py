"""The shipping loop by itself, with a store that a test plays: bounds, order, cursor, gaps, pauses, refusals."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, OpenManagerError, Unavailable
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.followers import backend as backend_module
from services.timeseries.followers import follower as module
from services.timeseries.followers.backend import BackendInfo, Receipt, TaggedRows
from services.timeseries.followers.follower import Follower, forget_others
from tests.harness import eventually
from tests.timeseries.followers.samples import CLOCK, NOON_MS, caught_up, metric_set, rows, tick

SET = metric_set("cpu_usage")
SETTINGS = EngineSettings(maintenance_interval_s=1e9)
MANY = 1_000


class PlayedBackend:
    """Takes what it is told to take."""

    name = "played"
    address = "here"
    syncs = False

    def __init__(self) -> None:
        self.room = MANY
        self.errors: list[OpenManagerError] = []
        self.bad: set[int] = set()
        self.asked: list[float] = []
        self.batches: list[list[TaggedRows]] = []
        self.clock = ManualClock(NOON_MS)

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        self.asked.append(self.clock.monotonic())
        if len(self.batches) >= self.room:
            raise Unavailable("no room")
        if self.errors:
            raise self.errors.pop(0)
        if self.bad & {int(at) - NOON_MS for part in batch for at in part.rows.times_ms}:
            raise InvalidArgument("it is bad", reason="BAD")
        self.batches.append(list(batch))
        return Receipt(shipped=sum(part.rows.points for part in batch))

    async def probe(self) -> BackendInfo:
        return BackendInfo(version="played")

    async def close(self) -> None:
        pass

    @property
    def times(self) -> list[int]:
        return [int(at) - NOON_MS for batch in self.batches for part in batch for at in part.rows.times_ms]


async def test_batches_keep_the_bounds_and_the_cursor_waits_for_all_of_a_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "MAX_SHIP_ROWS", 10)
    backend = PlayedBackend()
    async with Engine.open(tmp_path, clock=CLOCK, settings=SETTINGS) as engine:
        for number in range(7):
            await engine.append(tick(SET, number), metric_sets=(SET,))
        await engine.append(rows(SET, [("a", NOON_MS + at, [1.0]) for at in range(7, 32)]))
        await engine.append(tick(SET, 32))
        async with Follower(engine, backend, CLOCK, random.Random(1)):
            await caught_up(engine)
        assert backend.times == list(range(33))
        assert [sum(map(len, batch)) for batch in backend.batches] == [7, 10, 10, 6]

        backend.room = len(backend.batches) + 1
        await engine.append(rows(SET, [("a", NOON_MS + at, [1.0]) for at in range(33, 58)]))
        async with Follower(engine, backend, CLOCK, random.Random(1)):
            await eventually(lambda: len(backend.asked) == 6)
            assert backend.times == list(range(43)), "ten of the last batch's rows are there"
            assert (await engine.status()).followers[0].cursor == 9, "which is not acknowledged"
    backend.batches, backend.room = [], MANY
    async with (
        Engine.open(tmp_path, clock=CLOCK, settings=SETTINGS) as engine,
        Follower(engine, backend, CLOCK, random.Random(1)),
    ):
        await caught_up(engine)
    assert backend.times == list(range(33, 58))


async def test_an_outage_is_asked_about_less_and_less_often_and_as_the_store_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    backend = PlayedBackend()
    clock = backend.clock
    backend.errors = [Unavailable("away", retry_after_s=30.0), *(Unavailable("away") for _ in range(9))]
    told: list[str] = []
    async with Engine.open(tmp_path, clock=CLOCK, settings=SETTINGS) as engine:
        await engine.append(tick(SET, 1), metric_sets=(SET,))
        async with Follower(engine, backend, clock, random.Random(1)) as follower:
            follower.tell_errors(told.append)
            for attempt in range(1, 11):
                await eventually(lambda wanted=attempt: len(backend.asked) == wanted and clock.sleepers)  # type: ignore[misc]
                assert (await follower.probe()).degraded == "away"
                while len(backend.asked) == attempt:
                    clock.advance(0.05)
                    await asyncio.sleep(0)
            await caught_up(engine)
            assert (await follower.probe()).degraded == ""
    pauses = [later - earlier for earlier, later in zip(backend.asked, backend.asked[1:], strict=False)]
    assert 30 <= pauses[0] < 31
    assert 0.1 <= pauses[1] < 0.5 and all(2.5 <= pause < 5.5 for pause in pauses[7:])
    assert backend.times == [1] and told == ["away"] * 10
    messages = [record.message for record in caplog.records if record.name == module.__name__]
    assert len(messages) == 2 and "away" in messages[0] and "again" in messages[1]


async def test_what_a_store_forgot_when_it_died_is_shipped_again(tmp_path: Path) -> None:
    """It acknowledged rows that it had in memory only, and comes back without them."""
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)),
    ):
        for number in range(3):
            await engine.append(tick(SET, number), metric_sets=(SET,))
            await _let_run(clock, lambda: caught_up(engine))
        clock.advance(module.SETTLED_AFTER_S)  # so much is surely on its disk
        for number in range(3, 6):
            await engine.append(tick(SET, number))
            await _let_run(clock, lambda: caught_up(engine))
        assert sorted(backend.times) == list(range(6))
        backend.batches, kept = [], [batch for batch in backend.batches if batch[0].rows.times_ms[0] < NOON_MS + 3]
        backend.errors = [Unavailable("it died")] * 3
        await engine.append(tick(SET, 6))
        await _let_run(clock, lambda: eventually(lambda: {3, 4, 5, 6} <= set(backend.times)))
        await _let_run(clock, lambda: caught_up(engine))
        assert kept and not set(backend.times) & {0, 1, 2}, "what is older is not shipped again"


class InOrder(PlayedBackend):
    """Takes of its one series no sample that is older than its newest, as Prometheus does by default."""

    def __init__(self) -> None:
        super().__init__()
        self.has: list[int] = []

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        await super().ship(batch)
        refused = 0
        for at in (int(at) - NOON_MS for part in batch for at in part.rows.times_ms):
            if self.has and at <= self.has[-1]:
                refused += 1
            else:
                self.has.append(at)
        shipped = sum(map(len, batch)) - refused
        return Receipt(shipped=shipped, refused={"OUT_OF_ORDER": refused} if refused else {})


async def test_a_store_that_takes_rows_in_order_only_has_all_after_it_forgot_the_last_ones(tmp_path: Path) -> None:
    """What it forgot must come before what is newer: later it would be refused. What it did not forget is told apart
    from rows that are missing."""
    backend, clock = InOrder(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        for number in range(6):
            await engine.append(tick(SET, number), metric_sets=(SET,))
            await _let_run(clock, lambda: caught_up(engine))
        backend.has, backend.errors = [0, 1, 2, 3], [Unavailable("it died")] * 3
        await engine.append(tick(SET, 6))
        await _let_run(clock, lambda: eventually(lambda: not backend.errors))
        await _let_run(clock, lambda: caught_up(engine))
        assert {reason: of.points for reason, of in follower.refusals.items()} == {module.SENT_AGAIN: 4}
        for number in (5, 7):  # a late one, which is new
            await engine.append(tick(SET, number))
            await _let_run(clock, lambda: caught_up(engine))
        assert {reason: of.points for reason, of in follower.refusals.items()} == {
            module.SENT_AGAIN: 4,
            "OUT_OF_ORDER": 1,
        }
    assert backend.has == list(range(8))


async def test_a_second_outage_within_a_batch_does_not_hide_what_the_first_one_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "MAX_SHIP_ROWS", 10)
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)),
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await _let_run(clock, lambda: caught_up(engine))
        clock.advance(module.SETTLED_AFTER_S)
        await engine.append(tick(SET, 1))
        await _let_run(clock, lambda: caught_up(engine))
        backend.batches, backend.room = [], 1  # it died with the last row, comes back for one portion, and dies again
        backend.errors = [Unavailable("it died")] * 2
        big = [("a", NOON_MS + at, [1.0]) for at in range(10, 35)]
        await engine.append(rows(SET, big))
        await _let_run(clock, lambda: eventually(lambda: len(backend.batches) == 1))
        clock.advance(module.SETTLED_AFTER_S)
        asked = len(backend.asked)
        await _let_run(clock, lambda: eventually(lambda: len(backend.asked) > asked + 3))
        backend.room = MANY
        await _let_run(clock, lambda: caught_up(engine))
        assert set(backend.times) == {1, *range(10, 35)}


async def test_a_store_that_throttles_and_does_not_say_for_how_long_is_sent_nothing_again(tmp_path: Path) -> None:
    """It has what it took, and more to do would not help it."""
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)),
    ):
        for number in range(3):
            backend.errors = [Unavailable("too much", reason="STORE_THROTTLES")] * 3
            await engine.append(tick(SET, number), metric_sets=(SET,))
            await _let_run(clock, lambda: eventually(lambda: not backend.errors))
            await _let_run(clock, lambda: caught_up(engine))
    assert backend.times == [0, 1, 2]


async def test_a_store_that_throttles_and_then_dies_has_what_it_forgot_shipped_again(tmp_path: Path) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)),
    ):
        for number in range(2):
            await engine.append(tick(SET, number), metric_sets=(SET,))
            await _let_run(clock, lambda: caught_up(engine))
        backend.batches = []
        backend.errors = [Unavailable("too much", retry_after_s=1.0)] * 2 + [Unavailable("it died")] * 2
        await engine.append(tick(SET, 2))
        await _let_run(clock, lambda: eventually(lambda: 2 in backend.times))
        await _let_run(clock, lambda: caught_up(engine))
        assert set(backend.times) == {0, 1, 2}


@pytest.mark.parametrize("news", [{3}, set()], ids=["then more comes", "then nothing comes"])
async def test_what_a_store_forgot_when_it_died_twice_within_a_minute_is_shipped_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, news: set[int]
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 60.0 if news else 0.05)
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await _let_run(clock, lambda: caught_up(engine))
        for number in (1, 2):  # each death takes all that the store has
            backend.batches, backend.errors = [], [Unavailable("it died")] * 2
            await engine.append(tick(SET, number))
            await _let_run(clock, lambda: eventually(lambda: not backend.errors))
            await _let_run(clock, lambda: caught_up(engine))
        assert "may lack" in (await follower.probe()).degraded
        clock.advance(module.SETTLED_AFTER_S)
        if news:
            await engine.append(tick(SET, 3))
        await _let_run(clock, lambda: eventually(lambda: set(backend.times) == {0, 1, 2} | news))
        await _let_run(clock, lambda: caught_up(engine))
        assert (await follower.probe()).degraded == ""


class Silent(PlayedBackend):
    async def probe(self) -> BackendInfo:
        if self.errors:
            raise self.errors.pop(0)
        return await super().probe()


async def test_what_a_store_forgot_while_there_was_nothing_to_ship_is_shipped_again(tmp_path: Path) -> None:
    backend, clock = Silent(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await _let_run(clock, lambda: caught_up(engine))
        backend.batches, backend.errors = [], [Unavailable("it died")] * 2
        assert [bool((await follower.probe()).down) for _ in range(3)] == [True, True, False]
        clock.advance(10 * module.SETTLED_AFTER_S)
        await engine.append(tick(SET, 1))
        await _let_run(clock, lambda: eventually(lambda: set(backend.times) == {0, 1}))
        await _let_run(clock, lambda: caught_up(engine))


async def test_what_a_store_forgot_while_it_had_asked_to_be_left_alone_is_shipped_again(tmp_path: Path) -> None:
    backend, clock = Silent(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await _let_run(clock, lambda: caught_up(engine))
        backend.batches, backend.errors = [], [Unavailable("too much", retry_after_s=30.0)]
        await engine.append(tick(SET, 1))
        await _let_run(clock, lambda: eventually(lambda: not backend.errors))
        backend.errors = [Unavailable("it died")] * 2
        assert [bool((await follower.probe()).down) for _ in range(3)] == [True, True, False]
        clock.advance(31)
        await _let_run(clock, lambda: eventually(lambda: set(backend.times) == {0, 1}))
        await _let_run(clock, lambda: caught_up(engine))


@pytest.mark.parametrize("seen_by", ["rows", "probes"])
async def test_what_is_owed_to_a_store_when_the_process_ends_is_shipped_after_the_next_start(
    tmp_path: Path, seen_by: str
) -> None:
    backend, clock = Silent(), ManualClock(NOON_MS)

    @asynccontextmanager
    async def a_life(*numbers: int) -> AsyncIterator[tuple[Engine, Follower]]:
        async with (
            Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
            Follower(engine, backend, clock, random.Random(1)) as follower,
        ):
            for number in numbers:  # the store dies before each, with all that it has
                backend.batches, backend.errors = [], [Unavailable("it died")] * (2 if number else 0)
                await engine.append(tick(SET, number), metric_sets=(SET,))
                await _let_run(clock, lambda: eventually(lambda: not backend.errors and bool(backend.batches)))
                await _let_run(clock, lambda: caught_up(engine))
            yield engine, follower

    async with a_life(*(range(1) if seen_by == "probes" else range(3))) as (_, follower):
        if seen_by == "probes":
            backend.batches, backend.errors = [], [Unavailable("it died")] * 2
            assert [bool((await follower.probe()).down) for _ in range(2)] == [True, True]
        assert "may lack" in (await follower.probe()).degraded
    owed = {0} if seen_by == "probes" else {0, 1, 2}
    async with a_life() as (_, follower):
        await _let_run(clock, lambda: eventually(lambda: set(backend.times) == owed))
        assert (await follower.probe()).degraded == ""
    backend.batches = []
    async with a_life() as (engine, _):
        await engine.append(tick(SET, 9))
        await _let_run(clock, lambda: caught_up(engine))
    assert backend.times == [9], "once is enough"


async def test_a_store_that_dies_after_a_start_has_what_it_took_before_that_shipped_again(tmp_path: Path) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    for number, errors in enumerate(([], [Unavailable("it died")] * 2)):
        backend.batches, backend.errors = [], [*errors]
        async with (
            Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
            Follower(engine, backend, clock, random.Random(1)),
        ):
            await engine.append(tick(SET, number), metric_sets=(SET,))
            await _let_run(clock, lambda: eventually(lambda: not backend.errors))
            await _let_run(clock, lambda: caught_up(engine))
    assert set(backend.times) == {0, 1}


async def _let_run(clock: ManualClock, until: Callable[[], Awaitable[object]]) -> None:
    """Lets time pass until something has happened."""
    waiting = asyncio.ensure_future(until())
    while not waiting.done():
        clock.advance(0.01)  # slowly: what the disk keeps waiting is not to be settled meanwhile
        await asyncio.sleep(0.001)
    await waiting


async def test_a_refused_row_is_found_counted_and_passed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = PlayedBackend()
    backend.bad = {3, 4, 17}
    async with Engine.open(tmp_path, clock=CLOCK, settings=SETTINGS) as engine:
        for first in (0, 7, 14):
            await engine.append(rows(SET, [("a", NOON_MS + first + at, [1.0]) for at in range(7)]), metric_sets=(SET,))
        async with Follower(engine, backend, CLOCK, random.Random(1)) as follower:
            await caught_up(engine)
            assert follower.refusals["BAD"].points == 3 and follower.shipped_points == 18
    assert backend.times == [number for number in range(21) if number not in backend.bad], "in order"
    assert len([record for record in caplog.records if "BAD" in record.message]) == 1


async def test_a_fault_of_the_adapter_is_shown_and_shipping_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FaultyBackend(PlayedBackend):
        async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
            if not self.asked:
                self.asked.append(0)
                raise ZeroDivisionError("a bug")
            return await super().ship(batch)

    backend = FaultyBackend()
    told: list[str] = []
    async with Engine.open(tmp_path, clock=CLOCK, settings=SETTINGS) as engine:
        await engine.append(tick(SET, 1), metric_sets=(SET,))
        follower = Follower(engine, backend, CLOCK, random.Random(1))
        follower.tell_errors(told.append)
        async with follower:
            await caught_up(engine)
    assert backend.times == [1] and "a bug" in told[0] and "a bug" in caplog.text


async def test_a_store_that_was_taken_away_pins_nothing(tmp_path: Path) -> None:
    async with Engine.open(tmp_path, clock=CLOCK, settings=SETTINGS) as engine:
        await engine.cursors.register("played")
        await engine.cursors.register("gone")
        await forget_others(engine, {"played"})
        assert [follower.name for follower in (await engine.status()).followers] == ["played"]
