"""What a store forgot when it died is shipped again, however it died and whoever saw it; nothing else is."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries.engine import Engine
from services.timeseries.engine.cursors import SETTLED_AFTER_S
from services.timeseries.followers import backend as backend_module
from services.timeseries.followers import follower as module
from services.timeseries.followers.backend import BackendInfo, Receipt, TaggedRows
from services.timeseries.followers.follower import Follower
from tests.harness import eventually
from tests.timeseries.followers.played import MANY, SET, SETTINGS, PlayedBackend, let_run
from tests.timeseries.followers.samples import NOON_MS, caught_up, rows, tick


async def shipped(engine: Engine, clock: ManualClock, numbers: Iterable[int]) -> None:
    """Appends ticks, each once the store has the one before."""
    for number in numbers:
        await engine.append(tick(SET, number), metric_sets=(SET,))
        await let_run(clock, lambda: caught_up(engine))


async def test_what_a_store_forgot_when_it_died_is_shipped_again(tmp_path: Path) -> None:
    """It acknowledged rows that it had in memory only, and comes back without them."""
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)),
    ):
        await shipped(engine, clock, range(3))
        clock.advance(SETTLED_AFTER_S)  # so much is surely on its disk
        await shipped(engine, clock, range(3, 6))
        assert sorted(backend.times) == list(range(6))
        backend.batches, kept = [], [batch for batch in backend.batches if batch[0].rows.times_ms[0] < NOON_MS + 3]
        backend.errors = [Unavailable("it died")] * 3
        await engine.append(tick(SET, 6))
        await let_run(clock, lambda: eventually(lambda: {3, 4, 5, 6} <= set(backend.times)))
        await let_run(clock, lambda: caught_up(engine))
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
        await shipped(engine, clock, range(6))
        backend.has, backend.errors = [0, 1, 2, 3], [Unavailable("it died")] * 3
        await engine.append(tick(SET, 6))
        await let_run(clock, lambda: eventually(lambda: not backend.errors))
        await let_run(clock, lambda: caught_up(engine))
        assert {reason: of.points for reason, of in follower.refusals.items()} == {module.SENT_AGAIN: 4}
        for number in (5, 7):  # a late one, which is new
            await engine.append(tick(SET, number))
            await let_run(clock, lambda: caught_up(engine))
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
        await let_run(clock, lambda: caught_up(engine))
        clock.advance(SETTLED_AFTER_S)
        await engine.append(tick(SET, 1))
        await let_run(clock, lambda: caught_up(engine))
        backend.batches, backend.room = [], 1  # it died with the last row, comes back for one portion, and dies again
        backend.errors = [Unavailable("it died")] * 2
        big = [("a", NOON_MS + at, [1.0]) for at in range(10, 35)]
        await engine.append(rows(SET, big))
        await let_run(clock, lambda: eventually(lambda: len(backend.batches) == 1))
        clock.advance(SETTLED_AFTER_S)
        asked = len(backend.asked)
        await let_run(clock, lambda: eventually(lambda: len(backend.asked) > asked + 3))
        backend.room = MANY
        await let_run(clock, lambda: caught_up(engine))
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
            await let_run(clock, lambda: eventually(lambda: not backend.errors))
            await let_run(clock, lambda: caught_up(engine))
    assert backend.times == [0, 1, 2]


async def test_a_store_that_throttles_and_then_dies_has_what_it_forgot_shipped_again(tmp_path: Path) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)),
    ):
        await shipped(engine, clock, range(2))
        backend.batches = []
        backend.errors = [Unavailable("too much", retry_after_s=1.0)] * 2 + [Unavailable("it died")] * 2
        await engine.append(tick(SET, 2))
        await let_run(clock, lambda: eventually(lambda: 2 in backend.times))
        await let_run(clock, lambda: caught_up(engine))
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
        await let_run(clock, lambda: caught_up(engine))
        for number in (1, 2):  # each death takes all that the store has
            backend.batches, backend.errors = [], [Unavailable("it died")] * 2
            await engine.append(tick(SET, number))
            await let_run(clock, lambda: eventually(lambda: not backend.errors))
            await let_run(clock, lambda: caught_up(engine))
        assert "may lack" in (await follower.probe()).degraded
        clock.advance(SETTLED_AFTER_S)
        if news:
            await engine.append(tick(SET, 3))
        await let_run(clock, lambda: eventually(lambda: set(backend.times) == {0, 1, 2} | news))
        await let_run(clock, lambda: caught_up(engine))
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
        await let_run(clock, lambda: caught_up(engine))
        backend.batches, backend.errors = [], [Unavailable("it died")] * 2
        assert [bool((await follower.probe()).down) for _ in range(3)] == [True, True, False]
        clock.advance(10 * SETTLED_AFTER_S)
        await engine.append(tick(SET, 1))
        await let_run(clock, lambda: eventually(lambda: set(backend.times) == {0, 1}))
        await let_run(clock, lambda: caught_up(engine))


async def test_what_a_store_forgot_while_it_had_asked_to_be_left_alone_is_shipped_again(tmp_path: Path) -> None:
    backend, clock = Silent(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await let_run(clock, lambda: caught_up(engine))
        backend.batches, backend.errors = [], [Unavailable("too much", retry_after_s=30.0)]
        await engine.append(tick(SET, 1))
        await let_run(clock, lambda: eventually(lambda: not backend.errors))
        backend.errors = [Unavailable("it died")] * 2
        assert [bool((await follower.probe()).down) for _ in range(3)] == [True, True, False]
        clock.advance(31)
        await let_run(clock, lambda: eventually(lambda: set(backend.times) == {0, 1}))
        await let_run(clock, lambda: caught_up(engine))


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
                await let_run(clock, lambda: eventually(lambda: not backend.errors and bool(backend.batches)))
                await let_run(clock, lambda: caught_up(engine))
            yield engine, follower

    async with a_life(*(range(1) if seen_by == "probes" else range(3))) as (_, follower):
        if seen_by == "probes":
            backend.batches, backend.errors = [], [Unavailable("it died")] * 2
            assert [bool((await follower.probe()).down) for _ in range(2)] == [True, True]
        assert "may lack" in (await follower.probe()).degraded
    owed = {0} if seen_by == "probes" else {0, 1, 2}
    async with a_life() as (_, follower):
        await let_run(clock, lambda: eventually(lambda: set(backend.times) == owed))
        assert (await follower.probe()).degraded == ""
    backend.batches = []
    async with a_life() as (engine, _):
        await engine.append(tick(SET, 9))
        await let_run(clock, lambda: caught_up(engine))
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
            await let_run(clock, lambda: eventually(lambda: not backend.errors))
            await let_run(clock, lambda: caught_up(engine))
    assert set(backend.times) == {0, 1}


async def test_what_is_shipped_again_a_store_may_forget_again(tmp_path: Path) -> None:
    """It is as young as anything else then, however long ago its batch was shipped for the first time."""
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)),
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await let_run(clock, lambda: caught_up(engine))
        for number in (1, 2, 3):  # each death takes all that the store has; after the second it waits for a minute
            backend.batches, backend.errors = [], [Unavailable("it died")] * 2
            await engine.append(tick(SET, number))
            await let_run(clock, lambda: eventually(lambda: not backend.errors))
            await let_run(clock, lambda: caught_up(engine))
            if number > 1:
                clock.advance(SETTLED_AFTER_S)
                await engine.append(tick(SET, 10 * number))
                await let_run(clock, lambda number=number: eventually(lambda: 1 in backend.times))
                await let_run(clock, lambda: caught_up(engine))
        assert set(backend.times) == {0, 1, 2, 3, 20, 30}


async def test_a_store_is_not_shown_well_while_the_cursor_goes_back(tmp_path: Path) -> None:
    backend, clock = Silent(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await let_run(clock, lambda: caught_up(engine))
        backend.errors, backend.room = [Unavailable("it died")] * 2, 2
        for _ in range(2):
            await follower.probe()
        held, go_on = engine.cursors.go_back, asyncio.Event()

        async def go_back(name: str, cursor: int) -> int:
            is_held.set()
            await go_on.wait()
            return await held(name, cursor)

        is_held = asyncio.Event()
        engine.cursors.go_back = go_back  # type: ignore[method-assign]
        await engine.append(tick(SET, 1))
        await let_run(clock, is_held.wait)
        assert "may lack" in (await follower.probe()).degraded
        go_on.set()
        await let_run(clock, lambda: eventually(lambda: "no room" in follower._last_error))
        shown = await follower.probe()
        assert shown.degraded and shown.lag_points == 2


async def test_what_is_owed_to_a_store_is_in_its_lag_though_it_stays_away(tmp_path: Path) -> None:
    """Else the journal, or the day's end, would let it go, and nobody would count it."""
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        await engine.append(tick(SET, 0), metric_sets=(SET,))
        await let_run(clock, lambda: caught_up(engine))
        for number in (1, 2):  # the second death comes within a minute of going back after the first
            backend.batches, backend.errors = [], [Unavailable("it died")] * (2 if number == 1 else MANY)
            await engine.append(tick(SET, number))
            await let_run(clock, lambda: eventually(lambda: len(backend.errors) < MANY - 2))
            if number == 1:
                await let_run(clock, lambda: caught_up(engine))
        assert (await follower.lag()).points == 1
        clock.advance(SETTLED_AFTER_S)

        async def all_are_owed() -> bool:
            return (await follower.lag()).points == 3

        await let_run(clock, lambda: eventually(all_are_owed))
        backend.errors = []
        await let_run(clock, lambda: caught_up(engine))
        assert set(backend.times) == {0, 1, 2}


async def test_a_cursor_that_could_not_go_back_on_a_full_disk_goes_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is owed would be forgotten until a restart, and what the store takes meanwhile taken for kept."""
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with (
        Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine,
        Follower(engine, backend, clock, random.Random(1)) as follower,
    ):
        await shipped(engine, clock, range(3))
        journal, full = engine._store.journal, [True]
        rewind = journal.rewind_cursor

        def rewind_cursor(*arguments: Any) -> int:
            if full:
                full.clear()
                raise apsw.FullError("no room")
            return rewind(*arguments)

        monkeypatch.setattr(journal, "rewind_cursor", rewind_cursor)
        backend.batches, backend.errors = [], [Unavailable("it died")] * 2
        await engine.append(tick(SET, 3))
        await let_run(clock, lambda: eventually(lambda: not full))
        assert follower._position.is_owed
        assert await engine.cursors.unshipped("played") != []
        clock.advance(SETTLED_AFTER_S)
        await let_run(clock, lambda: eventually(lambda: set(backend.times) == {0, 1, 2, 3}))
        await let_run(clock, lambda: caught_up(engine))
