"""A replica that is asked over the wire."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from openmanager.timeseries.v1 import timeseries_pb2
from runtime.channel import Channel
from runtime.clock import ManualClock
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.timeseries.engine import Engine, Query
from services.timeseries.remote.reader import Reader
from services.timeseries.remote.replica import Peer, ThisReplica
from services.timeseries.servicer import TimeSeriesServicer
from tests.timeseries.engine.model import rows
from tests.timeseries.remote.test_reader import NOON, SET, SETTINGS, STORE, OracleStore


async def test_while_the_store_is_away_what_another_replica_lacks_is_said(tmp_path: Path) -> None:
    """Its disk is a new one, or a backup's: what it took before, or since that, only the store has."""
    clock, store = ManualClock(NOON - 60_000), OracleStore()
    async with AsyncExitStack() as stack:
        here, there = [
            await stack.enter_async_context(Engine.open(tmp_path / name, clock=clock, settings=SETTINGS))
            for name in "ab"
        ]
        clock.advance(60)
        for engine, server in ((here, "a"), (there, "b")):
            await engine.cursors.register(STORE)
            await engine.append(rows(SET, [(server, NOON, [1.0, 2.0])]), metric_sets=(SET,))
        theirs = Reader(there, store, peers=[ThisReplica(here)], max_points=1_000)
        service = timeseries_pb2.DESCRIPTOR.services_by_name["TimeSeriesService"]
        server = GrpcServer([bind(service, TimeSeriesServicer(there, clock, reader=theirs))], Interception())
        address = await server.start("127.0.0.1:0")
        stack.push_async_callback(server.stop, 0)
        peer = Peer(await stack.enter_async_context(Channel(address)), clock, 1_000)
        reader = Reader(here, store, peers=[peer], max_points=1_000)

        store.away = True
        query = Query(metrics=("cpu_usage",), start_ms=NOON, end_ms=NOON + 1_000)
        answer = await reader.read(query)
        assert [result.server_id for result in answer.results] == ["a", "b"]
        assert answer.incomplete == []
        await asyncio.wrap_future(there._writer.call(lambda: there._store.journal.note_lack(NOON, NOON + 500)))
        answer = await reader.read(query)
        assert [result.server_id for result in answer.results] == ["a", "b"]
        (said,) = answer.incomplete[1:]
        assert said.startswith(f"timeseries replica {address}: from 2023-12-09T12:00:00+00:00 to ")
        assert said.endswith("only what replicas hold is shown")
