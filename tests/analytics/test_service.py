"""The service as it runs: settings, restarts and kills, and what callers get over real gRPC."""

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc.aio
import numpy as np
import pytest

from fleet.anomaly import finding_id
from fleet.codec import timestamp_from_ms
from openmanager.analytics.v1 import analytics_pb2 as pb
from openmanager.analytics.v1 import analytics_pb2_grpc, prediction_pb2, prediction_pb2_grpc
from openmanager.fleet.v1 import report_pb2
from runtime.channel import Channel, calling
from runtime.process import Process
from runtime.settings import SettingsError
from services.analytics.__main__ import serve
from services.analytics.checkpoint import CheckpointFile
from services.analytics.core import Analysis
from services.analytics.prediction import servicer as prediction
from services.analytics.settings import AnalyticsSettings
from tests.analytics.fakes import (
    BROKEN_METRICS,
    BROKEN_TICKS,
    LEARN_TICKS,
    METRICS,
    SECRET,
    SERVERS,
    FakeMetadata,
    FakeTimeSeries,
    at_ms,
    fleet_ticks,
    serving,
    trained_snapshot,
    usual,
)
from tests.analytics.test_checkpoint import batches, fed, new_analysis, same
from tests.harness import eventually as harness_eventually
from tests.harness import free_port

eventually = functools.partial(harness_eventually, within_s=20.0)  # real processes start, on a busy machine
REPOSITORY = Path(__file__).parents[2]


class Client:
    """Calls of a running service."""

    def __init__(self, channel: Channel) -> None:
        self._stub = analytics_pb2_grpc.DetectionServiceStub(channel.grpc)
        self._predictions = prediction_pb2_grpc.PredictionServiceStub(channel.grpc)

    async def learned(self, server_id: str = "") -> float:
        async with calling("analytics"):
            answer: pb.GetLearnedResponse = await self._stub.GetLearned(pb.GetLearnedRequest(server_id=server_id))
            return answer.learned

    async def report(self) -> report_pb2.ModelReport:
        async with calling("analytics"):
            answer: pb.ReportModelsResponse = await self._stub.ReportModels(pb.ReportModelsRequest())
            return answer.report

    async def predictions(self, *server_ids: str) -> prediction_pb2.ListPredictionsResponse:
        async with calling("analytics"):
            request = prediction_pb2.ListPredictionsRequest(server_ids=server_ids)
            response: prediction_pb2.ListPredictionsResponse = await self._predictions.ListPredictions(request)
            return response


class World:
    """What a service follows, and where it tells what it found."""

    def __init__(self, timeseries: str, metadata: str, fakes: tuple[FakeTimeSeries, FakeMetadata]) -> None:
        self.targets = {"TIMESERIES_TARGET": timeseries, "METADATA_TARGET": metadata}
        self.timeseries, self.metadata = fakes

    async def shows(self, findings: int, *, over: bool = False) -> None:
        """Waits until so many were told, all of which are over."""
        kept = self.metadata.kept
        await eventually(
            lambda: len(kept) == findings and not (over and any(one.end_ms is None for one in kept.values()))
        )


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    timeseries, metadata = FakeTimeSeries(), FakeMetadata()
    async with serving(timeseries) as one, serving(metadata) as other:
        yield World(one, other, (timeseries, metadata))


def settings_of(folder: Path, targets: dict[str, str], **more: str) -> dict[str, str]:
    return {
        "DATA_DIR": str(folder),
        "SERVICE_SECRET": SECRET,
        "ANALYTICS_ADDRESS": "127.0.0.1:0",
        "ANALYTICS_CHECKPOINT_INTERVAL": "1h",
        **targets,
        **more,
    }


@contextlib.asynccontextmanager
async def running(folder: Path, targets: dict[str, str]) -> AsyncIterator[Client]:
    """The service in this process, stopped in order."""
    settings = AnalyticsSettings.load(settings_of(folder, targets))
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
async def spawned(folder: Path, targets: dict[str, str], *, kill: bool) -> AsyncIterator[Client]:
    """The service as a process of its own, ended by SIGKILL or SIGTERM."""
    address = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.analytics",
        cwd=REPOSITORY,
        env=os.environ | settings_of(folder, targets, ANALYTICS_ADDRESS=address),
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


async def same_in_the_end(stored: Analysis, ticks: int, metadata: FakeMetadata) -> None:
    """Whether what a service left, with the ticks that it had not read, and told is that of an uninterrupted run."""
    for batch in batches(ticks)[stored.next_sequence - 1 :]:
        await stored.apply(batch)
    stored.outbox.put(metadata.kept.values())
    same(stored, await fed(ticks))


async def test_kills_between_checkpoints_lose_and_double_nothing(tmp_path: Path) -> None:
    ticks = fleet_ticks(130)
    learnt(tmp_path)
    async with world() as made:
        fake = made.timeseries
        async with spawned(tmp_path, made.targets, kill=True):
            await eventually(lambda: fake.streams == 1)
            for rows in ticks[:25]:  # killed while a finding is open
                fake.append(rows)
            await made.shows(1)
        made.metadata.kept.clear()  # told again by the next, which goes on from the checkpoint
        async with spawned(tmp_path, made.targets, kill=True):
            await made.shows(1)
            for rows in ticks[25:85]:
                fake.append(rows)
            await made.shows(2)
        for rows in ticks[85:]:
            fake.append(rows)
        async with spawned(tmp_path, made.targets, kill=False):
            await made.shows(2, over=True)
        assert fake.asked == [1, 1, 1]
        await same_in_the_end(await from_disk(tmp_path), 130, made.metadata)


async def test_restarts_in_order_equal_an_uninterrupted_run(tmp_path: Path) -> None:
    ticks = fleet_ticks(130)
    learnt(tmp_path)
    async with world() as made:
        fake = made.timeseries
        for start, end, findings in ((0, 1, 0), (1, 21, 0), (21, 27, 1), (27, 130, 2)):
            async with running(tmp_path, made.targets):
                await eventually(lambda: fake.streams == 1)
                for rows in ticks[start:end]:
                    fake.append(rows)
                await made.shows(findings)
                await eventually(lambda: fake.streams == 1)
            await eventually(lambda: fake.streams == 0)
        await same_in_the_end(await from_disk(tmp_path), 130, made.metadata)


async def test_findings_wait_for_metadata_also_over_a_restart(tmp_path: Path) -> None:
    ticks = fleet_ticks(130)
    learnt(tmp_path)
    async with world() as made:
        fake, metadata = made.timeseries, made.metadata
        metadata.is_away = True
        async with running(tmp_path, made.targets):
            await eventually(lambda: fake.streams == 1)
            for rows in ticks:
                fake.append(rows)
            await eventually(lambda: metadata.turned_away > 0)
        assert len((await from_disk(tmp_path)).outbox) > 0
        metadata.is_away = False
        async with running(tmp_path, made.targets):
            await made.shows(2, over=True)
        assert metadata.kept == {finding.id: finding for finding in (await fed(130)).outbox.all()}
        await eventually(lambda: fake.streams == 0)
        assert len((await from_disk(tmp_path)).outbox) == 0


async def test_scores_wait_for_timeseries_also_over_a_restart(tmp_path: Path) -> None:
    ticks = 30
    learnt(tmp_path)
    async with world() as made:
        fake = made.timeseries
        fake.is_away = True  # its disk is full, or it takes them more slowly than rows are read after an outage
        async with running(tmp_path, made.targets):
            await eventually(lambda: fake.streams == 1)
            for rows in fleet_ticks(ticks):
                fake.append(rows)
            await made.shows(1)
            await eventually(lambda: fake.turned_away > 0)
        await eventually(lambda: fake.streams == 0)
        fake.is_away = False
        async with running(tmp_path, made.targets):
            await eventually(lambda: len(fake.written) >= ticks - 2)
        times = [(row.server_id, row.time.ToMilliseconds()) for batch in fake.written for row in batch.rows]
        assert sorted(times) == sorted((server, at_ms(tick)) for server in SERVERS for tick in range(ticks - 2))


async def test_a_finding_that_metadata_refuses_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = fleet_ticks(130)
    learnt(tmp_path)
    async with world() as made:
        made.metadata.refuses = {"server-1"}
        whole = await fed(130)
        other_id = finding_id("server-1", "departure", at_ms(3))
        other = replace(whole.outbox.all()[0], server_id="server-1", id=other_id, start_ms=at_ms(3))
        snapshot = replace(trained_snapshot(), waiting=(other,))
        CheckpointFile(tmp_path / "analytics").save(snapshot)
        async with running(tmp_path, made.targets):
            await eventually(lambda: made.timeseries.streams == 1)
            for rows in ticks:
                made.timeseries.append(rows)
            await made.shows(2, over=True)
            await eventually(lambda: "metadata refuses it" in caplog.text)
        assert len((await from_disk(tmp_path)).outbox) == 0


async def test_a_corrupt_checkpoint_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    (tmp_path / "analytics").mkdir()
    (tmp_path / "analytics" / "checkpoint").write_bytes(b"\0" * 100)
    async with world() as made, running(tmp_path, made.targets) as client:
        await eventually(lambda: made.timeseries.streams == 1)
        assert await client.learned() == 0
        assert (tmp_path / "analytics" / "checkpoint.unusable").exists()
        assert made.timeseries.asked == [0]


async def test_it_answers_while_the_others_are_away(tmp_path: Path) -> None:
    nobody = {"TIMESERIES_TARGET": "127.0.0.1:1", "METADATA_TARGET": "127.0.0.1:1"}
    async with running(tmp_path, nobody) as client:
        assert await client.learned() == 0


async def test_what_is_told_of_a_finding(tmp_path: Path) -> None:
    """Of server-0, on ticks 20 to 30 and 80 to 90."""
    async with world() as made, running(learnt(tmp_path), made.targets) as client:
        await eventually(lambda: made.timeseries.streams == 1)
        for rows in fleet_ticks(120):
            made.timeseries.append(rows)
        await made.shows(2, over=True)
        newest, oldest = made.metadata.findings
        assert (oldest.start_ms, oldest.end_ms) == (at_ms(20), at_ms(31))
        assert (newest.start_ms, newest.end_ms) == (at_ms(80), at_ms(91))
        assert (oldest.server_id, oldest.detector) == ("server-0", "departure")
        assert 0.5 < oldest.score < 1
        assert oldest.expected_low < 40 < oldest.expected_high < oldest.value == 97
        assert oldest.peak_ms == at_ms(20)
        assert oldest.revision >= 2
        parts = oldest.contributions
        assert {part.metric for part in parts[:4]} == set(BROKEN_METRICS)
        assert (parts[0].metric, parts[0].value, parts[0].expected_low) == (oldest.metric, 97, oldest.expected_low)
        assert 1 > parts[0].score >= parts[1].score >= parts[-1].score > 0
        assert len(parts) == 10
        learned = [await client.learned(server_id) for server_id in ("", "server-1", "unknown")]
        assert learned == [1.0, 1.0, 0.0]
        detection = (await client.report()).detection
        assert (detection.servers, detection.series) == (3, 3 * len(METRICS))
        assert detection.minutes == 118
        assert 0 < detection.time_per_minute.nanos < 500_000_000
        assert 20_000 < detection.state_bytes < 1_000_000


async def test_predictions_over_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "STALE_MS", 1 << 60)  # the ticks are of long ago
    disk = METRICS.index("disk_usage")
    async with world() as made, running(learnt(tmp_path), made.targets) as client:
        await eventually(lambda: made.timeseries.streams == 1)
        assert (await client.predictions("server-2")).servers == 0, "no minute has been judged since the start"
        for tick, rows in enumerate(fleet_ticks(100)):
            rows.values[:, :] = usual(LEARN_TICKS + tick, len(SERVERS))
            rows.values[2, disk] = 40.0 + 0.3 * tick
            made.timeseries.append(rows)

        async def has_seen_all() -> bool:
            answer = await client.predictions("server-2")
            return any(one.compute_time == timestamp_from_ms(at_ms(98)) for one in answer.predictions)

        await eventually(has_seen_all)
        answer = await client.predictions("server-0", "server-2", "nobody")
        assert (answer.servers, [one.server_id for one in answer.predictions]) == (2, ["server-2", "server-0"])
        full = answer.predictions[0]
        assert (full.probability, full.reasons[0].metric) == (pytest.approx(0.9), "disk_usage")
        assert full.low.ToMilliseconds() <= at_ms(183) <= full.high.ToMilliseconds()
        await made.shows(1)
        (finding,) = made.metadata.findings
        assert (finding.detector, finding.metric, finding.server_id) == ("prediction", "disk_usage", "server-2")


async def test_a_caller_without_the_secret_is_refused(tmp_path: Path) -> None:
    async with world() as made:
        settings = AnalyticsSettings.load(settings_of(tmp_path, made.targets))
        process = Process("analytics", settings)
        process.folder.mkdir()
        task = asyncio.create_task(serve(settings, process))
        address = await eventually(lambda: process.bound_addresses.get("ANALYTICS_ADDRESS"))
        async with grpc.aio.insecure_channel(address) as bare:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await analytics_pb2_grpc.DetectionServiceStub(bare).GetLearned(pb.GetLearnedRequest())
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
                "ANALYTICS_SERIES_LIMIT": "12",
            }
        )
    assert len(caught.value.problems) == 4


def test_the_fleet_of_the_tests_is_as_the_tests_think() -> None:
    cpu = np.array([rows.values[0, METRICS.index("cpu_usage")] for rows in fleet_ticks(120)])
    assert np.flatnonzero(cpu > 90).tolist() == list(BROKEN_TICKS)
