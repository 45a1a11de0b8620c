"""Findings on their way to metadata: the last of each, in the order in which they wait, and none forgotten."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from fleet.anomaly import Anomaly, Contribution
from openmanager.metadata.v1 import anomaly_pb2
from runtime.channel import Channel
from services.analytics.outbox import Outbox, Reporter
from tests.analytics.fakes import SECRET, FakeMetadata, serving
from tests.harness import eventually
from tests.harness.findings import finding

A, B, C = (finding(server_id, 60_000) for server_id in "abc")

PART = Contribution(metric="m", value=1.0, expected_low=0.0, expected_high=1.0, score=0.5)


async def test_the_last_of_each_waits_and_an_end_is_never_undone() -> None:
    outbox = Outbox()
    outbox.put([A, B])
    grown = A.changed(score=0.9)
    over = B.changed(end_ms=120_000)
    outbox.put([grown, over])
    outbox.put([A, B, B.changed(score=0.95)])
    assert {one.id: one for one in outbox.all()} == {A.id: grown, B.id: over}
    assert A.id in outbox and C.id not in outbox
    assert await outbox.first(1) == [outbox.all()[0]]


async def test_what_changed_while_it_was_sent_still_waits() -> None:
    outbox = Outbox()
    outbox.put([A, B])
    sent = await outbox.first(10)
    over = A.changed(end_ms=120_000)
    outbox.put([over])
    outbox.acknowledge(sent)
    assert outbox.all() == (over,)
    outbox.acknowledge([over])
    assert len(outbox) == 0


async def test_beyond_the_bound_the_longest_waiting_goes_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    outbox = Outbox(limit=2)
    outbox.put([A, B])
    outbox.put([A.changed(score=0.9)])
    outbox.put([C])
    assert [one.server_id for one in outbox.all()] == ["a", "c"]
    assert "a finding of b is lost" in caplog.text


async def test_findings_that_are_too_large_together_are_told_one_after_the_other() -> None:
    """A metric's labels may be 64 KiB, and a finding names ten metrics."""
    fake, outbox = FakeMetadata(), Outbox()
    large = [
        replace(A, id=f"{number:032}", contributions=(replace(PART, metric="m" * 100_000),) * 10)
        for number in range(24)
    ]
    async with serving(fake) as address, Channel(address, secret=SECRET) as channel:
        reporting = asyncio.create_task(Reporter(channel, outbox).run())
        outbox.put(large)
        await eventually(lambda: len(outbox) == 0 or reporting.done())
        assert fake.kept == {one.id: one for one in large}
        reporting.cancel()


async def test_metadata_is_told_again_of_what_changed_on_the_way() -> None:
    class Slow(FakeMetadata):
        """Takes a finding only when it may."""

        def __init__(self) -> None:
            super().__init__()
            self.may_take = asyncio.Event()
            self.asked = 0

        async def RecordAnomalies(
            self, request: anomaly_pb2.RecordAnomaliesRequest, context: Any
        ) -> anomaly_pb2.RecordAnomaliesResponse:
            self.asked += 1
            await self.may_take.wait()
            return await super().RecordAnomalies(request, context)

    slow, outbox = Slow(), Outbox()
    async with serving(slow) as address, Channel(address, secret=SECRET) as channel:
        reporting = asyncio.create_task(Reporter(channel, outbox).run())
        outbox.put([A])
        await eventually(lambda: slow.asked == 1)
        over: Anomaly = A.changed(end_ms=120_000)
        outbox.put([over])
        slow.may_take.set()
        await eventually(lambda: slow.kept.get(A.id) == over)
        await eventually(lambda: len(outbox) == 0)
        assert slow.asked == 2
        reporting.cancel()
