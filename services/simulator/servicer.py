"""openmanager.simulator.v1.SimulatorControlService: decodes, calls the core, encodes."""

from openmanager.simulator.v1 import simulator_pb2 as pb
from services.simulator.feed import Mode
from services.simulator.scenarios import Injection
from services.simulator.simulator import DEFAULT_SCENARIO_S, Simulator, Status

_MODES = {
    Mode.SYNTHETIC: pb.SIMULATOR_MODE_SYNTHETIC,
    Mode.REPLAY: pb.SIMULATOR_MODE_REPLAY,
    Mode.HOST: pb.SIMULATOR_MODE_HOST,
}


class SimulatorServicer:
    """The service on one Simulator."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    async def StartSending(self, _request: pb.StartSendingRequest, _context: object) -> pb.StartSendingResponse:
        """Starts sending."""
        self._simulator.start()
        return pb.StartSendingResponse(status=_status(self._simulator.status()))

    async def StopSending(self, _request: pb.StopSendingRequest, _context: object) -> pb.StopSendingResponse:
        """Stops sending."""
        await self._simulator.stop()
        return pb.StopSendingResponse(status=_status(self._simulator.status()))

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: object) -> pb.GetStatusResponse:
        """What it does and how well."""
        return pb.GetStatusResponse(status=_status(self._simulator.status()))

    async def StartScenario(self, request: pb.StartScenarioRequest, _context: object) -> pb.StartScenarioResponse:
        """Plays a scenario on one server for a while."""
        duration = request.duration
        duration_s = duration.seconds + duration.nanos / 1e9 if request.HasField("duration") else DEFAULT_SCENARIO_S
        injection = self._simulator.inject(request.server_id, request.name, duration_s)
        return pb.StartScenarioResponse(scenario=_scenario(injection))

    async def StopScenarios(self, request: pb.StopScenariosRequest, _context: object) -> pb.StopScenariosResponse:
        """Ends scenarios early."""
        ended = self._simulator.clear(request.server_id, request.name)
        return pb.StopScenariosResponse(stopped=len(ended))


def _scenario(injection: Injection) -> pb.Scenario:
    message = pb.Scenario(name=injection.kind.value, server_id=injection.server_id)
    message.start_time.FromMilliseconds(injection.start_ms)
    message.end_time.FromMilliseconds(injection.end_ms)
    return message


def _status(status: Status) -> pb.SimulatorStatus:
    counters = status.counters
    message = pb.SimulatorStatus(
        mode=_MODES[status.mode],
        running=status.running,
        servers=status.servers,
        metrics=status.metrics,
        acknowledged_ticks=counters.acknowledged_ticks,
        acknowledged_points=counters.acknowledged_points,
        waiting_ticks=status.waiting_ticks,
        dropped_ticks=counters.dropped_ticks,
        last_error=status.last_error,
        scenarios=[_scenario(injection) for injection in status.injections],
        replayed_rows=status.progress.rows,
        replay_total_rows=status.progress.total_rows,
        replay_bad_lines=status.progress.bad_lines,
        rejected_points=counters.rejected_points,
        refused_batches=counters.refused_batches,
    )
    message.interval.FromMilliseconds(round(status.interval_s * 1000.0))
    if status.last_error_time_ms:
        message.last_error_time.FromMilliseconds(status.last_error_time_ms)
    if counters.last_tick_time_ms:
        message.last_tick_time.FromMilliseconds(counters.last_tick_time_ms)
    return message
