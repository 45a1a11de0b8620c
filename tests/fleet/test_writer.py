"""The hybrid write path: timeseries alone decides, the others are told when they can be, and memory stays bounded."""

import asyncio
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from opentelemetry.context import Context

from fleet.codec import metric_set_to_pb, rows_to_pb
from fleet.model import Metric, MetricSet, Rows, ServerDescriptor, WriteBatch
from fleet.pending import PendingRows
from fleet.validation import MAX_ROW_ERRORS
from fleet.writer import FleetWriter
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import metric_pb2
from openmanager.metadata.v1 import metadata_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, InvalidArgument, OpenManagerError, ResourceExhausted, Unavailable
from tests.fleet.serving import writer_to
from tests.harness import eventually

SET = MetricSet((Metric(name="a"), Metric(name="b")))
SERVER = ServerDescriptor(server_id="s", hostname="host")


def batch(tick: int, *servers: ServerDescriptor, metric_set: MetricSet = SET) -> WriteBatch:
    rows = Rows(
        metric_set_id=metric_set.id,
        server_ids=("s",),
        times_ms=np.array([tick * 1000]),
        values=np.full((1, len(metric_set)), float(tick)),
    )
    return WriteBatch(metric_set=metric_set, rows=rows, servers=servers)


class Stores:
    """Timeseries, cache and metadata as the writer sees them, each of which can be made to fail."""

    def __init__(self) -> None:
        self.appended: list[timeseries_pb2.AppendRequest] = []
        self.updated: list[cache_pb2.UpdateServersRequest] = []
        self.registered: list[metadata_pb2.RegisterServersRequest] = []
        self.fails: dict[str, OpenManagerError | None] = {}
        self.known_sets: set[str] = set()
        self.cached_sets: set[str] = set()
        self.too_late_until_s = 0

    def _may_fail(self, store: str) -> None:
        error = self.fails.get(store)
        if error is not None:
            raise error

    async def Append(self, request: timeseries_pb2.AppendRequest, _context: Any) -> timeseries_pb2.AppendResponse:
        self._may_fail("timeseries")
        self.known_sets |= {message.id for message in request.metric_sets}
        if request.batch.rows and request.batch.metric_set_id not in self.known_sets:
            raise FailedPrecondition("unknown", reason="METRIC_SET_UNKNOWN")
        self.appended.append(request)
        response = timeseries_pb2.AppendResponse(sequence=len(self.appended), accepted_points=len(request.batch.values))
        late = [place for place, row in enumerate(request.batch.rows) if row.time.seconds < self.too_late_until_s]
        for place in late[:MAX_ROW_ERRORS]:
            response.errors.add(row=place, field=f"rows[{place}].time", reason="TOO_LATE")
        return response

    async def UpdateServers(
        self, request: cache_pb2.UpdateServersRequest, _context: Any
    ) -> cache_pb2.UpdateServersResponse:
        self._may_fail("cache")
        self.cached_sets |= {message.id for message in request.metric_sets}
        if any(rows.metric_set_id not in self.cached_sets for rows in request.batches):
            raise FailedPrecondition("unknown", reason="METRIC_SET_UNKNOWN")
        self.updated.append(request)
        return cache_pb2.UpdateServersResponse()

    async def RegisterServers(
        self, request: metadata_pb2.RegisterServersRequest, _context: Any
    ) -> metadata_pb2.RegisterServersResponse:
        self._may_fail("metadata")
        self.registered.append(request)
        return metadata_pb2.RegisterServersResponse()

    def cached_ticks(self) -> list[float]:
        return [rows.values[0] for request in self.updated for rows in request.batches]


def writing(stores: Stores) -> AbstractAsyncContextManager[FleetWriter]:
    return writer_to(timeseries=stores, cache=stores, metadata=stores)


async def test_a_batch_reaches_all_three_and_the_set_goes_once() -> None:
    stores = Stores()
    async with writing(stores) as writer:
        first = await writer.write(batch(1, SERVER))
        assert (first.sequence, first.accepted_points) == (1, 2)
        await writer.write(batch(2, SERVER))
        await eventually(lambda: stores.cached_ticks()[-1:] == [2.0] and stores.registered)
    assert [len(request.metric_sets) for request in stores.appended] == [1, 0]
    assert [len(request.servers) for request in stores.appended] == [1, 0], "told once, and on change"
    assert len(stores.registered) == 1


async def test_a_changed_server_is_told_again() -> None:
    stores = Stores()
    async with writing(stores) as writer:
        await writer.write(batch(1, SERVER))
        moved = ServerDescriptor(server_id="s", hostname="host", environment="production")
        await writer.write(batch(2, moved))
        await eventually(lambda: len(stores.registered) == 2 and stores.cached_ticks()[-1:] == [2.0])
    assert stores.appended[1].servers[0].environment == "production"


async def test_of_a_server_that_nobody_described_nothing_is_made_up() -> None:
    stores = Stores()
    async with writing(stores) as writer:
        for tick in range(3):
            writer.hold(SET)
            await writer.write_message(rows_to_pb(batch(tick).rows), unknown=["s"])
        await eventually(lambda: stores.cached_ticks()[-1:] == [2.0] and stores.registered)
        await writer.write_message(rows_to_pb(batch(3, SERVER).rows), [SERVER], ["s"])
        await eventually(lambda: len(stores.registered) == 2)
    told = [server for request in (*stores.appended, *stores.updated) for server in request.servers]
    assert {server.hostname for server in told} == {"host"}
    named, described = (list(request.servers) for request in stores.registered)
    assert named == [metric_pb2.ServerDescriptor(server_id="s")], "no hostname: the record keeps the one that it has"
    assert [server.hostname for server in described] == ["host"]


@pytest.mark.parametrize("late", [1, 2 * MAX_ROW_ERRORS])
async def test_of_rows_that_are_rejected_nothing_is_told_to_anybody(late: int) -> None:
    stores = Stores()
    stores.too_late_until_s = 1_000
    server_ids = (*(f"late-{place}" for place in range(late)), "s")
    times_ms = np.array([*range(late), SystemClock().now_ms()])
    rows = Rows(metric_set_id=SET.id, server_ids=server_ids, times_ms=times_ms, values=np.ones((late + 1, 2)))
    async with writing(stores) as writer:
        writer.hold(SET)
        only_late = rows.select(np.arange(late + 1) < late)
        await writer.write_message(rows_to_pb(only_late), unknown=only_late.server_ids)
        await writer.write_message(rows_to_pb(rows), unknown=server_ids)
        await eventually(lambda: stores.updated and stores.registered)
    told = [row.server_id for request in stores.updated for batch in request.batches for row in batch.rows]
    named = [server.server_id for request in stores.registered for server in request.servers]
    assert told == named == ["s"]


async def test_timeseries_away_is_an_error_and_nothing_is_told_to_the_others() -> None:
    stores = Stores()
    stores.fails["timeseries"] = Unavailable("away")
    async with writing(stores) as writer:
        with pytest.raises(Unavailable):
            await writer.write(batch(1, SERVER))
        assert writer.counters.failures["timeseries"] == 1
        stores.fails["timeseries"] = None
        await writer.write(batch(2, SERVER))
        await eventually(lambda: stores.cached_ticks() == [2.0])
    assert len(stores.registered) == 1


async def test_a_structural_fault_is_the_senders() -> None:
    stores = Stores()
    stores.fails["timeseries"] = InvalidArgument("values", field="values")
    async with writing(stores) as writer:
        with pytest.raises(InvalidArgument) as refused:
            await writer.write(batch(1))
        assert refused.value.field == "values"


async def test_cache_and_metadata_away_refuse_nothing_and_catch_up_with_the_latest() -> None:
    stores = Stores()
    stores.fails |= {"cache": Unavailable("away"), "metadata": Unavailable("away")}
    async with writing(stores) as writer:
        for tick in range(50):
            await writer.write(batch(tick, SERVER))
        await eventually(lambda: writer.counters.failures["cache"] and writer.counters.failures["metadata"])
        assert len(stores.appended) == 50
        stores.fails.clear()
        await eventually(lambda: stores.cached_ticks() and stores.registered, within_s=15)
    assert stores.cached_ticks() == [49.0], "latest wins: one batch for an outage of 50 ticks"
    assert [request.servers[0].server_id for request in stores.registered] == ["s"]
    assert stores.updated[0].servers[0].server_id == "s"


async def test_what_is_acknowledged_last_is_told_before_the_writer_ends() -> None:
    stores = Stores()
    async with writing(stores) as writer:
        await writer.write(batch(1, SERVER))
    assert stores.cached_ticks() == [1.0]
    assert [request.servers[0].server_id for request in stores.registered] == ["s"]


async def test_a_cache_that_says_nothing_does_not_keep_a_writer_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.writer.STOP_TIMEOUT_S", 0.1)
    stores, ended = Stores(), asyncio.Event()

    async def hang(_request: cache_pb2.UpdateServersRequest, _context: Any) -> cache_pb2.UpdateServersResponse:
        await ended.wait()
        return cache_pb2.UpdateServersResponse()

    monkeypatch.setattr(stores, "UpdateServers", hang)
    async with asyncio.timeout(10), writing(stores) as writer:
        await writer.write(batch(1, SERVER))
    assert stores.registered


async def test_failures_are_told_as_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, str]] = []
    monkeypatch.setattr("fleet.writer._failures", SimpleNamespace(add=lambda _one, peer: told.append(peer)))
    stores = Stores()
    stores.fails.update(cache=Unavailable("away"), metadata=Unavailable("away"))
    async with writing(stores) as writer:
        await writer.write(batch(1, SERVER))
        await eventually(lambda: {"peer": "cache"} in told and {"peer": "metadata"} in told)
        assert {"peer": "timeseries"} not in told
        stores.fails["timeseries"] = Unavailable("away")
        with pytest.raises(Unavailable):
            await writer.write(batch(2, SERVER))
        assert {"peer": "timeseries"} in told


async def test_what_is_filled_in_while_the_cache_is_away_does_not_hide_what_is_now() -> None:
    stores = Stores()
    stores.fails["cache"] = Unavailable("away")
    async with writing(stores) as writer:
        await writer.write(batch(5, SERVER))
        await eventually(lambda: writer.counters.failures["cache"])
        for tick in (6, 1, 2):
            await writer.write(batch(tick, SERVER))
        stores.fails.clear()
        await eventually(lambda: stores.cached_ticks()[-1:] == [6.0], within_s=15)
    assert set(stores.cached_ticks()) <= {5.0, 6.0}


async def test_stores_that_lost_their_sets_get_them_again() -> None:
    stores = Stores()
    async with writing(stores) as writer:
        await writer.write(batch(1, SERVER))
        await eventually(lambda: stores.cached_ticks() == [1.0])
        stores.known_sets.clear()
        stores.cached_sets.clear()
        await writer.write(batch(2, SERVER))
        await eventually(lambda: stores.cached_ticks() == [1.0, 2.0], within_s=15)
    assert stores.updated[-1].servers_again[0].server_id == "s", "a cache that was restarted knows no servers either"


async def test_sets_that_are_too_much_for_one_message_do_not_keep_the_cache_from_being_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each server has a set of its own, as with a metric for each of its devices, and the cache was restarted."""
    monkeypatch.setattr("runtime.handlers.MAX_MESSAGE_BYTES", 8_000)
    monkeypatch.setattr("fleet.writer.MAX_REQUEST_BYTES", 4_000)
    stores = Stores()
    stores.fails["cache"] = Unavailable("away")
    sets = [MetricSet(tuple(Metric(name=f"m{index}_{column}") for column in range(200))) for index in range(10)]
    async with writing(stores) as writer:
        for tick, metric_set in enumerate(sets):
            server = ServerDescriptor(server_id="s", hostname="host", location="l" * tick)
            await writer.write(batch(tick, server, metric_set=metric_set))
        await eventually(lambda: writer.counters.failures["cache"])
        stores.fails.clear()
        await eventually(lambda: len(stores.cached_ticks()) == 10, within_s=15)
    assert stores.cached_ticks() == [float(tick) for tick in range(10)]
    assert len(stores.updated) < 10 + 10


@pytest.mark.parametrize(
    "of_cache",
    [InvalidArgument("no", field="servers"), ResourceExhausted("full", metadata={"limit": "MAX_SERVERS"})],
)
async def test_what_cache_or_metadata_refuse_does_not_block_what_comes_after(of_cache: OpenManagerError) -> None:
    stores = Stores()
    stores.fails |= {"cache": of_cache, "metadata": InvalidArgument("no", field="servers")}
    async with writing(stores) as writer:
        await writer.write(batch(1, SERVER))
        await eventually(lambda: writer.counters.failures["cache"] and writer.counters.failures["metadata"])
        assert len(writer._rows) == 0, "nothing is sent again before what is behind it"
        stores.fails.clear()
        await writer.write(batch(2, ServerDescriptor(server_id="t", hostname="t")))
        await eventually(lambda: stores.cached_ticks() == [2.0] and stores.registered, within_s=15)
    assert [server.server_id for server in stores.registered[0].servers] == ["t"]


async def test_a_cache_without_room_for_some_servers_does_not_keep_those_behind_waiting() -> None:
    stores = Stores()
    stores.fails["cache"] = ResourceExhausted("full", metadata={"limit": "MAX_SERVERS"})
    async with writing(stores) as writer:
        await writer.write(batch(1, SERVER))
        await eventually(lambda: writer.counters.failures["cache"])
        stores.fails.clear()
        await writer.write(batch(2, metric_set=MetricSet((Metric(name="a"),))))
        await eventually(lambda: stores.cached_ticks() == [2.0], within_s=15)


async def test_rows_of_a_set_that_is_not_held_are_refused() -> None:
    stores = Stores()
    async with writing(stores) as writer:
        message = metric_pb2.MetricBatch(metric_set_id="f" * 32, values=[1.0])
        message.rows.add(server_id="s")
        with pytest.raises(FailedPrecondition) as refused:
            await writer.write_message(message)
        assert refused.value.reason == "METRIC_SET_UNKNOWN"
    assert stores.appended == []


async def test_the_held_sets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.writer.MAX_HELD_METRICS", 10)
    stores = Stores()
    sets = [MetricSet((Metric(name=f"m{index}"), Metric(name="b"))) for index in range(20)]
    async with writing(stores) as writer:
        for metric_set in sets:
            await writer.write(batch(1, metric_set=metric_set))
        held = [metric_set for metric_set in sets if writer.metric_count(metric_set.id) is not None]
    assert held == sets[-5:]


async def test_a_set_that_a_stream_names_by_its_id_alone_is_used_and_not_let_go_for_newer_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fleet.writer.MAX_HELD_METRICS", 10)
    stores = Stores()
    async with writing(stores) as writer:
        writer.hold(SET)
        for index in range(20):
            await writer.write(batch(index, metric_set=MetricSet((Metric(name=f"m{index}"), Metric(name="b")))))
            await writer.write_message(rows_to_pb(batch(index).rows))


async def test_many_writers_at_once() -> None:
    stores = Stores()
    async with writing(stores) as writer:
        results = await asyncio.gather(*(writer.write(batch(tick, SERVER)) for tick in range(100)))
        assert sorted(result.sequence for result in results) == list(range(1, 101))
        assert writer.counters.acknowledged_points == 200


def message(server_id: str, value: float, values: int = 1) -> metric_pb2.MetricBatch:
    rows = metric_pb2.MetricBatch(metric_set_id=metric_set_to_pb(SET).id, values=[value] * values)
    rows.rows.add(server_id=server_id)
    return rows


def test_pending_rows_keep_the_latest_of_each_group() -> None:
    pending = PendingRows()
    for value in range(3):
        pending.add(message("a", value), Context(), 0)
        pending.add(message("b", value), Context(), 0)
    taken, _ = pending.take()
    assert [rows.values[0] for rows in taken] == [2.0, 2.0]
    assert len(pending) == 0


def measured(value: float, *times_s: int) -> metric_pb2.MetricBatch:
    rows = metric_pb2.MetricBatch(metric_set_id=metric_set_to_pb(SET).id)
    for place, time_s in enumerate(times_s):
        rows.rows.add(server_id=f"s{place}").time.seconds = time_s
        rows.values.extend((value, value))
    return rows


def test_what_a_sender_makes_up_for_afterwards_does_not_replace_what_it_measured_later() -> None:
    pending = PendingRows()
    pending.add(measured(1, 100, 100), Context(), 200_000)
    pending.add(measured(2, 50, 110), Context(), 200_000)
    taken, context = pending.take()
    found = [[(row.time.seconds, list(rows.values)) for row in rows.rows] for rows in taken]
    assert found == [[(100, [1, 1, 2, 2]), (110, [1, 1, 2, 2])]]
    pending.add(measured(3, 10, 120), Context(), 200_000)
    pending.give_back(taken, context, 200_000)
    (rows,), _ = pending.take()
    assert [row.time.seconds for row in rows.rows] == [100, 120]
    assert list(rows.values) == [1, 1, 3, 3]


def test_what_is_given_back_does_not_replace_what_is_newer() -> None:
    pending = PendingRows()
    pending.add(message("a", 1), Context(), 0)
    pending.add(message("b", 1), Context(), 0)
    taken, context = pending.take()
    pending.add(message("a", 2), Context(), 0)
    pending.give_back(taken, context, 0)
    again, _ = pending.take()
    assert sorted((rows.rows[0].server_id, rows.values[0]) for rows in again) == [("a", 2.0), ("b", 1.0)]


@pytest.mark.parametrize(
    ("times_s", "waits"),
    [
        ([(100, 100), (50, 50)], (0, 0)),
        ([(100, 100), (50, 100)], (0, 1)),
        ([(100, 100), (50, 101)], (0, 1)),
        ([(100, 100), (100, 100)], (1, 1)),
        ([(100, 100), (110, 110), (90, 105)], (1, 1)),
        ([(9_000, 100), (100, 90)], (1, 0)),
    ],
    ids=["back-fill", "partly", "news of one", "corrected", "three", "too far ahead"],
)
def test_older_rows_do_not_replace_later_ones_that_wait(times_s: list[tuple[int, int]], waits: tuple[int, int]) -> None:
    pending = PendingRows()
    for value, times in enumerate(times_s):
        pending.add(measured(value, *times), Context(), 200_000)
    (taken,), _ = pending.take()
    assert (taken.values[0], taken.values[len(SET)]) == waits


def test_pending_rows_are_bounded_and_the_loss_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleet.pending.MAX_WAITING_VALUES", 25)
    told: list[int] = []
    monkeypatch.setattr("fleet.pending._dropped", SimpleNamespace(add=told.append))
    pending = PendingRows()
    for index in range(5):
        pending.add(message(f"s{index}", 1, values=10), Context(), 0)
    assert (len(pending), pending.dropped_batches, sum(told)) == (2, 3, 3)
