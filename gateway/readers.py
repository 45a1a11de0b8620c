"""Whichever timeseries replica answers: each can answer every question, so one that is away costs a question nothing
but, once, the time to find out.

What must stay true: an answer comes from one replica; one that breaks off in the middle is an error, and not gone on
with by another, which may be elsewhere in it.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, nullcontext
from typing import Any, TypeVar

from openmanager.timeseries.v1 import timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.circuit import Circuit, CircuitState
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")


class Readers:
    """Asks the replicas of timeseries."""

    def __init__(self, timeseries: Sequence[Channel], clock: Clock) -> None:
        """Takes a channel to each replica, at least one. A single one is always asked, also while it is away."""
        self._replicas = [
            (
                timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc),
                Circuit(f"timeseries replica {channel.target}", clock) if len(timeseries) > 1 else None,
            )
            for channel in timeseries
        ]

    async def stream(self, ask: Callable[[Any], AsyncIterator[T]]) -> AsyncGenerator[T, None]:
        """The messages of the first replica that answers; `ask` calls a method of its stub.

        Raises:
            Unavailable, DeadlineExceeded: none does.
        """
        in_turn = sorted(self._replicas, key=lambda replica: replica[1] is not None and _is_away(replica[1]))
        for left, (stub, circuit) in zip(range(len(in_turn) - 1, -1, -1), in_turn, strict=True):
            began = False
            try:
                with nullcontext() if circuit is None else circuit.attempt():
                    async with calling("timeseries"):
                        async for message in ask(stub):
                            began = True
                            yield message
            except (Unavailable, DeadlineExceeded):
                if began or not left:
                    raise
            else:
                return

    async def call(self, ask: Callable[[Any], Awaitable[T]]) -> T:
        """The same for a method with one answer."""

        async def once(stub: Any) -> AsyncIterator[T]:
            yield await ask(stub)

        async with aclosing(self.stream(once)) as answers:
            return await anext(answers)


def _is_away(circuit: Circuit) -> bool:
    return circuit.state is CircuitState.OPEN
