"""A follower so far behind that the journal let its rows go: they come from blocks, and what is gone is counted."""

import logging
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.model import Rows, ServerDescriptor
from runtime.clock import ManualClock
from runtime.errors import Unavailable
from services.timeseries.engine import Engine, EngineSettings, TailBatch
from services.timeseries.followers.backend import Receipt, TaggedRows
from services.timeseries.followers.follower import EVICTED, Follower
from tests.harness import eventually
from tests.timeseries.followers.played import PlayedBackend
from tests.timeseries.followers.samples import NOON_MS, caught_up, metric_set, rows, tick

SET = metric_set("cpu_usage", "requests_total")
NAN = float("nan")
SMALL = EngineSettings(
    maintenance_interval_s=1e9,
    journal_bytes_limit=1,
    journal_keep_s=0.0,
    sweep_rows=2,
    sparse_points_a_day=0,
    late_grace_s=0.0,
)


def told(environment: str) -> ServerDescriptor:
    return ServerDescriptor(server_id="a", hostname="a", environment=environment)


async def swept(engine: Engine, clock: ManualClock) -> None:
    """Puts all rows into blocks, after which the journal, over its limit, lets them go."""
    clock.advance(1)
    await engine.maintain(everything=True)
    assert engine.first_sequence == engine.last_sequence + 1


async def three_files(engine: Engine, clock: ManualClock) -> None:
    """Has a follower that shipped nothing lack three files of 3,000 rows: more than one request."""
    await engine.cursors.register("played")
    for day in range(3):
        big = [("a", NOON_MS + day * 86_400_000 + number, [1.0, 1.0]) for number in range(3_000)]
        await engine.append(rows(SET, big), metric_sets=(SET,))
    await swept(engine, clock)


def values(backend: PlayedBackend) -> dict[tuple[str, int], tuple[list[float], str]]:
    """What a store would have: of equal times the values that came last, with the environment they were tagged with."""
    found: dict[tuple[str, int], tuple[list[float], str]] = {}
    for part in (part for batch in backend.batches for part in batch):
        for server_id, time_ms, row, descriptor in zip(
            part.rows.server_ids, part.rows.times_ms.tolist(), part.rows.values.tolist(), part.descriptors, strict=True
        ):
            before = found.get((server_id, time_ms - NOON_MS), ([NAN, NAN], ""))[0]
            joined = [new if new == new else old for old, new in zip(before, row, strict=True)]
            found[server_id, time_ms - NOON_MS] = joined, descriptor.environment if descriptor else ""
    return found


async def test_everything_comes_with_the_tags_of_its_time_and_then_the_journal_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    errors: list[str] = []
    async with Engine.open(tmp_path, clock=clock, settings=SMALL) as engine:
        await engine.cursors.register("played")
        for number in range(6):
            descriptor = told("staging" if number < 3 else "production")
            await engine.append(tick(SET, number, "a"), metric_sets=(SET,), servers=(descriptor,))
            await engine.append(tick(SET, number, "b"))
        await swept(engine, clock)
        await engine.append(tick(SET, 6, "a"))
        follower = Follower(engine, backend, clock, random.Random(1))
        follower.tell_errors(errors.append)
        lag = await follower.lag()
        assert (lag.batches_in_blocks, lag.points) == (12, 26), "also what is in blocks"
        assert lag.seconds == (clock.now_ms() - NOON_MS) / 1_000 > 0, "the first one's age"
        async with follower:
            await caught_up(engine)
            assert follower.resent_points == 24
            lag = await follower.lag()
            assert (lag.batches_in_blocks, lag.points, lag.seconds) == (0, 0, 0)
    found = values(backend)
    assert {name: tags for name, (_, tags) in found.items()} == {
        **{("a", number): "staging" if number < 3 else "production" for number in range(7)},
        **{("b", number): "" for number in range(6)},
    }
    assert len(backend.times) == 13, "nothing twice"
    assert "12 batches left the journal" in errors[0] and "going on from blocks" in caplog.text


async def test_of_rows_of_one_time_the_newest_stays(tmp_path: Path) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)

    def at(time_ms: int, *cells: float) -> Rows:
        return rows(SET, [("a", NOON_MS + time_ms, list(cells))])

    async with Engine.open(tmp_path, clock=clock, settings=SMALL) as engine:
        await engine.cursors.register("played")
        await engine.append(at(0, 1.0, 1.0), metric_sets=(SET,))
        await engine.append(at(1, 1.0, 1.0))
        await engine.append(at(0, 2.0, NAN))
        await swept(engine, clock)
        await engine.append(at(1, 3.0, 3.0))  # a newer one, still in the journal
        async with Follower(engine, backend, clock, random.Random(1)):
            await caught_up(engine)
    assert {name: row for name, (row, _) in values(backend).items()} == {("a", 0): [2.0, 1.0], ("a", 1): [3.0, 3.0]}


async def test_what_was_collected_before_the_journal_let_it_go_does_not_come_after_newer_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)

    def at(time_ms: int, *cells: float) -> Rows:
        return rows(SET, [("a", NOON_MS + time_ms, list(cells))])

    async with Engine.open(tmp_path, clock=clock, settings=replace(SMALL, tail_read_bytes=1)) as engine:
        await engine.cursors.register("played")
        await engine.append(at(0, 1.0, 1.0), metric_sets=(SET,), servers=(told("staging"),))
        await engine.append(at(0, 2.0, NAN), servers=(told("production"),))
        tail = engine.tail

        async def swept_behind_the_first(from_sequence: int = 0) -> AsyncIterator[TailBatch]:
            is_first = True
            async for batch in tail(from_sequence):
                yield batch
                if is_first:
                    await swept(engine, clock)
                    await engine.append(at(1, 3.0, 3.0))
                is_first = False

        monkeypatch.setattr(engine, "tail", swept_behind_the_first)
        async with Follower(engine, backend, clock, random.Random(1)):
            await caught_up(engine)
    assert values(backend) == {("a", 0): ([2.0, 1.0], "production"), ("a", 1): ([3.0, 3.0], "production")}


async def test_what_was_shipped_before_is_not_shipped_again(tmp_path: Path) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with Engine.open(tmp_path, clock=clock, settings=SMALL) as engine:
        for number in range(4):
            await engine.append(tick(SET, number), metric_sets=(SET,))
        async with Follower(engine, backend, clock, random.Random(1)):
            await caught_up(engine)
        for number in range(4, 8):
            await engine.append(tick(SET, number))
        await swept(engine, clock)
        async with Follower(engine, backend, clock, random.Random(1)):
            await caught_up(engine)
    assert backend.times == list(range(8))


async def test_an_end_in_between_begins_the_rest_again(tmp_path: Path) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    backend.room = 1
    async with Engine.open(tmp_path, clock=clock, settings=SMALL) as engine:
        await three_files(engine, clock)
        async with Follower(engine, backend, clock, random.Random(1)):
            await eventually(lambda: len(backend.asked) > 1)
            assert (await engine.status()).followers[0].cursor == 0
        backend.room = 1_000
        async with Follower(engine, backend, clock, random.Random(1)):
            await caught_up(engine)
    assert len(values(backend)) == 9_000


async def test_a_store_that_dies_while_it_is_sent_blocks_has_what_it_forgot_sent_again(tmp_path: Path) -> None:
    """The cursor stands still until all of them are sent, however long that takes."""
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    backend.room = 1
    async with Engine.open(tmp_path, clock=clock, settings=SMALL) as engine:
        await three_files(engine, clock)
        async with Follower(engine, backend, clock, random.Random(1)):
            await eventually(lambda: bool(backend.batches))
            backend.batches, backend.room = [], 1_000  # it died with all it had taken
            backend.errors = [Unavailable("it died")] * 2

            async def is_caught_up() -> bool:
                clock.advance(1)
                return (await engine.status()).followers[0].cursor == engine.last_sequence

            await eventually(is_caught_up)
    assert len(values(backend)) == 9_000


async def test_a_store_that_dies_again_and_again_while_it_is_sent_blocks_gets_on(tmp_path: Path) -> None:
    """It is not sent all of them again each time: they may be more than it takes between two deaths."""
    clock = ManualClock(NOON_MS)

    class Mortal(PlayedBackend):
        """Takes a portion in half a minute, and dies after each fourth but the last with those of its last minute."""

        dead = 0

        async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
            if self.dead:
                self.dead -= 1
                raise Unavailable("it died")
            receipt = await super().ship(batch)
            clock.advance(30.0)
            if len(self.asked) % 4 == 0 and batch[-1].rows.server_ids[0] != "l":
                self.dead = 3
                del self.batches[-2:]
            return receipt

    backend = Mortal()
    async with Engine.open(tmp_path, clock=clock, settings=SMALL) as engine:
        await engine.cursors.register("played")
        for server in "abcdefghijkl":
            big = [(server, NOON_MS + number, [1.0, 1.0]) for number in range(3_000)]
            await engine.append(rows(SET, big), metric_sets=(SET,))
        await swept(engine, clock)

        async def is_caught_up() -> bool:
            clock.advance(1)
            return (await engine.status()).followers[0].cursor == engine.last_sequence

        async with Follower(engine, backend, clock, random.Random(1)):
            await eventually(is_caught_up)
    assert len(values(backend)) == 36_000


async def test_what_retention_took_before_it_was_shipped_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    settings = EngineSettings(
        maintenance_interval_s=1e9,
        journal_bytes_limit=1,
        journal_keep_s=0.0,
        sweep_rows=2,
        sparse_points_a_day=0,
        late_grace_s=0.0,
        raw_retention_s=86_400,
    )
    async with Engine.open(tmp_path, clock=clock, settings=settings) as engine:
        await engine.cursors.register("played")
        for number in range(5):
            await engine.append(tick(SET, number), metric_sets=(SET,))
        await swept(engine, clock)
        clock.advance(3 * 86_400)
        await engine.append(tick(SET, 3 * 86_400_000))
        await engine.maintain(everything=True)
        assert (await engine.status()).evicted_partitions == 1
        follower = Follower(engine, backend, clock, random.Random(1))
        async with follower:
            await caught_up(engine)
            (refusal,) = (await follower.probe()).refusals
            assert (refusal.reason, refusal.points) == (EVICTED, 10)
    assert backend.times == [3 * 86_400_000]
    assert any("had shipped" in record.message and record.levelno == logging.ERROR for record in caplog.records)


async def test_a_batch_is_acknowledged_when_the_store_has_it_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, clock = PlayedBackend(), ManualClock(NOON_MS)
    async with Engine.open(tmp_path, clock=clock, settings=SMALL) as engine:
        sequence = await engine.append(tick(SET, 1), metric_sets=(SET,))
        async with Follower(engine, backend, clock, random.Random(1)) as follower:
            await follower.shipped(sequence)
            assert backend.times == [1]
            monkeypatch.setattr("services.timeseries.followers.follower.ACKNOWLEDGE_TIMEOUT_S", 0.2)
            backend.room = 1
            sequence = await engine.append(tick(SET, 2))
            with pytest.raises(Unavailable, match=r"played has not acknowledged the batch .*TIMESERIES_ACK") as refused:
                await follower.shipped(sequence)
            assert refused.value.reason == "NOT_REPLICATED"
