"""Findings while a gateway catches up with metadata: nobody is told twice, and nobody lacks what was filled in."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from gateway import findings as findings_module
from tests.gateway.played_findings import NOW_US, Gateway, Told, anomaly, followed, gateway, known_to, reached
from tests.gateway.played_fleet import server_state
from tests.harness import eventually


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
