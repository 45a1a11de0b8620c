"""The mirror of who may come in, from a metadata service of which only the feed is real."""

import asyncio
from collections.abc import AsyncGenerator
from typing import cast

from fleet.access import VIEWER
from gateway.access.table import AccessTable
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.handlers import bind
from runtime.interception import Interception
from runtime.limits import MAX_MESSAGE_BYTES
from runtime.server import GrpcServer
from services.metadata.access.feed import AccessFeed
from services.metadata.access.model import Credential, Known, Scope
from services.metadata.access.secrets import digest
from services.metadata.access.servicer import FEED, AccessFeedServicer
from services.metadata.access.store import AccessStore
from tests.harness import eventually

ENTRIES = 10_000


class Feed:
    """Tells what there is, once for each time it is released."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Known] = asyncio.Queue()

    async def watch(self) -> AsyncGenerator[Known, None]:
        while True:
            yield await self.told.get()


async def test_people_whose_scopes_are_larger_than_a_message_are_known_and_forgotten() -> None:
    scope = Scope(server_ids=tuple(f"a-server-with-a-long-name-{n:06}" for n in range(ENTRIES)))
    people = tuple(
        Credential(hash=digest(f"om_{n}"), id=str(n), name=f"user {n}", role=VIEWER, scope=scope, expire_time=None)
        for n in range(2 * MAX_MESSAGE_BYTES // (ENTRIES * 32))
    )
    feed = Feed()
    servicer = AccessFeedServicer(cast("AccessStore", None), cast("AccessFeed", feed))
    server = GrpcServer([bind(FEED, servicer)], Interception())
    channel = Channel(await server.start("127.0.0.1:0"))
    table = AccessTable(channel, SystemClock())
    following = asyncio.create_task(table.follow())
    try:
        feed.told.put_nowait(Known(revision=1, credentials=people))
        await eventually(lambda: table.known or following.done())
        for number in range(len(people)):
            found = table.caller(f"om_{number}")
            assert found.name == f"user {number}" and found.scope is not None
            assert len(found.scope.server_ids) == ENTRIES
        feed.told.put_nowait(Known(revision=2, credentials=people[:1]))
        await eventually(lambda: len(table._callers or ()) == 1 or following.done())
        feed.told.put_nowait(Known(revision=3, credentials=()))
        await eventually(lambda: not table._callers or following.done())
        assert not following.done()
    finally:
        following.cancel()
        await asyncio.wait({following})
        await channel.close()
        await server.stop(0)
