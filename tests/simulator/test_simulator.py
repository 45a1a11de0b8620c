"""The whole simulator on a fake writer: commands, backlog, spans, and the service on a real gRPC server."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from openmanager.simulator.v1 import simulator_pb2 as pb
from openmanager.simulator.v1 import simulator_pb2_grpc
from runtime import telemetry
from runtime.channel import calling
from runtime.clock import ManualClock
from runtime.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from runtime.process import Process
from runtime.server import bind
from services.simulator.delivery import MAX_WAITING_TICKS, Delivery
from services.simulator.feed import Mode, Progress, TickFeed
from services.simulator.fleet import build_fleet
from services.simulator.host import HostSource
from services.simulator.servicer import SimulatorServicer
from services.simulator.settings import SimulatorSettings
from services.simulator.simulator import Simulator
from services.simulator.synthetic import SyntheticSource
from tests.harness import eventually
from tests.simulator.support import INTERVAL_MS, SEED, FakeWriter

START_MS = 1_760_000_003_700
FIRST_MS = 1_760_000_010_000


class Stage:
    """A simulator of five servers on a manual clock."""

    def __init__(self) -> None:
        self.clock = ManualClock(now_ms=START_MS)
        self.writer = FakeWriter()
        fleet = build_fleet(5, seed=SEED, interval_ms=INTERVAL_MS)
        self.source = SyntheticSource(fleet, seed=SEED, interval_ms=INTERVAL_MS)
        feed = TickFeed(self.source, self.clock, interval_ms=INTERVAL_MS)
        self.simulator = Simulator(feed, self.writer, self.clock, mode=Mode.SYNTHETIC, synthetic=self.source)

    async def tick(self, ticks: int = 1) -> None:
        """Lets intervals pass, each as soon as the simulator waits for it."""
        for _ in range(ticks):
            await eventually(lambda: self.clock.sleepers > 0)
            self.clock.advance(INTERVAL_MS / 1000.0)
            await asyncio.sleep(0)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    async with stage.simulator:
        yield stage


async def test_ticks_are_on_the_grid_and_whole(stage: Stage) -> None:
    stage.simulator.start()
    await stage.tick(5)
    await eventually(lambda: len(stage.writer.batches) == 5)
    assert stage.writer.times_ms == [FIRST_MS + INTERVAL_MS * number for number in range(5)]
    assert all(batch.rows.values.shape == (5, 511) for batch in stage.writer.batches)
    status = stage.simulator.status()
    assert (status.running, status.servers, status.metrics, status.interval_s) == (True, 5, 511, 10.0)
    assert status.counters.acknowledged_points == 5 * 5 * 511
    assert status.counters.last_tick_time_ms == FIRST_MS + 4 * INTERVAL_MS


class Lingering:
    """A feed that takes its time to end, and counts how many of it run."""

    server_count = metric_count = 0
    interval_s = 0.0
    progress = Progress()

    def __init__(self) -> None:
        self.running = 0
        self.may_end = asyncio.Event()
        self.ended: Callable[[], object] = lambda: None

    async def run(self, _delivery: Delivery) -> None:
        self.running += 1
        try:
            await asyncio.Event().wait()
        finally:
            await self.may_end.wait()
            self.running -= 1
            asyncio.get_running_loop().call_soon(self.ended)


@pytest.mark.parametrize("when", ["while it ends", "as it has ended"])
async def test_a_start_during_a_stop_is_neither_forgotten_nor_lost_sight_of(when: str) -> None:
    feed = Lingering()
    async with Simulator(feed, FakeWriter(), ManualClock(), mode=Mode.HOST) as simulator:
        simulator.start()
        await eventually(lambda: feed.running == 1)
        stopping = asyncio.create_task(simulator.stop())
        await asyncio.sleep(0)
        if when == "while it ends":
            simulator.start()
        else:
            feed.ended = simulator.start
        feed.may_end.set()
        await stopping
        feed.ended = lambda: None
        await eventually(lambda: feed.running == 1)
        assert simulator.running and simulator.status().running
        await simulator.stop()
        assert feed.running == 0 and not simulator.running


async def test_start_and_stop_are_harmless_when_repeated(stage: Stage) -> None:
    await stage.simulator.stop()
    assert not stage.simulator.running
    stage.simulator.start()
    stage.simulator.start()
    await stage.tick(2)
    await eventually(lambda: len(stage.writer.batches) == 2)
    await stage.simulator.stop()
    await stage.simulator.stop()
    stage.clock.advance(100.0)
    await asyncio.sleep(0.02)
    assert len(stage.writer.batches) == 2
    stage.simulator.start()
    await stage.tick()
    await eventually(lambda: len(stage.writer.batches) == 3)
    assert stage.writer.times_ms[-1] > FIRST_MS + 90_000  # what passed while stopped is not made up


async def test_a_short_outage_loses_nothing_even_when_stopped_meanwhile(stage: Stage) -> None:
    stage.simulator.start()
    await stage.tick(2)
    await eventually(lambda: len(stage.writer.batches) == 2)
    stage.writer.error = Unavailable("timeseries is away")
    await stage.tick(30)
    await eventually(lambda: stage.simulator.status().waiting_ticks == 30)
    assert stage.simulator.status().last_error == "timeseries is away"
    await stage.simulator.stop()
    stage.writer.error = None

    def delivered() -> bool:
        stage.clock.advance(5.0)
        return len(stage.writer.batches) == 32

    await eventually(delivered)
    assert stage.writer.times_ms == [FIRST_MS + INTERVAL_MS * number for number in range(32)]
    assert stage.simulator.status().counters.dropped_ticks == 0


async def test_a_long_pause_of_the_machine_is_caught_up_as_far_as_the_queue_goes(stage: Stage) -> None:
    stage.simulator.start()
    await eventually(lambda: stage.clock.sleepers == 1)
    stage.clock.advance(10.0 * (MAX_WAITING_TICKS + 100))
    status = stage.simulator.status
    await eventually(lambda: status().counters.acknowledged_ticks + status().counters.dropped_ticks == 160)
    assert stage.writer.times_ms[-1] == FIRST_MS + 159 * INTERVAL_MS
    assert stage.writer.times_ms == sorted(set(stage.writer.times_ms))
    assert status().counters.dropped_ticks >= 99


async def test_a_scenario_is_played_and_told_until_its_end(stage: Stage) -> None:
    stage.simulator.start()
    injection = stage.simulator.inject("db-01", "outage", 20.0)
    assert stage.simulator.status().injections == (injection,)
    await stage.tick(4)
    await eventually(lambda: len(stage.writer.batches) == 4)
    sizes = [len(batch.rows.server_ids) for batch in stage.writer.batches]
    assert sizes == [4, 4, 5, 5]
    assert stage.simulator.status().injections == ()


async def test_the_other_modes_play_no_scenarios() -> None:
    clock = ManualClock()
    feed = TickFeed(HostSource(interval_ms=1_000), clock, interval_ms=1_000)
    async with Simulator(feed, FakeWriter(), clock, mode=Mode.HOST) as simulator:
        with pytest.raises(FailedPrecondition, match="synthetic only") as caught:
            simulator.inject("x", "outage", 10.0)
        assert caught.value.reason == "SCENARIOS_NEED_SYNTHETIC"
        with pytest.raises(FailedPrecondition):
            simulator.clear()


async def test_a_feed_that_fails_is_told(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    class BrokenFeed(TickFeed):
        async def run(self, delivery: object) -> None:
            raise InvalidArgument("the column 'time' is missing", field="SIMULATOR_REPLAY_FILE")

    feed = BrokenFeed(stage.source, stage.clock, interval_ms=INTERVAL_MS)
    async with Simulator(feed, stage.writer, stage.clock, mode=Mode.REPLAY) as simulator:
        simulator.start()
        await eventually(lambda: not simulator.running)
        assert simulator.status().last_error == "SIMULATOR_REPLAY_FILE: the column 'time' is missing"
        assert simulator.status().last_error_time_ms == START_MS
    assert "the simulator stopped" in caplog.text


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    spans = InMemorySpanExporter()
    telemetry.configure("simulator-test", exporter=spans)
    yield spans
    telemetry.shutdown()


async def test_each_tick_is_one_span_around_its_writing(stage: Stage, exporter: InMemorySpanExporter) -> None:
    inner = telemetry.tracer("test")
    write = stage.writer.write

    async def traced(batch: object) -> object:
        with inner.start_as_current_span("write"):
            return await write(batch)  # type: ignore[arg-type]

    stage.writer.write = traced  # type: ignore[method-assign,assignment]
    stage.simulator.start()
    await stage.tick(2)
    await eventually(lambda: sum(span.name == "simulator.tick" for span in exporter.get_finished_spans()) == 2)
    spans = {span.context.span_id: span for span in exporter.get_finished_spans() if span.context is not None}
    writes = [span for span in spans.values() if span.name == "write"]
    assert len(writes) == 2
    parents = [spans[span.parent.span_id] for span in writes if span.parent is not None]
    assert [parent.name for parent in parents] == ["simulator.tick"] * 2
    assert len({parent.context.span_id for parent in parents if parent.context is not None}) == 2


@pytest.fixture
async def stub(stage: Stage, tmp_path: Path) -> AsyncIterator[simulator_pb2_grpc.SimulatorControlServiceStub]:
    settings = SimulatorSettings.load({"DATA_DIR": str(tmp_path), "SIMULATOR_ADDRESS": "127.0.0.1:0"})
    process = Process("simulator", settings, secret="a secret of the tests")
    service = bind(pb.DESCRIPTOR.services_by_name["SimulatorControlService"], SimulatorServicer(stage.simulator))
    assert service.missing == ()
    serving = asyncio.create_task(process.serve_grpc(settings.simulator_address, [service]))
    await eventually(lambda: process.bound_addresses)
    async with process.open_channel(process.bound_addresses["SIMULATOR_ADDRESS"]) as channel:
        yield simulator_pb2_grpc.SimulatorControlServiceStub(channel.grpc)
    process.stopping.set()
    await serving


async def test_control_over_the_wire(stage: Stage, stub: simulator_pb2_grpc.SimulatorControlServiceStub) -> None:
    started = await stub.StartSending(pb.StartSendingRequest())
    assert started.status.running
    assert started.status.mode == pb.SIMULATOR_MODE_SYNTHETIC
    played = await stub.StartScenario(
        pb.StartScenarioRequest(name="cpu-spike", server_id="web-01", duration=Duration(seconds=90))
    )
    assert played.scenario.end_time.ToMilliseconds() - played.scenario.start_time.ToMilliseconds() == 90_000
    by_default = await stub.StartScenario(pb.StartScenarioRequest(name="disk-fill", server_id="db-01"))
    assert by_default.scenario.end_time.seconds - by_default.scenario.start_time.seconds == 300
    await stage.tick(2)
    await eventually(lambda: len(stage.writer.batches) == 2)
    status = (await stub.GetStatus(pb.GetStatusRequest())).status
    assert [scenario.name for scenario in status.scenarios] == ["cpu-spike", "disk-fill"]
    assert (status.servers, status.metrics, status.interval.seconds) == (5, 511, 10)
    assert (status.acknowledged_ticks, status.acknowledged_points) == (2, 2 * 5 * 511)
    assert status.last_tick_time.ToMilliseconds() == FIRST_MS + INTERVAL_MS
    assert not status.HasField("last_error_time")
    assert (await stub.StopScenarios(pb.StopScenariosRequest(server_id="web-01"))).stopped == 1
    assert (await stub.StopScenarios(pb.StopScenariosRequest())).stopped == 1
    assert not (await stub.StopSending(pb.StopSendingRequest())).status.running


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (pb.StartScenarioRequest(name="flood", server_id="web-01"), InvalidArgument, "name"),
        (pb.StartScenarioRequest(name="outage", server_id="web-77"), NotFound, "server_id"),
        (
            pb.StartScenarioRequest(name="outage", server_id="web-01", duration=Duration(seconds=0)),
            InvalidArgument,
            "duration",
        ),
    ],
)
async def test_bad_requests_name_their_field_over_the_wire(
    stub: simulator_pb2_grpc.SimulatorControlServiceStub,
    request_: pb.StartScenarioRequest,
    error: type[NotFound],
    field: str,
) -> None:
    with pytest.raises(error) as caught:
        async with calling("simulator"):
            await stub.StartScenario(request_)
    assert caught.value.field == field


async def _run(environment: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.simulator",
        env=os.environ | environment,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_process_starts_without_any_store_and_stops_cleanly(tmp_path: Path) -> None:
    environment = {"DATA_DIR": str(tmp_path), "SIMULATOR_ADDRESS": "127.0.0.1:0", "TIMESERIES_TARGET": "127.0.0.1:9"}
    process = await _run(environment)
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while b"listens on" not in (line := await process.stderr.readline()):
            assert line, "it ended"
        process.send_signal(signal.SIGTERM)
        rest = await process.stderr.read()
        assert await process.wait() == 0, rest.decode()


async def test_a_wrong_recording_is_one_line(tmp_path: Path) -> None:
    recording = tmp_path / "recording.csv"
    recording.write_text("when,server_id,cpu_usage\n")
    environment = {"DATA_DIR": str(tmp_path), "SIMULATOR_MODE": "replay", "SIMULATOR_REPLAY_FILE": str(recording)}
    process = await _run(environment | {"SIMULATOR_ADDRESS": "127.0.0.1:0"})
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert "the column 'time' is missing" in said.decode()
    assert "Traceback" not in said.decode()
