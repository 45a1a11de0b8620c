"""The service as it runs: settings, restarts and kills, and what callers get over real gRPC."""

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from fleet.codec import timestamp_from_ms
from openmanager.analytics.v1 import analytics_pb2 as pb
from openmanager.analytics.v1 import analytics_pb2_grpc
from runtime.channel import Channel, calling
from runtime.errors import InvalidArgument
from runtime.process import Process
from runtime.settings import SettingsError
from services.analytics.__main__ import serve
from services.analytics.checkpoint import CheckpointFile
from services.analytics.core import Analysis
from services.analytics.settings import AnalyticsSettings
from tests.analytics.fakes import (
    BROKEN_METRICS,
    BROKEN_TICKS,
    METRICS,
    SECRET,
    FakeTimeSeries,
    at_ms,
    fleet_ticks,
    serving,
    trained_snapshot,
)
from tests.analytics.test_checkpoint import batches, fed, new_analysis, same
from tests.harness import eventually as harness_eventually
from tests.harness import free_port

eventually = functools.partial(harness_eventually, within_s=20.0)  # real processes start, on a busy machine
REPOSITORY = Path(__file__).parents[2]


class Client:
    """Calls of a running service."""

    def __init__(self, channel: Channel) -> None:
        self._stub = analytics_pb2_grpc.AnomalyServiceStub(channel.grpc)

    async def query(self, **request: Any) -> pb.QueryAnomaliesResponse:
        async with calling("analytics"):
            response: pb.QueryAnomaliesResponse = await self._stub.QueryAnomalies(pb.QueryAnomaliesRequest(**request))
            return response

    async def has(self, findings: int) -> bool:
        try:
            return (await self.query()).total_size == findings
        except Exception:  # it is starting
            return False


def settings_of(folder: Path, timeseries: str, **more: str) -> dict[str, str]:
    return {
        "DATA_DIR": str(folder),
        "SERVICE_SECRET": SECRET,
        "ANALYTICS_ADDRESS": "127.0.0.1:0",
        "TIMESERIES_TARGET": timeseries,
        "ANALYTICS_CHECKPOINT_INTERVAL": "1h",
    } | more


@contextlib.asynccontextmanager
async def running(folder: Path, timeseries: str) -> AsyncIterator[Client]:
    """The service in this process, stopped in order."""
    settings = AnalyticsSettings.load(settings_of(folder, timeseries))
    process = Process("analytics", settings)
    process.folder.mkdir(exist_ok=True)
    task = asyncio.create_task(serve(settings, process))
    try:
        address = await eventually(lambda: task.done() or process.bound_addresses.get("ANALYTICS_ADDRESS"))
        assert isinstance(address, str), task.exception()
        async with Channel(address, secret=SECRET) as channel:
            yield Client(channel)
    finally:
        process.stopping.set()
        await task


@contextlib.asynccontextmanager
async def spawned(folder: Path, timeseries: str, *, kill: bool) -> AsyncIterator[Client]:
    """The service as a process of its own, ended by SIGKILL or SIGTERM."""
    address = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.analytics",
        cwd=REPOSITORY,
        env=os.environ | settings_of(folder, timeseries, ANALYTICS_ADDRESS=address),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with Channel(address, secret=SECRET) as channel:
            yield Client(channel)
    finally:
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        code = await process.wait()
    assert code == (-signal.SIGKILL if kill else 0)


def learnt(folder: Path) -> Path:
    """A data folder with a checkpoint of a service that has learnt what is usual."""
    (folder / "analytics").mkdir()
    CheckpointFile(folder / "analytics").save(trained_snapshot())
    return folder


async def from_disk(folder: Path) -> Analysis:
    analysis = new_analysis()
    snapshot = CheckpointFile(folder / "analytics").load()
    assert snapshot is not None
    analysis.restore(snapshot)
    return analysis


async def same_in_the_end(stored: Analysis, ticks: int) -> None:
    """Whether what a service left, with the ticks that it had not read, is what an uninterrupted run knows."""
    for batch in batches(ticks)[stored.next_sequence - 1 :]:
        await stored.apply(batch)
    same(stored, await fed(ticks))


async def test_kills_between_checkpoints_lose_and_double_nothing(tmp_path: Path) -> None:
    fake, ticks = FakeTimeSeries(), fleet_ticks(130)
    learnt(tmp_path)
    async with serving(fake) as address:
        async with spawned(tmp_path, address, kill=True) as client:
            await eventually(lambda: fake.streams == 1)
            for rows in ticks[:25]:  # killed while a finding is open
                fake.append(rows)
            await eventually(lambda: client.has(1))
        async with spawned(tmp_path, address, kill=True) as client:
            await eventually(lambda: client.has(1))
            for rows in ticks[25:85]:
                fake.append(rows)
            await eventually(lambda: client.has(2))
        for rows in ticks[85:]:
            fake.append(rows)
        async with spawned(tmp_path, address, kill=False) as client:
            await eventually(lambda: client.has(2))
            await eventually(lambda: _all_closed(client))
    assert fake.asked == [1, 1, 1]
    await same_in_the_end(await from_disk(tmp_path), 130)


async def _all_closed(client: Client) -> bool:
    return all(one.HasField("end_time") for one in (await client.query()).anomalies)


async def test_restarts_in_order_equal_an_uninterrupted_run(tmp_path: Path) -> None:
    fake, ticks = FakeTimeSeries(), fleet_ticks(130)
    learnt(tmp_path)
    async with serving(fake) as address:
        for start, end, findings in ((0, 1, 0), (1, 21, 0), (21, 27, 1), (27, 130, 2)):
            async with running(tmp_path, address) as client:
                await eventually(lambda: fake.streams == 1)
                for rows in ticks[start:end]:
                    fake.append(rows)
                await eventually(functools.partial(client.has, findings))
                await eventually(lambda: fake.streams == 1)
            await eventually(lambda: fake.streams == 0)
    await same_in_the_end(await from_disk(tmp_path), 130)


async def test_a_corrupt_checkpoint_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    (tmp_path / "analytics").mkdir()
    (tmp_path / "analytics" / "checkpoint").write_bytes(b"\0" * 100)
    fake = FakeTimeSeries()
    async with serving(fake) as address, running(tmp_path, address) as client:
        await eventually(lambda: fake.streams == 1)
        assert (await client.query()).learned == 0
        assert (tmp_path / "analytics" / "checkpoint.unusable").exists()
    assert fake.asked == [0]


async def test_it_answers_while_timeseries_is_away(tmp_path: Path) -> None:
    async with running(tmp_path, "127.0.0.1:1") as client:
        response = await client.query()
        assert (response.total_size, response.learned, list(response.anomalies)) == (0, 0, [])


@contextlib.asynccontextmanager
async def with_findings(folder: Path) -> AsyncIterator[Client]:
    """A service with two findings of server-0, on ticks 20 to 30 and 80 to 90."""
    fake = FakeTimeSeries()
    async with serving(fake) as address, running(learnt(folder), address) as client:
        await eventually(lambda: fake.streams == 1)
        for rows in fleet_ticks(120):
            fake.append(rows)
        await eventually(lambda: client.has(2))
        await eventually(lambda: _all_closed(client))
        yield client


def at(tick: int) -> Timestamp:
    return timestamp_from_ms(at_ms(tick))


async def test_findings_over_grpc(tmp_path: Path) -> None:
    async with with_findings(tmp_path) as client:
        response = await client.query()
        assert (response.total_size, response.learned, response.next_page_token) == (2, 1.0, "")
        newest, oldest = response.anomalies
        assert (oldest.start_time, oldest.end_time) == (at(20), at(31))
        assert (newest.start_time, newest.end_time) == (at(80), at(91))
        assert (oldest.server_id, oldest.detector) == ("server-0", "departure")
        assert 0.5 < oldest.score < 1
        assert oldest.expected_low < 40 < oldest.expected_high < oldest.value == 97
        assert oldest.peak_time == at(20)
        parts = oldest.contributions
        assert {part.metric for part in parts[:4]} == set(BROKEN_METRICS)
        assert (parts[0].metric, parts[0].value, parts[0].expected_low) == (oldest.metric, 97, oldest.expected_low)
        assert 1 > parts[0].score >= parts[1].score >= parts[-1].score > 0
        assert len(parts) == 10
        assert (await client.query(server_id="server-1")).learned == 1.0
        assert (await client.query(server_id="unknown")).learned == 0.0

        first = await client.query(page_size=1)
        assert (list(first.anomalies), first.total_size) == ([newest], 2)
        second = await client.query(page_size=1, page_token=first.next_page_token)
        assert (list(second.anomalies), second.next_page_token) == ([oldest], "")

        assert list((await client.query(start_time=at(32))).anomalies) == [newest]
        assert list((await client.query(end_time=at(80))).anomalies) == [oldest]
        assert list((await client.query(start_time=at(25), end_time=at(26))).anomalies) == [oldest]
        assert (await client.query(start_time=at(40), end_time=at(50))).total_size == 0
        assert (await client.query(server_id="server-0")).total_size == 2
        assert (await client.query(server_id="server-1")).total_size == 0

        for request, field in (
            ({"page_size": -1}, "page_size"),
            ({"page_token": "nonsense"}, "page_token"),
            ({"page_token": first.next_page_token, "server_id": "server-0"}, "page_token"),
            ({"start_time": at(2), "end_time": at(1)}, "end_time"),
        ):
            with pytest.raises(InvalidArgument) as caught:
                await client.query(**request)
            assert caught.value.field == field


async def test_a_caller_without_the_secret_is_refused(tmp_path: Path) -> None:
    fake = FakeTimeSeries()
    async with serving(fake) as timeseries:
        settings = AnalyticsSettings.load(settings_of(tmp_path, timeseries))
        process = Process("analytics", settings)
        process.folder.mkdir()
        task = asyncio.create_task(serve(settings, process))
        address = await eventually(lambda: process.bound_addresses.get("ANALYTICS_ADDRESS"))
        async with grpc.aio.insecure_channel(address) as bare:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await analytics_pb2_grpc.AnomalyServiceStub(bare).QueryAnomalies(pb.QueryAnomaliesRequest())
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        process.stopping.set()
        await task


def test_settings_that_make_no_sense_are_all_told() -> None:
    with pytest.raises(SettingsError) as caught:
        AnalyticsSettings.load(
            {
                "ANALYTICS_ADDRESS": "nowhere",
                "ANALYTICS_CHECKPOINT_INTERVAL": "0s",
                "ANALYTICS_SILENCE": "soon",
            }
        )
    assert len(caught.value.problems) == 3


def test_the_fleet_of_the_tests_is_as_the_tests_think() -> None:
    cpu = np.array([rows.values[0, METRICS.index("cpu_usage")] for rows in fleet_ticks(120)])
    assert np.flatnonzero(cpu > 90).tolist() == list(BROKEN_TICKS)
