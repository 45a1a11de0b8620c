"""Services that are answered elsewhere: the gateway is only their public name.

A public request and the inner one have the same fields under the same numbers, and so have the responses, so passing
on is a copy of bytes. A test walks both descriptors and fails when they drift apart.

What must stay true: a field that only the inner request has is the gateway's to set. To the public request it is an
unknown one, which a caller may send all the same.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import Message

from openmanager.gateway.v1 import simulator_pb2 as public_simulator_pb2
from openmanager.simulator.v1 import simulator_pb2, simulator_pb2_grpc
from runtime.channel import Channel, calling

Inner = TypeVar("Inner", bound=Message)
Outer = TypeVar("Outer", bound=Message)


def inner_of(request: Message, inner: type[Inner]) -> Inner:
    """What both messages have, of a request that came from outside."""
    request.DiscardUnknownFields()
    made = inner.FromString(request.SerializeToString())
    made.DiscardUnknownFields()
    return made


async def pass_on(
    owner: str, call: Callable[[Inner], Awaitable[Message]], inner: type[Inner], outer: type[Outer], request: Message
) -> Outer:
    """Calls ``owner`` with the request as an ``inner`` message and returns its answer as an ``outer`` one."""
    async with calling(owner):
        response = await call(inner_of(request, inner))
    return outer.FromString(response.SerializeToString())


class SimulatorServicer:
    """Answers ``openmanager.gateway.v1.SimulatorService`` by the simulator."""

    def __init__(self, simulator: Channel) -> None:
        self._stub = simulator_pb2_grpc.SimulatorControlServiceStub(simulator.grpc)

    async def GetSimulator(
        self, request: public_simulator_pb2.GetSimulatorRequest, _context: object
    ) -> public_simulator_pb2.GetSimulatorResponse:
        """Returns what it does."""
        inner, outer = simulator_pb2.GetStatusRequest, public_simulator_pb2.GetSimulatorResponse
        return await pass_on("simulator", self._stub.GetStatus, inner, outer, request)

    async def StartSimulator(
        self, request: public_simulator_pb2.StartSimulatorRequest, _context: object
    ) -> public_simulator_pb2.StartSimulatorResponse:
        """Starts sending."""
        inner, outer = simulator_pb2.StartSendingRequest, public_simulator_pb2.StartSimulatorResponse
        return await pass_on("simulator", self._stub.StartSending, inner, outer, request)

    async def StopSimulator(
        self, request: public_simulator_pb2.StopSimulatorRequest, _context: object
    ) -> public_simulator_pb2.StopSimulatorResponse:
        """Stops sending."""
        inner, outer = simulator_pb2.StopSendingRequest, public_simulator_pb2.StopSimulatorResponse
        return await pass_on("simulator", self._stub.StopSending, inner, outer, request)

    async def InjectScenario(
        self, request: public_simulator_pb2.InjectScenarioRequest, _context: object
    ) -> public_simulator_pb2.InjectScenarioResponse:
        """Plays a scenario."""
        inner, outer = simulator_pb2.StartScenarioRequest, public_simulator_pb2.InjectScenarioResponse
        return await pass_on("simulator", self._stub.StartScenario, inner, outer, request)

    async def ClearScenarios(
        self, request: public_simulator_pb2.ClearScenariosRequest, _context: object
    ) -> public_simulator_pb2.ClearScenariosResponse:
        """Ends scenarios."""
        inner, outer = simulator_pb2.StopScenariosRequest, public_simulator_pb2.ClearScenariosResponse
        return await pass_on("simulator", self._stub.StopScenarios, inner, outer, request)
