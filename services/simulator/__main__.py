"""Starts the simulator: `python -m services.simulator`."""

from fleet.writer import FleetWriter
from openmanager.simulator.v1 import simulator_pb2
from runtime.errors import InvalidArgument
from runtime.folder import CannotStartError
from runtime.process import Process, run_process, takes_no_arguments
from runtime.server import bind
from services.simulator.feed import Feed, Mode, TickFeed
from services.simulator.fleet import build_fleet
from services.simulator.host import HostSource
from services.simulator.recording import read_header
from services.simulator.replay import Replay
from services.simulator.servicer import SimulatorServicer
from services.simulator.settings import SimulatorSettings
from services.simulator.simulator import Simulator
from services.simulator.synthetic import SyntheticSource


def _feed(settings: SimulatorSettings, process: Process[SimulatorSettings]) -> tuple[Feed, SyntheticSource | None]:
    interval_ms, seed = settings.interval_ms, settings.simulator_seed
    if settings.simulator_mode == "host":
        return TickFeed(HostSource(interval_ms=interval_ms), process.clock, interval_ms=interval_ms), None
    if settings.simulator_mode == "replay":
        path = settings.simulator_replay_file
        assert path is not None  # settings.problems sees to it
        try:
            header = read_header(path)
        except InvalidArgument as error:
            raise CannotStartError(str(error)) from error
        shift, speed = settings.simulator_replay_times == "shift", settings.replay_speed
        return Replay(path, process.folder / "replay", header, process.clock, speed=speed, shift=shift), None
    servers = build_fleet(settings.simulator_servers, seed=seed, interval_ms=interval_ms)
    source = SyntheticSource(servers, seed=seed, interval_ms=interval_ms)
    return TickFeed(source, process.clock, interval_ms=interval_ms), source


async def serve(settings: SimulatorSettings, process: Process[SimulatorSettings]) -> None:
    """Runs until the process is told to stop."""
    feed, synthetic = _feed(settings, process)
    async with (
        process.open_channels(settings.timeseries_targets) as timeseries,
        process.open_channel(settings.cache_target) as cache,
        process.open_channel(settings.metadata_target) as metadata,
        FleetWriter(timeseries=timeseries, cache=cache, metadata=metadata, clock=process.clock) as writer,
        Simulator(feed, writer, process.clock, mode=Mode(settings.simulator_mode), synthetic=synthetic) as simulator,
    ):
        simulator.start()
        service = bind(
            simulator_pb2.DESCRIPTOR.services_by_name["SimulatorControlService"], SimulatorServicer(simulator)
        )
        await process.serve_grpc(settings.simulator_address, [service], address_setting="SIMULATOR_ADDRESS")


if __name__ == "__main__":
    takes_no_arguments(
        "services.simulator", "Writes what a fleet reports: one that is made up, a recording, or this machine."
    )
    run_process("simulator", SimulatorSettings, serve)
