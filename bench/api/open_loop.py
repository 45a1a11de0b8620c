"""Clients that ask once a second, come what may: each call has its time, and its latency counts from that time.

So a call that had to be sent late, or waited behind others, is as slow as its user finds it (no coordinated omission).
Clients have a connection each and a phase each, drawn from a seed: 500 of them make a call every 2 ms on average, not
500 at each full second.

Why not ghz: it counts from the moment of sending, and its Go client decodes each reply into a message of its own. Why
not a Python client of gRPC: see `bench.api.http2`. What this one costs is measured with it: how late calls were sent,
and the processor time.
"""

import gc
import random
import select
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.api.child import child
from bench.api.generators import FRAME_HEAD
from bench.api.http2 import Connection, header_block
from bench.peers import BenchError

SEED: Final = 7
ANSWER_BOUND_S: Final = 15.0
"""After the last call's time; calls not answered by then void the run."""
START_BOUND_S: Final = 60.0
START_AFTER_S: Final = 0.5
SWITCH_INTERVAL_S: Final = 0.000_2
"""The thread that sends gets the interpreter at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked.

    Attributes:
        address: host:port.
        path: /package.Service/Method.
        metadata: beside gRPC's own headers.
        messages: serialized requests; client i always asks `messages[i % len]`.
        clients: how many, with a connection each.
        seconds: how long each asks, after its first call.
        interval_s: from one call of a client to its next.
        reply_bytes: the least that a right reply has, serialized.
    """

    address: str
    path: str
    metadata: tuple[tuple[str, str], ...]
    messages: tuple[bytes, ...]
    clients: int
    seconds: float
    interval_s: float
    reply_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What came of it; each call was answered rightly.

    Attributes:
        made: calls in all, with the first of each client, which pays for a new connection and is not counted further.
        latencies_ms: of the others, from their time to the answer.
        late_ms: how long after their time they were sent.
        cpu_s: what the generator used.
    """

    made: int
    latencies_ms: NDArray[np.float64]
    late_ms: NDArray[np.float64]
    cpu_s: float

    def summary(self) -> dict[str, float]:
        """For the report."""
        return {
            "calls": self.made,
            "p50_ms": float(np.percentile(self.latencies_ms, 50)),
            "p99_ms": float(np.percentile(self.latencies_ms, 99)),
            "max_ms": float(self.latencies_ms.max()),
            "sent_late_p50_ms": float(np.percentile(self.late_ms, 50)),
            "sent_late_p99_ms": float(np.percentile(self.late_ms, 99)),
            "generator_cpu_us_a_call": self.cpu_s * 1e6 / self.made,
        }


def offer(load: Load) -> Offered:
    """Runs the load in a process of its own.

    Raises:
        BenchError: a call failed, was not answered, or was answered with too little.
    """
    with child(_offering, load) as generator:
        found: Offered = generator.hear(START_BOUND_S + load.seconds + ANSWER_BOUND_S)
        return found


def _offering(parent: "Pipe[Any, Any]", load: Load) -> None:
    parent.send(_Run(load).run())


class _Run:
    def __init__(self, load: Load) -> None:
        self._load = load
        self._headers = header_block(load.address, load.path, dict(load.metadata))
        self._connections = [Connection(load.address) for _ in range(load.clients)]
        self._waiting: dict[tuple[int, int], int] = {}  # (descriptor, stream) -> number of the call
        self._send_failure: Exception | None = None
        phases = random.Random(SEED)
        offsets = [phases.random() * load.interval_s for _ in range(load.clients)]
        each = 1 + max(1, round(load.seconds / load.interval_s))
        self._calls = sorted(
            (offset + number * load.interval_s, client)
            for client, offset in enumerate(offsets)
            for number in range(each)
        )
        self._sent_s = [0.0] * len(self._calls)
        self._done_s = [0.0] * len(self._calls)
        self._sizes = [0] * len(self._calls)

    def run(self) -> Offered:
        gc.disable()  # what is made here lives for seconds
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        started_cpu_s = time.process_time()
        started_s = time.monotonic() + START_AFTER_S
        sender = threading.Thread(target=self._send, args=(started_s,), name="bench-sending", daemon=True)
        sender.start()
        self._receive(started_s + self._calls[-1][0] + ANSWER_BOUND_S)
        cpu_s = time.process_time() - started_cpu_s
        for connection in self._connections:
            connection.close()
        due_s = np.array([due for due, _ in self._calls]) + started_s
        counted = slice(self._load.clients, None)  # each client's first call is in the first interval
        return Offered(
            made=len(due_s),
            latencies_ms=((np.array(self._done_s) - due_s) * 1e3)[counted],
            late_ms=((np.array(self._sent_s) - due_s) * 1e3)[counted],
            cpu_s=cpu_s,
        )

    def _send(self, started_s: float) -> None:
        messages = self._load.messages
        try:
            for number, (due, client) in enumerate(self._calls):
                while (left_s := started_s + due - time.monotonic()) > 0:
                    time.sleep(left_s)
                connection = self._connections[client]
                self._waiting[connection.fileno(), connection.next_stream] = number
                self._sent_s[number] = time.monotonic()
                connection.call(self._headers, messages[client % len(messages)])
        except Exception as error:  # raised by the thread that receives
            self._send_failure = error

    def _receive(self, until_s: float) -> None:
        by_descriptor = {connection.fileno(): connection for connection in self._connections}
        poll = select.epoll()
        for descriptor in by_descriptor:
            poll.register(descriptor, select.EPOLLIN)
        left = len(self._calls)
        while left:
            if self._send_failure is not None:
                raise self._send_failure
            if time.monotonic() > until_s:
                raise BenchError(f"{left} of {len(self._calls)} calls were not answered within {ANSWER_BOUND_S:g} s")
            for descriptor, _ in poll.poll(0.2):
                events = by_descriptor[descriptor].receive()
                now_s = time.monotonic()
                for event in events:
                    number = self._waiting[descriptor, event.stream]
                    self._sizes[number] += len(event.data)
                    if event.ended:
                        self._end(number, event.fault, now_s)
                        left -= 1
        poll.close()

    def _end(self, number: int, fault: str, now_s: float) -> None:
        size = self._sizes[number] - FRAME_HEAD
        if fault or size < self._load.reply_bytes:
            raise BenchError(
                f"call {number}: {fault or f'a reply of {size} instead of {self._load.reply_bytes} bytes'}"
            )
        self._done_s[number] = now_s
