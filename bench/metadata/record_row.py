"""Interactions recorded in a second, until PostgreSQL has them all, beside inserts without anything around them.

Ours is the store of the service with ids that callers chose: checked, looked up, journaled with a sync, acknowledged,
shipped. The yardstick inserts the same rows into the same table with asyncpg, a statement and a commit each, over as
many connections as the store has. Neither has a transport around it; what remains of ours through gRPC, whose calls
alone take most of the time, is told beside it.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import uuid4

from bench.api.judged import Judged, judge
from bench.metadata.size import Bench
from bench.peers import BenchError
from openmanager.gateway.v1 import ai_pb2, ai_pb2_grpc
from openmanager.metadata.v1 import interaction_pb2
from runtime.channel import Channel
from runtime.clock import SystemClock
from services.metadata.facts import Facts
from services.metadata.server_copy import ServerCopy
from services.metadata.store import NewInteraction
from services.metadata.store_connection import MAX_CONNECTIONS, Database
from services.metadata.store_local import LocalFirstStore
from services.metadata.store_postgres import PostgresStore
from services.metadata.target import DatabaseTarget

ROW: Final = "record"
MUST: Final = 0.5
QUERY: Final = "Why is the latency of web-{n} above its usual range since this morning? " * 3
RESPONSE: Final = "The disk of web-{n} is full: logs of a crashing job grew by 40 GB in two hours. " * 8
SHIPPED_WITHIN_S: Final = 120.0
_INSERT: Final = """INSERT INTO ai_interactions (id, session_id, query, response, confidence)
    VALUES ($1, $2, $3, $4, $5) ON CONFLICT (id) DO NOTHING"""


def measure(bench: Bench) -> dict[str, Any]:
    """Turns of ours and theirs."""
    return asyncio.run(_measure(bench))


async def _measure(bench: Bench) -> dict[str, Any]:
    found: dict[str, list[float]] = {"ours": [], "acknowledged": [], "calls": [], "theirs": []}
    connections = [await bench.connect() for _ in range(MAX_CONNECTIONS)]
    async with _store(bench) as store, Channel(bench.service.address, secret=bench.secret) as channel:
        stub = ai_pb2_grpc.AiInteractionServiceStub(channel.grpc)
        contenders = {"ours": _ours(store), "calls": _calls(stub), "theirs": _theirs(connections)}
        for record in contenders.values():
            await _turn(bench, 200, record, connections[0])  # warm
        for number in range(bench.size.rounds):
            for name, record in contenders.items():
                rate, acknowledged = await _turn(bench, bench.size.interactions, record, connections[0])
                found[name].append(rate)
                if name == "ours":
                    found["acknowledged"].append(acknowledged)
            told = ", ".join(f"{name} {rates[-1]:,.0f}/s" for name, rates in found.items())
            bench.say(f"{ROW} {number + 1}: {told}")
    for connection in connections:
        await connection.close()
    return found


@asynccontextmanager
async def _store(bench: Bench) -> AsyncIterator[LocalFirstStore]:
    """The store of the service in this process, on the service's PostgreSQL."""
    folder, clock, options = bench.data.parent / "store", SystemClock(), bench.connection_options()
    folder.mkdir(exist_ok=True)
    hosts = ((options.pop("host"), options.pop("port")),)
    target = DatabaseTarget(role="embedded", hosts=hosts, options=options, address="bench", disk=None)
    async with Database(target, clock=clock) as database:
        postgres = PostgresStore(database)
        facts = Facts(folder, database, clock=clock, limit_bytes=1 << 30)
        async with facts, ServerCopy(folder, postgres, database, clock=clock) as copy:
            yield LocalFirstStore(database, postgres, facts, copy, clock=clock)


Record = Callable[[int, str], Coroutine[Any, Any, None]]


def _ours(store: LocalFirstStore) -> Record:
    async def record(number: int, session: str) -> None:
        said = NewInteraction(
            id=str(uuid4()),
            session_id=session,
            query=QUERY.format(n=number),
            response=RESPONSE.format(n=number),
            confidence=0.5,
        )
        await store.record_interaction(said)

    return record


def _calls(stub: Any) -> Record:
    async def record(number: int, session: str) -> None:
        said = interaction_pb2.Interaction(
            id=str(uuid4()),
            session_id=session,
            query=QUERY.format(n=number),
            response=RESPONSE.format(n=number),
            confidence=0.5,
        )
        await stub.RecordInteraction(ai_pb2.RecordInteractionRequest(interaction=said))

    return record


def _theirs(connections: list[Any]) -> Record:
    free: asyncio.Queue[Any] = asyncio.Queue()
    for connection in connections:
        free.put_nowait(connection)

    @asynccontextmanager
    async def lent() -> AsyncIterator[Any]:
        connection = await free.get()
        try:
            yield connection
        finally:
            free.put_nowait(connection)

    async def record(number: int, session: str) -> None:
        async with lent() as connection:
            values = (uuid4(), session, QUERY.format(n=number), RESPONSE.format(n=number), 0.5)
            await connection.execute(_INSERT, *values)

    return record


async def _turn(bench: Bench, interactions: int, record: Record, connection: Any) -> tuple[float, float]:
    """(rate until all are in the table, rate of acknowledgements), each in 1/s; BenchError when some are not there."""
    session = str(uuid4())
    left = iter(range(interactions))
    started = time.perf_counter()

    async def caller() -> None:
        for number in left:
            await record(number, session)

    async with asyncio.TaskGroup() as group:
        for _ in range(bench.size.at_once):
            group.create_task(caller())
    acknowledged = time.perf_counter() - started
    while True:
        there = await connection.fetchval("SELECT count(*) FROM ai_interactions WHERE session_id = $1", session)
        took = time.perf_counter() - started
        if there == interactions:
            return interactions / took, interactions / acknowledged
        if there > interactions or took > SHIPPED_WITHIN_S:
            raise BenchError(f"of {interactions} interactions {there} are there after {took:.0f} s")
        await asyncio.sleep(0.01)


def judged(found: dict[str, Any]) -> list[Judged]:
    """One line."""
    acknowledged, calls = (statistics.median(found[name]) for name in ("acknowledged", "calls"))
    return [
        judge(
            ROW,
            "interactions recorded, until PostgreSQL has them",
            "asyncpg inserts into the same table",
            "1/s",
            found["ours"],
            found["theirs"],
            MUST,
            remark=f"acknowledged {acknowledged:,.0f}/s; through gRPC {calls:,.0f}/s",
        )
    ]
