"""Findings on the streams: who is told of which, once, and from where he goes on."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from fleet.access import Scope
from gateway import findings as findings_module
from openmanager.fleet.v1 import anomaly_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime.errors import OpenManagerError, Unavailable
from tests.gateway.played_findings import NOW_US, WEBS, Gateway, anomaly, gateway
from tests.gateway.played_fleet import Watch, server_state
from tests.harness import eventually


async def followed(made: Gateway) -> "asyncio.Task[None]":
    """Follows the findings as the process does."""

    async def follow() -> None:
        while True:
            try:
                await made.world.findings.follow()
            except OpenManagerError:
                await asyncio.sleep(0.01)

    task = asyncio.create_task(follow())
    await eventually(lambda: made.metadata.followed_from)
    return task


async def reached(made: Gateway, after_us: int) -> None:
    await eventually(lambda: made.world.findings.version >= NOW_US + after_us)


async def known_to(made: Gateway) -> "asyncio.Task[None]":
    """Follows them until it has what metadata knows: findings a and b, as of NOW_US + 2."""
    task = await followed(made)
    made.metadata.tell(*made.metadata.known, snapshot=True)
    made.metadata.tell(version=NOW_US + 2)
    await reached(made, 2)
    return task


class Told(Watch):
    """A watcher of the fleet, and what it knows of findings."""

    def __init__(self, messages: Any) -> None:
        super().__init__(messages)
        self.findings: dict[str, anomaly_pb2.Anomaly] = {}

    async def until(self, *ids: str) -> None:
        """Takes messages until these are the findings that go on."""
        async with asyncio.timeout(20.0):
            while {one.id[0] for one in self.findings.values() if not one.HasField("end_time")} != set(ids):
                message = await self.next()
                if message.snapshot:
                    self.findings.clear()
                self.findings |= {one.id: one for one in message.anomalies}


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


async def told_once(made: Gateway, version_us: int, *messages: dict[str, Any], until: str) -> list[str]:
    """What a watcher with a version is told of while metadata tells these, one after the other."""
    told: list[str] = []

    async def watch() -> None:
        stream = made.world.findings.watch(lambda _server_id: True, str(NOW_US + version_us))
        async with aclosing(stream) as updates:
            async for update in updates:
                told.extend(one.id[0] for one in update.anomalies)

    watching = asyncio.create_task(watch())
    for message in messages:
        made.metadata.tell(*message.pop("anomalies", ()), **message)
        await asyncio.sleep(0.02)  # for the watcher to be told of what waits for the next one: no condition shows it
    await eventually(lambda: until in told)
    watching.cancel()
    return told


async def test_while_a_gateway_catches_up_nobody_is_told_what_he_has() -> None:
    async with gateway() as made:
        task = await followed(made)
        made.metadata.tell(snapshot=True)
        made.metadata.tell(anomaly("a", "web-1", 3, over=True))
        await reached(made, 3)
        messages = (
            {"anomalies": [anomaly(name, "web-1", at_us, over=True)]} for name, at_us in [("b", 4), ("c", 5), ("d", 7)]
        )
        assert await told_once(made, 6, *messages, until="d") == ["d"]  # 6: another gateway was further
        task.cancel()


async def test_what_a_snapshot_is_ahead_of_is_told_once() -> None:
    async with gateway() as made:
        task = await followed(made)
        made.metadata.tell(snapshot=True)
        made.metadata.tell(anomaly("b", "web-1", 1))
        await reached(made, 1)
        made.metadata.cut()
        await eventually(lambda: made.metadata.followed_from[1:])
        ahead = anomaly("c", "web-1", 9)
        told = await told_once(
            made,
            1,
            {"anomalies": [ahead], "snapshot": True, "version": NOW_US + 1},
            {"anomalies": [anomaly("a", "web-1", 3, over=True)]},
            {"anomalies": [ahead]},
            {"anomalies": [anomaly("d", "web-1", 12)]},
            until="d",
        )
        assert told == ["a", "c", "d"]
        task.cancel()


async def test_who_is_behind_by_too_much_is_given_all_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_module, "KEPT", 4)
    async with gateway() as made:
        task = await known_to(made)
        async with made.world.watch() as watch:
            told = Told(watch._messages)
            await told.until("a", "b")
            made.metadata.tell(anomaly("a", "web-1", 3, over=True))
            for number in range(8):  # of the oldest nobody knows any more that it is over
                made.metadata.tell(anomaly(str(number), "web-2", 10 + number, over=True))
            await reached(made, 17)
            assert len(made.world.findings._known) <= 4 + 1 + 1
            await told.until("b")
        async with aclosing(made.world.findings.watch(lambda _: True, str(NOW_US + 2))) as messages:
            message = await anext(messages)
            assert message.snapshot
            assert [one.id[0] for one in message.anomalies] == ["b"]
        task.cancel()


async def test_what_a_partial_snapshot_lacked_is_told_to_all_when_it_is_known() -> None:
    async with gateway() as made:
        task = await followed(made)
        made.metadata.tell(anomaly("b", "web-1", 1), snapshot=True, partial=True)
        made.metadata.tell(version=NOW_US + 2)
        await reached(made, 2)
        findings = made.world.findings.watch(lambda _: True, "")
        async with made.world.watch() as watch, aclosing(findings) as alone:
            told = Told(watch._messages)
            await told.until("b")
            assert [one.id[0] for one in (await anext(alone)).anomalies] == ["b"]
            older = anomaly("a", "web-2", -100_000_000_000)
            made.metadata.tell(older, anomaly("b", "web-1", 1), snapshot=True, version=NOW_US + 2)
            await told.until("a", "b")
            async with asyncio.timeout(20.0):
                message = await anext(alone)
            assert (message.snapshot, [one.id[0] for one in message.anomalies]) == (True, ["a", "b"])
            made.metadata.tell(older, anomaly("b", "web-1", 1), snapshot=True, version=NOW_US + 2)  # of another stream
            made.metadata.tell(anomaly("c", "web-2", 5))
            message = await anext(alone)
            assert (message.snapshot, [one.id[0] for one in message.anomalies]) == (False, ["c"])
        task.cancel()


async def test_what_a_partial_snapshot_lacked_is_told_to_all_also_when_findings_come_meanwhile() -> None:
    async with gateway() as made:
        task = await followed(made)
        made.metadata.tell(anomaly("b", "web-1", 1), snapshot=True, partial=True)
        made.metadata.tell(version=NOW_US + 2)
        await reached(made, 2)
        async with aclosing(made.world.findings.watch(lambda _: True, "")) as alone, asyncio.timeout(20.0):
            assert [one.id[0] for one in (await anext(alone)).anomalies] == ["b"]
            older, newer = anomaly("a", "web-2", -100_000_000_000), anomaly("d", "web-2", 9)
            for _ in range(2):
                made.metadata.tell(older, anomaly("b", "web-1", 1), newer, snapshot=True, version=NOW_US + 2)
                if len(made.metadata.followed_from) == 1:  # the stream breaks in between, once
                    made.metadata.cut()
                    await eventually(lambda: made.metadata.followed_from[1:])
            made.metadata.tell(newer)
            message = await anext(alone)
            assert (message.snapshot, [one.id[0] for one in message.anomalies]) == (True, ["a", "b", "d"])
            made.metadata.tell(anomaly("c", "web-2", 12))
            message = await anext(alone)
            assert (message.snapshot, [one.id[0] for one in message.anomalies]) == (False, ["c"])
        task.cancel()


async def test_a_version_of_a_time_to_come_is_void() -> None:
    async with gateway() as made:
        task = await known_to(made)
        next_year = str(NOW_US + 31_536_000_000_000)
        async with aclosing(made.world.findings.watch(lambda _: True, next_year)) as messages, asyncio.timeout(20.0):
            message = await anext(messages)
            assert (message.snapshot, message.version) == (True, str(NOW_US + 2))
            assert [one.id[0] for one in message.anomalies] == ["a", "b"]
        async with made.world.watch() as watch:
            told = Told(watch._messages)
            await told.until("a", "b")
            version = told.version
        before, _, of_findings = version.rpartition(".")
        assert of_findings == str(NOW_US + 2), version
        async with made.world.watch(after_version=f"{before}.{next_year}") as watch:
            again = Told(watch._messages)
            await again.until("a", "b")
        task.cancel()


async def test_metadata_whose_clock_is_ahead_of_ours_does_not_make_what_watchers_have_void() -> None:
    hour_us = 3_600_000_000
    async with gateway() as made:
        task = await known_to(made)
        made.metadata.tell(anomaly("c", "web-2", hour_us))
        await reached(made, hour_us)
        findings = made.world.findings.watch(lambda _: True, "")
        async with made.world.watch() as watch, aclosing(findings) as alone, asyncio.timeout(20.0):
            told = Told(watch._messages)
            await told.until("a", "b", "c")
            assert (await anext(alone)).snapshot
            made.world.cache.send(server_state("web-1", role="db"))
            message = await told.next()
            assert (message.snapshot, [one.id for one in message.servers]) == (False, ["web-1"])
            made.metadata.tell(anomaly("d", "web-1", hour_us + 1))
            for heard in (await told.next(), await anext(alone)):
                assert (heard.snapshot, [one.id[0] for one in heard.anomalies]) == (False, ["d"])
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
