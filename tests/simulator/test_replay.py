"""A recording is played whole, in order, at the speed asked for, and survives stops and outages."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, Unavailable
from services.simulator import recording as recording_module
from services.simulator.delivery import Delivery
from services.simulator.feed import Mode
from services.simulator.recording import RecordingReader, read_header
from services.simulator.replay import Replay
from services.simulator.simulator import Simulator
from tests.harness import eventually
from tests.simulator.support import FakeWriter

NOW_MS = 1_760_000_000_000
FIRST_S, STEPS, STEP_S = 1_372_629_600, 50, 300
LAST_S = FIRST_S + (STEPS - 1) * STEP_S


class Stage:
    """A recording of three servers, a clock and a writer."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recording.csv"
        lines = [f"{FIRST_S + STEP_S * step},vm-{vm},{step},{vm}" for vm in range(3) for step in range(STEPS)]
        self.path.write_text("time,server_id,cpu_usage,queue_depth\n" + "\n".join(lines) + "\nbad\n")
        self.folder = folder / "runs"
        self.clock = ManualClock(now_ms=NOW_MS)
        self.writer = FakeWriter()
        self.delivery = Delivery(self.writer, self.clock)

    def replay(self, *, speed: float | None = None, shift: bool = True) -> Replay:
        header = read_header(self.path)
        return Replay(self.path, self.folder, header, self.clock, speed=speed, shift=shift)

    @property
    def rows(self) -> list[tuple[int, str]]:
        return [
            (int(time_ms), server_id)
            for batch in self.writer.batches
            for time_ms, server_id in zip(batch.rows.times_ms, batch.rows.server_ids, strict=True)
        ]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    task = asyncio.create_task(stage.delivery.run())
    yield stage
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_recording_that_was_replaced_is_played_under_the_names_of_its_own_columns(stage: Stage) -> None:
    replay = stage.replay()
    for header in ("time,server_id,queue_depth,cpu_usage", "time,server_id,cpu_usage,queue_depth,disk_usage"):
        names = header.split(",")[2:]
        stage.path.write_text(f"{header}\n{FIRST_S},a," + ",".join(map(str, range(len(names)))) + "\n")
        stage.writer.batches.clear()
        await replay.run(stage.delivery)
        (batch,) = stage.writer.batches
        assert [metric.name for metric in batch.metric_set.metrics] == names
        assert batch.rows.metric_set_id == batch.metric_set.id
        assert batch.rows.values.tolist() == [list(range(len(names)))]
        assert replay.metric_count == len(names)


async def test_shifted_times_end_now(stage: Stage) -> None:
    replay = stage.replay()
    await asyncio.wait_for(replay.run(stage.delivery), 10)
    assert len(stage.rows) == len(set(stage.rows)) == 3 * STEPS
    assert [row[0] for row in stage.rows] == sorted(row[0] for row in stage.rows)
    assert stage.rows[-1][0] == NOW_MS
    assert stage.rows[0][0] == NOW_MS - (LAST_S - FIRST_S) * 1000
    assert (replay.progress.rows, replay.progress.total_rows, replay.progress.bad_lines) == (150, 150, 1)


async def test_kept_times_stay(stage: Stage) -> None:
    await asyncio.wait_for(stage.replay(shift=False).run(stage.delivery), 10)
    assert {row[0] for row in stage.rows} == {(FIRST_S + STEP_S * step) * 1000 for step in range(STEPS)}


async def test_servers_are_described(stage: Stage) -> None:
    replay = stage.replay(speed=60.0)
    task = asyncio.create_task(replay.run(stage.delivery))
    await eventually(lambda: stage.writer.batches)
    descriptors = {server.server_id: server for batch in stage.writer.batches for server in batch.servers}
    assert set(descriptors) == {"vm-0", "vm-1", "vm-2"}
    assert descriptors["vm-1"].report_interval_ms == 5_000  # 300 s played 60 times faster
    assert (replay.server_count, replay.metric_count, replay.interval_s) == (3, 2, 5.0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("speed", "step_s"), [(1.0, 300.0), (30.0, 10.0)])
async def test_speed_is_kept(stage: Stage, speed: float, step_s: float) -> None:
    task = asyncio.create_task(stage.replay(speed=speed, shift=False).run(stage.delivery))
    for step in range(5):
        rows = 3 * (step + 1)
        await eventually(lambda rows=rows: stage.clock.sleepers == 1 and len(stage.rows) == rows)
        stage.clock.advance(step_s * 0.6)
        await asyncio.sleep(0.02)
        assert len(stage.rows) == 3 * (step + 1)
        stage.clock.advance(step_s * 0.4)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("blocks_before", [0, 2])
async def test_rows_that_cannot_be_fetched_once_are_fetched_at_the_next_start(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, blocks_before: int
) -> None:
    monkeypatch.setattr(recording_module, "MERGE_ROWS", 30)
    concatenate, fetches = np.concatenate, iter(range(1_000))

    def fails_once(parts: list[np.ndarray]) -> np.ndarray:
        if next(fetches) == blocks_before:
            raise MemoryError("no room for the rows")
        return concatenate(parts)

    monkeypatch.setattr(recording_module.np, "concatenate", fails_once)
    async with Simulator(stage.replay(shift=False), stage.writer, stage.clock, mode=Mode.REPLAY) as simulator:
        simulator.start()
        await eventually(lambda: not simulator.running)
        assert simulator.status().last_error == "no room for the rows"
        simulator.start()
        await eventually(lambda: not simulator.running)
        assert simulator.status().last_error == ""
    assert len(stage.rows) == len(set(stage.rows)) == 3 * STEPS
    assert [row[0] for row in stage.rows] == sorted(row[0] for row in stage.rows)


async def test_stopping_keeps_the_place(stage: Stage) -> None:
    replay = stage.replay(speed=300.0)
    for _ in range(4):
        task = asyncio.create_task(replay.run(stage.delivery))
        await eventually(lambda: stage.clock.sleepers == 1)
        stage.clock.advance(3.0)
        await eventually(lambda: stage.clock.sleepers == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        stage.clock.advance(1_000.0)  # time does not pass for a stopped recording
    assert 0 < len(stage.rows) < 3 * STEPS
    task = asyncio.create_task(replay.run(stage.delivery))

    def step() -> bool:
        stage.clock.advance(1.0)
        return task.done()

    await eventually(step)
    await task
    assert len(stage.rows) == len(set(stage.rows)) == 3 * STEPS


async def test_being_stopped_while_rows_are_fetched_loses_none(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "MERGE_ROWS", 3)  # fifty blocks, each fetched in a thread
    replay = stage.replay()
    stops = 0
    while True:
        task = asyncio.create_task(replay.run(stage.delivery))
        for _ in range(4 + stops % 5 + stops // 20):  # in the end long enough for any machine
            await asyncio.sleep(0)
        if not task.done():
            stops += 1
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            break
        await asyncio.sleep(0.001)
    assert stops > 20
    assert len(stage.rows) == len(set(stage.rows)) == 3 * STEPS


async def test_being_stopped_while_the_file_is_read_ends_the_reading(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "CHUNK_ROWS", 1)
    parse, parsed, go_on = RecordingReader._take, threading.Semaphore(0), threading.Event()

    def slow(*arguments: object) -> None:
        parsed.release()
        assert go_on.wait(10)
        parse(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RecordingReader, "_take", slow)
    replay = stage.replay()
    task = asyncio.create_task(replay.run(stage.delivery))
    assert await asyncio.to_thread(parsed.acquire, timeout=10)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert len(list(stage.folder.iterdir())) == 1  # of 150 chunks
    await replay.run(stage.delivery)
    assert len(stage.rows) == 3 * STEPS


async def test_an_outage_loses_no_row(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = stage.replay()
    monkeypatch.setattr(replay, "_batch_rows", 2)
    stage.writer.error = Unavailable("away")
    task = asyncio.create_task(replay.run(stage.delivery))
    await eventually(lambda: stage.delivery.waiting_ticks == 60)
    assert not task.done()
    stage.writer.error = None

    def step() -> bool:
        stage.clock.advance(5.0)
        return task.done()

    await eventually(step)
    await task
    assert len(stage.rows) == len(set(stage.rows)) == 3 * STEPS
    assert stage.delivery.counters.dropped_ticks == 0


async def test_the_status_counts_rows_once_they_are_acknowledged(stage: Stage) -> None:
    simulator = Simulator(stage.replay(), stage.writer, stage.clock, mode=Mode.REPLAY)
    stage.writer.error = Unavailable("away")
    async with simulator:
        simulator.start()
        await eventually(lambda: simulator.status().waiting_ticks == 1)
        assert (simulator.status().progress.rows, simulator.status().progress.total_rows) == (0, 150)
        stage.writer.error = None

        def ended() -> bool:
            stage.clock.advance(5.0)
            return not simulator.running

        await eventually(ended)
        status = simulator.status()
    assert (status.progress.rows, status.progress.bad_lines, status.mode) == (150, 1, Mode.REPLAY)


async def test_started_after_its_end_it_plays_again(stage: Stage) -> None:
    replay = stage.replay()
    await replay.run(stage.delivery)
    stage.clock.advance(60.0)
    await replay.run(stage.delivery)
    assert len(stage.rows) == 6 * STEPS
    assert stage.rows[-1][0] == NOW_MS + 60_000


async def test_a_file_that_went_bad_is_an_error_and_can_be_mended(stage: Stage) -> None:
    replay = stage.replay()
    good = stage.path.read_text()
    stage.path.write_text("time,server_id\n")
    with pytest.raises(InvalidArgument, match="no column of a metric"):
        await replay.run(stage.delivery)
    stage.path.write_text(good)
    await replay.run(stage.delivery)
    assert len(stage.rows) == 3 * STEPS
