"""Findings on the streams: who is told of which, once, and from where he goes on."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from fleet.access import Scope
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime.errors import Unavailable
from tests.gateway.played_findings import NOW_US, WEBS, Told, anomaly, followed, gateway, known_to, reached
from tests.gateway.played_fleet import server_state


async def test_the_fleet_is_watched_with_its_findings() -> None:
    async with gateway() as made:
        task = await known_to(made)
        async with made.world.watch() as watch, made.world.watch(role="web") as narrow:
            told, of_webs = Told(watch._messages), Told(narrow._messages)
            await told.until("a", "b")
            await of_webs.until("a")
            made.metadata.tell(anomaly("a", "web-1", 3, over=True), anomaly("c", "gone-1", 4), anomaly("d", "web-2", 5))
            await told.until("b", "c", "d")
            await of_webs.until("d")
            assert set(told.known) == {"web-1", "web-2", "db-1"}
            version = told.version
        made.metadata.tell(anomaly("d", "web-2", 6, over=True))
        made.world.cache.send(server_state("web-1", role="web"))
        await reached(made, 6)
        assert await made.world.state.until(made.world.caught_up, 20.0)
        async with made.world.watch(after_version=version) as watch:
            again = Told(watch._messages)
            message = await again.next()
            assert not message.snapshot
            assert [one.id for one in message.servers] == ["web-1"]
            assert [one.id for one in message.anomalies] == ["d" * 32]
        task.cancel()


async def test_who_sees_some_servers_is_told_of_one_that_comes_into_sight_what_goes_on_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.changes.MAX_WATCH_MESSAGE_BYTES", 1)  # a message for each server
    async with gateway() as made:
        task = await known_to(made)
        async with made.world.watch(role="web") as watch:
            told = Told(watch._messages)
            await told.until("a")
            made.world.cache.send(server_state("db-1", role="web"), server_state("web-2", role="web"))
            await told.until("a", "b")
            made.metadata.tell(anomaly("c", "new", 3))
            await reached(made, 3)
            made.world.cache.send(server_state("new", role="web"), server_state("web-1", role="db"))
            await told.until("a", "b", "c")
            made.metadata.tell(anomaly("a", "web-1", 4, over=True))  # while it is out of sight
            await reached(made, 4)
            made.world.cache.send(server_state("web-1", role="web"))
            await told.until("b", "c")
        task.cancel()


async def test_a_scope_hides_findings_from_watchers() -> None:
    async with gateway(WEBS) as made:
        task = await known_to(made)
        stream = made.stub.WatchAnomalies(pb.WatchAnomaliesRequest())
        first = await stream.read()
        assert first.snapshot
        assert [one.server_id for one in first.anomalies] == ["web-1"]
        made.metadata.tell(anomaly("c", "db-1", 3), anomaly("d", "gone-1", 4), anomaly("e", "web-2", 5))
        assert [one.server_id for one in (await stream.read()).anomalies] == ["web-2"]
        stream.cancel()
        assert await made.refused(_first_of(made.stub), server_id="db-1") == ("SERVER_NOT_FOUND", "server_id")
        assert await made.refused(_first_of(made.stub), after_version="x") == ("INVALID_ARGUMENT", "after_version")
        task.cancel()


class Going:
    """A watcher of findings alone, and what goes on as far as he knows."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.version = ""
        self.open: set[str] = set()

    async def take(self) -> pb.WatchAnomaliesResponse:
        message: pb.WatchAnomaliesResponse = await self._stream.read()
        self.version = message.version
        if message.snapshot:
            self.open.clear()
        for one in message.anomalies:
            (self.open.discard if one.HasField("end_time") else self.open.add)(one.id[0])
        return message

    async def until(self, *ids: str) -> None:
        async with asyncio.timeout(20.0):
            while self.open != set(ids):
                await self.take()

    def close(self) -> None:
        self._stream.cancel()


@pytest.mark.parametrize("scope", [None, WEBS])
async def test_who_watches_findings_of_some_servers_knows_what_goes_on_at_those_that_come_and_go(
    scope: Scope | None,
) -> None:
    async with gateway(scope) as made:
        task = await known_to(made)
        wanted = pb.WatchAnomaliesRequest() if scope else pb.WatchAnomaliesRequest(role="web")
        watcher = Going(made.stub.WatchAnomalies(wanted))
        await watcher.until("a")
        made.world.cache.send(server_state("db-1", role="web"))
        await watcher.until("a", "b")
        made.world.cache.send(server_state("web-1", role="db"))
        await watcher.until("b")
        made.metadata.tell(anomaly("a", "web-1", 3, over=True), anomaly("c", "web-2", 4))
        await watcher.until("b", "c")
        watcher.close()
        made.world.cache.send(server_state("db-1", role="db"), server_state("web-1", role="web"))
        made.metadata.tell(anomaly("c", "web-2", 5, over=True), anomaly("d", "web-1", 6))
        await reached(made, 6)
        assert await made.world.state.until(made.world.caught_up, 20.0)
        wanted.after_version = watcher.version
        again = Going(made.stub.WatchAnomalies(wanted))
        again.open = {"b", "c"}
        message = await again.take()  # what began and ended meanwhile is not passed over
        assert (message.snapshot, [one.id[0] for one in message.anomalies]) == (False, ["c", "d"])
        await again.until("d")
        again.close()
        task.cancel()


async def test_who_watches_findings_of_some_servers_is_told_nothing_while_they_stay_where_they_are() -> None:
    async with gateway(WEBS) as made:
        task = await known_to(made)
        watcher = Going(made.stub.WatchAnomalies(pb.WatchAnomaliesRequest()))
        await watcher.until("a")
        for _ in range(3):
            made.world.cache.send(server_state("web-1", role="web", environment="production"))
            made.world.cache.send(server_state("new", role="web"))
            assert await made.world.state.until(made.world.caught_up, 20.0)
        made.metadata.tell(anomaly("c", "web-2", 4))
        message = await watcher.take()
        assert (message.snapshot, [one.id[0] for one in message.anomalies]) == (False, ["c"])
        watcher.close()
        task.cancel()


def _first_of(stub: Any) -> Any:
    async def ask(**request: Any) -> None:
        await stub.WatchAnomalies(pb.WatchAnomaliesRequest(**request)).read()

    return ask


async def test_watchers_of_findings_go_on_where_they_were() -> None:
    async with gateway() as made:
        task = await known_to(made)

        async def first(**request: Any) -> pb.WatchAnomaliesResponse:
            async with aclosing(made.world.findings.watch(lambda _server_id: True, **request)) as messages:
                return await anext(messages)

        opened = await first(after_version="")
        made.metadata.cut()  # the stream breaks, and goes on from the version
        made.metadata.tell(anomaly("a", "web-1", 3, over=True))
        await reached(made, 3)
        assert made.metadata.followed_from[-1] == NOW_US + 2
        later = await first(after_version=opened.version)
        assert (later.snapshot, [one.id[0] for one in later.anomalies]) == (False, ["a"])
        assert later.anomalies[0].HasField("end_time")
        anew = await first(after_version="")
        assert [one.id[0] for one in anew.anomalies] == ["b"]
        task.cancel()


async def test_a_version_is_the_same_at_gateways_that_started_at_different_times() -> None:
    async with gateway() as one, gateway() as other:
        tasks = []
        for made in (one, other):
            tasks.append(await followed(made))
            made.metadata.tell(*made.metadata.known, snapshot=True, version=made.metadata.followed_from[-1])
            made.metadata.tell(version=NOW_US + 2)
            await reached(made, 2)
        assert one.metadata.followed_from[0] <= other.metadata.followed_from[0]
        assert one.world.findings.version == other.world.findings.version
        async with one.world.watch() as watch:
            told = Told(watch._messages)
            await told.until("a", "b")
        other.world.cache.send(server_state("web-1", role="db"))
        assert await other.world.state.until(other.world.caught_up, 20.0)
        async with other.world.watch(after_version=told.version) as watch:
            message = await watch.next()
            assert (message.snapshot, [one.id for one in message.servers], list(message.anomalies)) == (
                False,
                ["web-1"],
                [],
            )
        for task in tasks:
            task.cancel()


async def test_a_gateway_that_starts_long_after_the_last_change_goes_on_from_there() -> None:
    last_us = -7_200_000_000
    async with gateway() as made:
        task = await followed(made)
        made.metadata.tell(anomaly("a", "web-1", last_us), snapshot=True, version=NOW_US + last_us)
        made.metadata.tell(version=NOW_US + last_us)
        await reached(made, last_us)
        async with made.world.watch() as watch, asyncio.timeout(20.0):
            told = Told(watch._messages)
            await told.until("a")
            made.metadata.tell(anomaly("b", "web-2", 1))
            message = await told.next()
            assert (message.snapshot, [one.id[0] for one in message.anomalies]) == (False, ["b"])
        task.cancel()


async def test_servers_are_watched_while_metadata_is_away() -> None:
    async with gateway() as made:
        async with made.world.watch() as watch:
            told = Told(watch._messages)
            await told.until()
            await told.next()
            assert set(told.known) == {"web-1", "web-2", "db-1"}
            assert "." not in told.version
            made.world.cache.send(server_state("web-1", role="db"))
            message = await told.next()
            assert [one.id for one in message.servers] == ["web-1"]
        with pytest.raises(Unavailable):
            async with aclosing(made.world.findings.watch(lambda _: True, "")) as messages:
                await anext(messages)
