"""Processes full of WatchFleet subscribers, each with a connection of its own, that tell when they have a tick.

What must stay true: a subscriber has a tick when the newest it was told of each server is of the tick's time or later;
times are of the clock that all processes of a machine share; they subscribe no faster than they are taken in; what
readers cost is small beside the gateway's part, so equal messages are decoded once.
"""

import select
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, Final

from bench.api.child import Child, child
from bench.api.http2 import Connection, Messages, header_block
from bench.api.product import BEARER
from bench.peers import BenchError
from fleet.codec import ms_from_timestamp
from openmanager.gateway.v1 import fleet_pb2

WATCH: Final = "/openmanager.gateway.v1.FleetService/WatchFleet"
PROCESSES: Final = 2
SUBSCRIBED_BOUND_S: Final = 120.0
TICK_BOUND_S: Final = 60.0
DECODED_KEPT: Final = 1_000
SUBSCRIBING: Final = 100
"""At once in a process: of calls that wait to be begun, gRPC cancels some from 1,000 on, and this is no row of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """When subscribers of one process had a tick, by time.monotonic(): the median one, and the last."""

    subscribers: int
    median_s: float
    last_s: float


class Subscribers:
    """All of them, from here."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children

    def expect(self, time_ms: int) -> None:
        """Tells them which tick is next; returns once all know, and have the whole fleet."""
        for one in self._children:
            one.tell(time_ms)
        for one in self._children:
            one.hear(SUBSCRIBED_BOUND_S)

    def arrivals(self) -> list[Arrival]:
        """Once all have the tick that was expected.

        Raises:
            BenchError: some do not have it within TICK_BOUND_S, or a stream broke.
        """
        return [one.hear(TICK_BOUND_S) for one in self._children]


@contextmanager
def subscribed(address: str, count: int, servers: int) -> Iterator[Subscribers]:
    """So many subscribers of a gateway that knows so many servers; each has the whole fleet when the block begins."""
    shares = [count // PROCESSES + (number < count % PROCESSES) for number in range(PROCESSES)]
    with ExitStack() as stack:
        children = [stack.enter_context(child(_watching, address, share, servers)) for share in shares if share]
        for one in children:
            one.hear(SUBSCRIBED_BOUND_S)
        yield Subscribers(children)


class _Subscriber:
    """One stream and what it has told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.messages = Messages()
        self.observed: dict[str, int] = {}

    def has(self, servers: int, time_ms: int) -> bool:
        return len(self.observed) >= servers and min(self.observed.values()) >= time_ms


class _Watching:
    def __init__(self, parent: "Pipe[Any, Any]", address: str, count: int, servers: int) -> None:
        self._parent = parent
        self._servers = servers
        self._poll = select.epoll()
        self._by_descriptor: dict[int, _Subscriber] = {}
        self._decoded: dict[bytes, dict[str, int]] = {}
        request = fleet_pb2.WatchFleetRequest(view=fleet_pb2.SERVER_VIEW_BASIC).SerializeToString()
        headers = header_block(address, WATCH, dict(BEARER))
        waiting: set[int] = set()
        for _ in range(count):
            subscriber = _Subscriber(Connection(address))
            descriptor = subscriber.connection.fileno()
            self._by_descriptor[descriptor] = subscriber
            self._poll.register(descriptor, select.EPOLLIN)
            subscriber.connection.call(headers, request)
            waiting.add(descriptor)
            while len(waiting) >= SUBSCRIBING:
                waiting.difference_update(self._read(0.2))
            waiting.difference_update(self._read(0.0))
        self._poll.register(parent.fileno(), select.EPOLLIN)

    def until_all_have(self, time_ms: int, bound_s: float) -> list[float]:
        """Reads until every subscriber has the tick; when each had it."""
        had = {fd: time.monotonic() for fd, one in self._by_descriptor.items() if one.has(self._servers, time_ms)}
        ends_s = time.monotonic() + bound_s
        while len(had) < len(self._by_descriptor):
            if time.monotonic() > ends_s:
                raise BenchError(f"{len(self._by_descriptor) - len(had)} subscribers do not have the tick")
            for descriptor in self._read(0.2):
                if descriptor not in had and self._by_descriptor[descriptor].has(self._servers, time_ms):
                    had[descriptor] = time.monotonic()
        return sorted(had.values())

    def wait_for_parent(self) -> None:
        """Reads until the parent says something."""
        while not self._parent.poll():
            self._read(0.2)

    def _read(self, wait_s: float) -> list[int]:
        """Reads what is there; the descriptors that told something."""
        told = []
        for descriptor, _ in self._poll.poll(wait_s):
            subscriber = self._by_descriptor.get(descriptor)
            if subscriber is None:
                continue  # the parent
            for event in subscriber.connection.receive():
                if event.ended:
                    raise BenchError(f"a stream ended: {event.fault or 'OK'}")
                for message in subscriber.messages.add(event.data):
                    subscriber.observed.update(self._observed(message))
                    told.append(descriptor)
        return told

    def _observed(self, message: bytes) -> dict[str, int]:
        found = self._decoded.get(message)
        if found is None:
            decoded = fleet_pb2.WatchFleetResponse.FromString(message)
            found = {server.id: ms_from_timestamp(server.observed_time) for server in decoded.servers}
            if len(self._decoded) >= DECODED_KEPT:
                self._decoded.clear()
            self._decoded[message] = found
        return found


def _watching(parent: "Pipe[Any, Any]", address: str, count: int, servers: int) -> None:
    watching = _Watching(parent, address, count, servers)
    watching.until_all_have(0, SUBSCRIBED_BOUND_S)
    parent.send("subscribed")
    while True:
        watching.wait_for_parent()
        try:
            time_ms: int = parent.recv()
        except EOFError:
            return
        parent.send("expecting")
        had = watching.until_all_have(time_ms, TICK_BOUND_S / 2)
        parent.send(Arrival(subscribers=len(had), median_s=had[len(had) // 2], last_s=had[-1]))
