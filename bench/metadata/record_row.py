"""Interactions recorded in a second, until PostgreSQL has them all, beside inserts without anything around them.

Ours are calls of RecordInteraction: checked, journaled with a sync, acknowledged, shipped. The yardstick inserts the
same rows with asyncpg, a statement and a commit each, over as many connections as the service has, into a table like
ours without its own columns' indexes being left out: the very same table.
"""

import asyncio
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
from services.metadata.store_connection import MAX_CONNECTIONS

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
    ours, acknowledged, theirs = [], [], []
    connections = [await bench.connect() for _ in range(MAX_CONNECTIONS)]
    async with Channel(bench.service.address, secret=bench.secret) as channel:
        stub = ai_pb2_grpc.AiInteractionServiceStub(channel.grpc)
        await _turn(bench, 200, _ours(stub), connections[0])  # warm
        for number in range(bench.size.rounds):
            rate, rate_acknowledged = await _turn(bench, bench.size.interactions, _ours(stub), connections[0])
            ours.append(rate)
            acknowledged.append(rate_acknowledged)
            rate, _ = await _turn(bench, bench.size.interactions, _theirs(connections), connections[0])
            theirs.append(rate)
            bench.say(f"{ROW} {number + 1}: ours {ours[-1]:,.0f}/s, theirs {theirs[-1]:,.0f}/s")
    for connection in connections:
        await connection.close()
    return {"ours": ours, "acknowledged": acknowledged, "theirs": theirs}


Record = Callable[[int, str], Coroutine[Any, Any, None]]


def _ours(stub: Any) -> Record:
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
    answered = sorted(found["acknowledged"])[len(found["acknowledged"]) // 2]
    return [
        judge(
            ROW,
            "interactions recorded, until PostgreSQL has them",
            "asyncpg inserts into the same table",
            "1/s",
            found["ours"],
            found["theirs"],
            MUST,
            remark=f"acknowledged {answered:,.0f}/s",
        )
    ]
