"""kill -9 of the service and of PostgreSQL amid recordings and ratings: what was acknowledged is there, once."""

import asyncio
import signal
from pathlib import Path
from uuid import uuid4

import asyncpg
import grpc
import pytest

from openmanager.gateway.v1 import ai_pb2
from openmanager.metadata.v1 import interaction_pb2
from runtime.channel import calling
from runtime.errors import DeadlineExceeded, Unavailable
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.service import Service, caught_up, running

INTERACTIONS = 1_000
CALLERS = 8
GONE = (Unavailable, DeadlineExceeded, asyncio.CancelledError, grpc.aio.UsageError)
"""What a call of a service says whose process, or whose channel, has ended."""


class Load:
    """So many interactions under ids of their own, each sent until it is acknowledged, then rated once."""

    def __init__(self) -> None:
        self.recorded: list[str] = []
        self.rated: list[str] = []
        """Comments of the ratings that were acknowledged."""
        self.tried = 0
        self._left = iter(range(INTERACTIONS))

    async def run(self, services: "list[Service]") -> None:
        """`services` ends with the one that lives."""
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(self._caller(services))

    async def _caller(self, services: "list[Service]") -> None:
        for number in self._left:
            said = interaction_pb2.Interaction(id=str(uuid4()), session_id=f"s{number % 7}", query=f"q{number}")
            while not await self._record(services[-1], said):
                await asyncio.sleep(0.02)
            self.recorded.append(said.id)
            await self._rate(services[-1], said.id)

    async def _record(self, service: Service, said: interaction_pb2.Interaction) -> bool:
        try:
            async with calling("metadata"):
                await service.interactions.RecordInteraction(ai_pb2.RecordInteractionRequest(interaction=said))
        except GONE:
            return False
        return True

    async def _rate(self, service: Service, interaction_id: str) -> None:
        self.tried += 1
        comment = str(self.tried)
        try:
            async with calling("metadata"):
                request = ai_pb2.RateInteractionRequest(id=interaction_id, rating=self.tried % 5 + 1, comment=comment)
                await service.interactions.RateInteraction(request)
        except GONE:
            return
        self.rated.append(comment)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.fault("metadata and PostgreSQL killed amid 1,000 interactions with ratings")
async def test_each_acknowledged_interaction_and_rating_is_there_once(
    own_server: PostgresServer, data_dir: Path
) -> None:
    target = await own_server.fresh_database()
    name = target.address.rpartition("/")[2]
    load, services = Load(), []
    running_load: asyncio.Task[None] | None = None
    for life in range(3):
        async with running(data_dir, DATABASE_URL=own_server.url(name)) as service:
            services.append(service)
            running_load = running_load or asyncio.create_task(load.run(services))
            goal = (life + 1) * INTERACTIONS // 4
            await eventually(lambda goal=goal: len(load.recorded) >= goal, 60.0)
            if life == 1:
                own_server.start()
            if life < 2:
                own_server.stop(signal.SIGKILL)
                so_far = len(load.recorded)
                await eventually(lambda so_far=so_far: len(load.recorded) >= so_far + 50, 60.0)
                service.stop(signal.SIGKILL)
                continue
            own_server.start()
            await running_load
            await caught_up(service)
    connection = await asyncpg.connect(**(own_server.admin | {"database": name}))
    interactions = [str(row["id"]) for row in await connection.fetch("SELECT id FROM ai_interactions")]
    comments = [row["comment"] for row in await connection.fetch("SELECT comment FROM ai_feedback")]
    shown = await connection.fetch(
        "SELECT user_rating, said.rating FROM ai_interactions AS one JOIN ai_feedback AS said ON said.interaction_id ="
        " one.id AND said.created_at = one.rated_at"
    )
    await connection.close()
    print(f"{len(load.rated)} of {load.tried} ratings acknowledged, {len(comments)} there")
    assert sorted(interactions) == sorted(load.recorded)
    assert len(set(comments)) == len(comments)
    assert set(load.rated) <= set(comments)
    assert len(load.rated) > INTERACTIONS * 0.9
    assert len(shown) == len(comments), "each is the latest of its interaction"
    assert all(row["user_rating"] == row["rating"] for row in shown)
