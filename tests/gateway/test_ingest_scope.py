"""Whose rows an agent may write whose scope is of environments, also where the live state does not have the server."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from fleet.access import AGENT, Caller, Scope
from fleet.model import Metric, MetricSet
from fleet.writer import WriteResult
from gateway.servicers.ingest import IngestServicer
from openmanager.gateway.v1 import ingest_pb2
from runtime import caller
from runtime.errors import OpenManagerError, PermissionDenied
from tests.gateway.played_fleet import World, server_state, world
from tests.harness import eventually

SET = MetricSet((Metric(name="cpu_usage"),))
WEBS = Scope.of(("production",), (), ())


class Written:
    """A writer of which a test sees what it was given."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def hold_message(self, _message: object) -> None:
        """It has it."""

    def metric_count(self, _set_id: str) -> int:
        return len(SET)

    async def write_message(self, batch: Any, _servers: object, _unknown: object) -> WriteResult:
        self.rows += [row.server_id for row in batch.rows]
        return WriteResult(accepted_points=len(batch.rows), rejected_points=0, errors=(), sequence=1)


class Agent:
    """A stream of an agent's, and the record behind it."""

    def __init__(self, state: Any, record: Mapping[str, tuple[str, str]]) -> None:
        self.written = Written()
        self.asked: list[list[str]] = []
        self._record = record
        self._requests: asyncio.Queue[ingest_pb2.WriteMetricsRequest] = asyncio.Queue()
        servicer = IngestServicer(self.written, state, self._recorded)  # type: ignore[arg-type]
        self._answers = servicer.WriteMetrics(self._sent(), None)

    async def _recorded(self, server_ids: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        self.asked.append(sorted(server_ids))
        return {one: self._record[one] for one in server_ids if one in self._record}

    async def _sent(self) -> AsyncIterator[ingest_pb2.WriteMetricsRequest]:
        while True:
            yield await self._requests.get()

    async def write(self, *rows: str, **described: str) -> None:
        """Rows of servers; `described`: id -> environment."""
        request = ingest_pb2.WriteMetricsRequest(metric_set_id=SET.id, values=[1.0] * len(rows))
        for server_id in rows:
            request.rows.add(server_id=server_id)
        for server_id, environment in described.items():
            request.servers.add(server_id=server_id, environment=environment)
        self._requests.put_nowait(request)
        await anext(aiter(self._answers))


@contextmanager
def seeing(scope: Scope) -> Iterator[None]:
    token = caller.current.set(Caller.of("rack 7", AGENT, "token", scope=scope))
    try:
        yield
    finally:
        caller.current.reset(token)


async def shown(made: World, *environments: str) -> None:
    """A live state with a server of each environment, which is called by it."""
    made.cache.send(*(server_state(name, 1.0, environment=name) for name in environments), snapshot=True)
    await eventually(made.caught_up)


async def test_a_server_is_described_once_a_stream_though_the_live_state_does_not_have_it_yet() -> None:
    """Nor while the cache is away."""
    async with world() as made:
        await shown(made, "production", "staging")
        agent = Agent(made.state, {})
        with seeing(WEBS):
            await agent.write("new", "production", new="production")
            await agent.write("new")
            assert agent.written.rows == ["new", "production", "new"]
            made.cache.send(server_state("new", 1.0, environment="staging"))  # somebody has moved it
            await eventually(made.caught_up)
            with pytest.raises(PermissionDenied) as refused:
                await agent.write("new")
            assert refused.value.reason == "OUT_OF_SCOPE"


async def test_whose_a_server_is_that_the_live_state_lacks_the_record_says() -> None:
    """The cache may have begun anew, and then it has nobody for a moment."""
    record = {"web": ("production", ""), "db": ("staging", "")}
    async with world() as made:
        await shown(made, "staging")
        with seeing(WEBS):
            agent = Agent(made.state, record)
            await agent.write("web", "web")
            assert agent.written.rows == ["web", "web"] and agent.asked == [["web"]]
            answers = []
            for rows in (
                ("db",),
                ("web", "db"),
                ("nobody",),
                ("staging",),
                ("staging", "nobody"),
                ("nobody", "staging"),
            ):
                agent = Agent(made.state, record)
                with pytest.raises(PermissionDenied) as refused:
                    await agent.write(*rows)
                assert refused.value.reason == "OUT_OF_SCOPE" and not agent.written.rows
                answers.append(refused.value.field)
            first, second = "rows[0].server_id", "rows[1].server_id"
            assert answers == [first, second, first, first, first, first]


@pytest.mark.parametrize("fault", ["", "a\0b", "x" * 300])
async def test_the_record_is_not_asked_for_what_is_no_id(fault: str) -> None:
    async with world() as made:
        await shown(made, "production")
        agent = Agent(made.state, {})
        with seeing(WEBS), pytest.raises(OpenManagerError) as refused:
            await agent.write(fault)
        assert refused.value.reason == "OUT_OF_SCOPE" and not agent.asked
