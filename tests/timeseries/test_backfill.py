"""A back-fill gives a store what the follower would have given it, whatever interrupts it and whatever is written
meanwhile. The store is a real InfluxDB."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import apsw
import pytest

from fleet.model import ServerDescriptor
from runtime.clock import Clock, ManualClock, SystemClock
from runtime.errors import Unavailable
from services.timeseries import backfill as module
from services.timeseries import commands
from services.timeseries.backfill import Backfill, BackfillError
from services.timeseries.backfill_state import State
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.followers.backend import Backend, BackendInfo, Receipt, TaggedRows
from services.timeseries.followers.follower import Follower
from services.timeseries.followers.influxdb import InfluxBackend
from services.timeseries.followers.influxdb_api import InfluxTarget
from services.timeseries.remote.history import RemoteHistory
from services.timeseries.remote.influxdb import InfluxHistory
from tests.harness import eventually
from tests.harness.influxdb import ORG, TOKEN, InfluxServer
from tests.timeseries.engine.model import everything, metric_set, rows
from tests.timeseries.engine.test_matrix import MIDNIGHT, Source
from tests.timeseries.followers.played import PlayedBackend

CLOCK = SystemClock()
DAY_MS = 86_400_000
SET = metric_set("cpu_usage", "requests_total")
SETTINGS = EngineSettings(head_rows=7, maintenance_interval_s=1e9, journal_keep_s=0.0, merge_blocks=3)
Line = tuple[str, str, str, str, int, float]


def said(server: str, environment: str, role: str = "web") -> ServerDescriptor:
    return ServerDescriptor(server_id=server, hostname=server, environment=environment, role=role)


def target(influx: InfluxServer, bucket: str) -> InfluxTarget:
    return InfluxTarget(url=influx.url, token=TOKEN, org=ORG, bucket=bucket)


@asynccontextmanager
async def shipping_to(influx: InfluxServer, bucket: str) -> AsyncIterator[InfluxBackend]:
    backend = InfluxBackend(target(influx, bucket))
    try:
        yield backend
    finally:
        await backend.close()


async def lines(influx: InfluxServer, bucket: str) -> set[Line]:
    """Everything in a bucket, tags and all."""
    found = await influx.query(f'from(bucket: "{bucket}") |> range(start: 0, stop: 2200-01-01T00:00:00Z)')
    listed = [
        (
            one["server_id"],
            one.get("environment") or "",
            one.get("role") or "",
            one["_field"],
            round(one["_time"].timestamp() * 1_000),
            one["_value"],
        )
        for one in found
    ]
    assert len(set(listed)) == len(listed)
    return set(listed)


def point(line: Line) -> tuple[str, str, int]:
    return line[0], line[3], line[4]


async def newest(engine: Engine) -> set[tuple[str, str, int, float]]:
    """What the engine answers: server, metric, time and value of each point."""
    found = await everything(engine)
    return {(*name, time, value) for name, series in found.items() for time, value in series}


async def shipped(engine: Engine) -> bool:
    return all(follower.cursor == engine.last_sequence for follower in (await engine.status()).followers)


async def fill(engine: Engine, clock: ManualClock, seed: int = 1, batches: int = 120) -> None:
    """Rows of several days and sets, late, doubled and sent again, of servers that move; they end in blocks alone."""
    source = Source(seed)
    told = {0: [said("a", "staging"), said("b", "", "")], 30: [said("a", "production")], 31: [said("b", "lab", "db")]}
    told |= {55: [said("a", "production", "cache")], 60: [said("a", "staging")]}
    for number in range(batches):
        of_set, batch = source.batch(number)
        await engine.append(batch, metric_sets=(of_set,), servers=told.get(number, []))
        if number % 25 == 0 or number == batches - 1:
            await eventually(lambda: shipped(engine), within_s=60)
            clock.advance(1)
            await engine.maintain(everything=True)
    assert engine.first_sequence > engine.last_sequence


def prepared(
    tmp_path: Path,
    backend: Backend,
    state: State | None = None,
    *,
    rate: float = 1e9,
    servers: tuple[str, ...] | None = None,
    reader: RemoteHistory | None = None,
    tell: Callable[[str], None] = lambda _: None,
    progress: Callable[[str, int, float], None] = lambda *_: None,
    clock: Clock = CLOCK,
) -> Backfill:
    """A back-fill of everything in the store."""
    folder = tmp_path / "backfill"
    folder.mkdir(exist_ok=True)
    whole = State(target="t", options="o", start_ms=MIDNIGHT - 5 * DAY_MS, end_ms=MIDNIGHT + 2 * DAY_MS)
    return Backfill(
        tmp_path / "store",
        folder,
        backend,
        state or whole,
        clock=clock,
        rate=rate,
        servers=servers,
        progress=progress,
        tell=tell,
        reader=reader,
    )


class Watched:
    """A backend of which a test sees every batch before it is shipped, and may change what becomes of it."""

    def __init__(self, real: InfluxBackend) -> None:
        self.real = real
        self.name = real.name
        self.syncs = real.syncs
        self.batches = 0
        self.seen: set[tuple[int, str]] = set()

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        self.batches += 1
        self.seen.update((int(part.rows.times_ms[0]) // DAY_MS, part.rows.server_ids[0]) for part in batch)
        return await self.real.ship(batch)

    async def probe(self) -> BackendInfo:
        return await self.real.probe()

    async def close(self) -> None:
        await self.real.close()


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.full)])
async def test_the_lines_are_those_of_the_follower(
    influx: InfluxServer, bucket: str, tmp_path: Path, unsynced: None, seed: int
) -> None:
    clock, filled = ManualClock(MIDNIGHT), f"{bucket}-filled"
    async with Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS) as engine:
        async with Follower(engine, InfluxBackend(target(influx, bucket)), CLOCK, random.Random(1)):
            await eventually(lambda: shipped_to(engine))
            await fill(engine, clock, seed)
        live = await lines(influx, bucket)
        assert len({line[:3] for line in live}) == 6, "the servers moved"
        told, shares = list[str](), list[float]()
        reader = InfluxHistory(target(influx, filled), EngineSettings())
        async with shipping_to(influx, filled) as backend:
            filling = prepared(
                tmp_path, backend, reader=reader, tell=told.append, progress=lambda *seen: shares.append(seen[2])
            )
            await filling.run()
            copied = await lines(influx, filled)
            assert copied <= live, "the same tags, values and times"
            assert {point(line) for line in copied} == {point(line) for line in live}
            assert {(*point(line), line[5]) for line in copied} >= await newest(engine), "and what is left out is older"
            state = filling.state
            assert state.is_done and not (state.likely or state.again or state.unseen or state.refused or state.short)
            assert state.points >= len(copied) > 0.8 * len(live)
            assert shares == sorted(shares) and shares[-1] == 1.0 and told == []
            await prepared(tmp_path, backend).run()
            assert await lines(influx, filled) == copied, "the same line is the same point"
        await reader.close()
    assert [path.name for path in (tmp_path / "backfill").iterdir()] == ["state.json"]


async def shipped_to(engine: Engine) -> bool:
    return bool((await engine.status()).followers)


async def test_a_range_and_some_servers(influx: InfluxServer, bucket: str, tmp_path: Path, unsynced: None) -> None:
    """What is in heads and the journal alone is copied too; a store that ships elsewhere is told of."""
    told: list[str] = []
    quiet = EngineSettings(maintenance_interval_s=1e9)
    async with Engine.open(tmp_path / "store", clock=ManualClock(MIDNIGHT), settings=quiet) as engine:
        for number in range(40):
            at = MIDNIGHT + (number - 20) * 3_600_000
            await engine.append(rows(SET, [(s, at, [1.0, number]) for s in ("a", "b", "c")]), metric_sets=(SET,))
        state = State(target="t", options="o", start_ms=MIDNIGHT - 7_200_000, end_ms=MIDNIGHT + 3_600_000)
        async with shipping_to(influx, bucket) as backend:
            await prepared(tmp_path, backend, state, servers=("a", "c"), tell=told.append).run()
            with pytest.raises(BackfillError, match="no server 'nobody' in the store; 3 are there, such as"):
                await prepared(tmp_path, backend, servers=("nobody",)).run()
    found = {(server, (time - MIDNIGHT) // 3_600_000) for server, _, _, _, time, _ in await lines(influx, bucket)}
    assert found == {(server, hour) for server in "ac" for hour in (-2, -1, 0)}
    assert state.points == 12 and "does not ship to influxdb yet" in told[0]


async def test_what_is_written_anew_meanwhile_stays(
    influx: InfluxServer, bucket: str, tmp_path: Path, unsynced: None
) -> None:
    """The follower ships a new value while the back-fill has the old one in its hands and ships it afterwards."""
    async with Engine.open(tmp_path / "store", clock=ManualClock(MIDNIGHT), settings=SETTINGS) as engine:
        for number in range(20):
            of_day = rows(SET, [("a", MIDNIGHT + (number % 2) * DAY_MS + number, [1.0, 1.0])])
            await engine.append(of_day, metric_sets=(SET,), servers=[said("a", "staging")])

        class Late(Watched):
            async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
                if self.batches in (0, 1):  # of the first day, and of the second, which is the last
                    time = MIDNIGHT + self.batches * DAY_MS + self.batches
                    await engine.append(rows(SET, [("a", time, [2.0, 2.0])]))
                    await eventually(lambda: shipped(engine), within_s=60)
                return await super().ship(batch)

        async with (
            Follower(engine, InfluxBackend(target(influx, bucket)), CLOCK, random.Random(1)),
            shipping_to(influx, bucket) as real,
        ):
            await eventually(lambda: shipped_to(engine))
            await eventually(lambda: shipped(engine), within_s=60)
            filling = prepared(tmp_path, Late(real))
            await filling.run()
        assert filling.state.again == 4
    new = {(time - MIDNIGHT) for _, _, _, _, time, value in await lines(influx, bucket) if value == 2.0}
    assert new == {0, DAY_MS + 1}


async def test_batches_that_left_the_journal_unseen_are_counted_also_when_nothing_is_left_of_it(tmp_path: Path) -> None:
    clock = ManualClock(MIDNIGHT)
    settings = EngineSettings(maintenance_interval_s=1e9, journal_keep_s=0.0, journal_bytes_limit=1)
    async with Engine.open(tmp_path / "store", clock=clock, settings=settings) as engine:
        await engine.append(rows(SET, [("a", MIDNIGHT, [1.0, 1.0])]), metric_sets=(SET,))

        class Late(PlayedBackend):
            async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
                if not self.batches:
                    await engine.append(rows(SET, [("a", MIDNIGHT, [2.0, 2.0])]))
                    clock.advance(1)
                    await engine.maintain(everything=True)
                    assert engine.first_sequence > engine.last_sequence
                return await super().ship(batch)

        filling = prepared(tmp_path, Late())
        await filling.run()
    assert filling.state.unseen == 1


async def test_what_a_server_was_before_its_history_begins_is_counted_as_likely(
    influx: InfluxServer, bucket: str, tmp_path: Path, unsynced: None
) -> None:
    clock = ManualClock(MIDNIGHT)
    async with Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS) as engine:
        await fill(engine, clock)
        everything = sum([len(part.times_ms) async for part in engine.stored_rows("a", 0, 1 << 50)])
        assert everything
    with closing(apsw.Connection(str(tmp_path / "store" / "journal.db"))) as database:  # as older versions left it
        database.execute(
            "DELETE FROM descriptors WHERE (server, sequence) NOT IN"
            " (SELECT server, max(sequence) FROM descriptors GROUP BY server); DROP TABLE descriptors_cut"
        )
    async with shipping_to(influx, bucket) as backend:
        filling = prepared(tmp_path, backend, servers=("a", "c"))
        async with Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS):
            await filling.run()
    found = await lines(influx, bucket)
    assert {line[:3] for line in found} == {("a", "staging", "web"), ("c", "", "")}
    assert 0 < filling.state.likely < filling.state.points


@pytest.mark.full
async def test_an_outage_is_waited_for_and_one_that_lasts_ends_it_where_it_is(
    influx: InfluxServer, bucket: str, tmp_path: Path, unsynced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = ManualClock(MIDNIGHT), list[str]()
    monkeypatch.setattr(module, "MAX_SHIP_ROWS", 10)
    async with Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS) as engine:
        await fill(engine, clock)

    class Killed(Watched):
        async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
            if self.batches == 11:
                influx.kill()
            if self.batches == 13 and module.OUTAGE_BOUND_S:
                await influx.start()
            return await super().ship(batch)

    async with shipping_to(influx, bucket) as real:
        filling = prepared(tmp_path, Killed(real), tell=told.append)
        await filling.run()
        expected = await lines(influx, bucket)
        assert any("does not answer" in text for text in told) and filling.state.points >= len(expected) > 100

        monkeypatch.setattr(module, "OUTAGE_BOUND_S", 0.0)
        await influx.make_bucket(f"{bucket}-again")
    async with shipping_to(influx, f"{bucket}-again") as real:
        stopped = prepared(tmp_path, Killed(real))
        with pytest.raises(Unavailable, match="does not answer"):
            await stopped.run()
        await influx.start()
        state = State.load(tmp_path / "backfill")
        assert state is not None and not state.is_done and 0 < state.points < filling.state.points
        assert state.day is not None and state.server
        at = (state.day, state.server)
        resumed = Watched(real)
        await prepared(tmp_path, resumed, state).run()
        assert state.is_done and await lines(influx, f"{bucket}-again") == expected
        assert min(resumed.seen) > at, "what was acknowledged is not copied again"


class Napping(SystemClock):
    """Its time is what was slept until."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def monotonic(self) -> float:
        return self.slept_s

    async def sleep_until(self, monotonic_s: float) -> None:
        self.slept_s = max(self.slept_s, monotonic_s)
        await asyncio.sleep(0)


async def test_the_rate_is_kept(influx: InfluxServer, bucket: str, tmp_path: Path, unsynced: None) -> None:
    clock, napping = ManualClock(MIDNIGHT), Napping()
    async with Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS) as engine:
        await fill(engine, clock)
    seen: list[tuple[float, int]] = []

    class Timed(Watched):
        async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
            seen.append((napping.monotonic(), sum(part.rows.points for part in batch)))
            return await super().ship(batch)

    async with shipping_to(influx, bucket) as real:
        await prepared(tmp_path, Timed(real), rate=100.0, clock=napping).run()
    before = 0
    for at_s, points in seen:
        assert at_s == pytest.approx(before / 100.0)
        before += points
    assert len(seen) > 2 and before > 1_000


async def test_what_does_not_arrive_is_found_by_counting(
    influx: InfluxServer, bucket: str, tmp_path: Path, unsynced: None
) -> None:
    clock = ManualClock(MIDNIGHT)
    async with Engine.open(tmp_path / "store", clock=clock, settings=SETTINGS) as engine:
        await fill(engine, clock)

    class Losing(Watched):
        async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
            kept = [part for part in batch if part.rows.server_ids[0] != "b"]
            receipt = await super().ship(kept)
            return Receipt(shipped=receipt.shipped, refused={"LOST": 1})

    reader = InfluxHistory(target(influx, bucket), EngineSettings())
    async with shipping_to(influx, bucket) as real:
        filling = prepared(tmp_path, Losing(real), reader=reader)
        await filling.run()
    await reader.close()
    assert {server for _, server, _, _ in filling.state.short} == {"b"}
    assert all(here > there == 0 for _, _, here, there in filling.state.short) and filling.state.refused["LOST"]


@pytest.mark.parametrize("gone", [False, True])
async def test_days_that_cannot_be_read_or_are_gone_are_named_and_the_rest_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: bool
) -> None:
    settings = EngineSettings(sparse_points_a_day=0, maintenance_interval_s=1e9, journal_keep_s=0.0)
    async with Engine.open(tmp_path / "store", clock=ManualClock(MIDNIGHT), settings=settings) as engine:
        for day in (-2, -1, 0):
            at = MIDNIGHT + day * DAY_MS
            await engine.append(rows(SET, [("a", at + n, [1.0, 2.0]) for n in range(10)]), metric_sets=(SET,))
        await engine.maintain(everything=True)
    path = min((tmp_path / "store" / "blocks").glob("*.db"))
    if gone:
        path.unlink()
    else:
        path.write_bytes(b"this is no database" * 1_000)
    told, backend = list[str](), PlayedBackend()
    filling = prepared(tmp_path, backend, tell=told.append)
    await filling.run()
    assert len([text for text in told if text.startswith(f"blocks/{path.name} cannot be read, or is gone")]) == 1
    assert (filling.state.points, filling.state.left_out) == (40, [f"blocks/{path.name}"])
    assert commands._report(filling.state, 1.0, verified=False) == 1
    assert f"left out, because they cannot be read or are gone: blocks/{path.name}." in capsys.readouterr().err
