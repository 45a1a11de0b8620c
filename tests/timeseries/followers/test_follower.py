"""The shipping loop by itself, with a store that a test plays: bounds, order, cursor, gaps, pauses, refusals."""

import asyncio
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from runtime.errors import Unavailable
from services.timeseries.engine import Engine
from services.timeseries.followers import backend as backend_module
from services.timeseries.followers import follower as module
from services.timeseries.followers.backend import Receipt, TaggedRows
from services.timeseries.followers.follower import Follower, forget_others
from tests.harness import eventually
from tests.timeseries.followers.played import MANY, SET, SETTINGS, PlayedBackend
from tests.timeseries.followers.samples import CLOCK, NOON_MS, caught_up, rows, tick


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
