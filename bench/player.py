"""A process of its own that plays a fleet: makes ticks, sends them, and tells all along how far it is.

As `bench.ingest.Sender` it is apart from the server, but makes values while it sends, so that its memory is that of
two ticks (164 MB for 20,000 servers) however long it plays. What must stay true: a tick is sent in requests of at most
`ROWS_LIMIT` rows, at most `IN_FLIGHT` of which wait; what is refused or not answered is sent again until it is
acknowledged or the play is over, and is never counted twice; a tick that is due is never left out.
"""

import asyncio
import contextlib
import multiprocessing
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

import grpc
import grpc.aio
import numpy as np
import uvloop

from bench.ingest import APPEND, IN_FLIGHT
from bench.load import INTERVAL_MS, Floats, Mix
from bench.peers import BenchError
from openmanager.timeseries.v1 import timeseries_pb2
from runtime import tasks

ROWS_LIMIT: Final = 500
CALL_BOUND_S: Final = 60.0
RETRY_S: Final = 0.5
END_BOUND_S: Final = 3 * CALL_BOUND_S
REPORT_INTERVAL_S: Final = 0.2

_SENT_AGAIN: Final = frozenset(
    {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """What is played.

    Attributes:
        start_ms: time of tick 0; the others follow `INTERVAL_MS` apart, whatever the wall clock.
        ticks: at most so many.
        seconds: at most so long; a tick that is being sent then is left where it is.
        pace_s: from one tick to the next by the wall clock; 0: as fast as they are taken.
    """

    servers: int
    start_ms: int
    ticks: int
    seconds: float
    pace_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Report:
    """How far the player is. Points are those of acknowledged requests.

    Attributes:
        seconds: since the first tick was due.
        due_points: of the ticks whose time has come; without a pace those that were begun.
        late_s: how long after its time the last whole tick was acknowledged.
        sent_again: requests that were refused or not answered in time, by status.
        rows: acknowledged rows of each run of `ROWS_LIMIT` servers.
        unsure: requests that were given up: they may or may not be stored.
        ended: nothing follows.
    """

    seconds: float = 0.0
    ticks: int = 0
    points: int = 0
    due_points: int = 0
    late_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    sent_again: dict[str, int] = field(default_factory=dict)
    last_error: str = ""
    rows: list[int] = field(default_factory=list)
    unsure: int = 0
    ended: bool = False


class Player:
    """The other process, from here."""

    def __init__(self, connection: "Connection[Any, Any]", process: Any) -> None:
        self._connection = connection
        self._process = process
        self.last = Report()

    def poll(self, seconds: float) -> Report:
        """The newest report, after waiting up to so long for one."""
        ends = time.monotonic() + seconds
        while not self.last.ended and self._connection.poll(max(0.0, ends - time.monotonic())):
            try:
                found = self._connection.recv()
            except EOFError:
                raise BenchError("the player ended without a word") from None
            if isinstance(found, str):
                raise BenchError(f"the player failed: {found}")
            self.last = found
        return self.last

    def end(self) -> Report:
        """The last report; ends a play that still goes on."""
        if not self.last.ended:
            with contextlib.suppress(BrokenPipeError):
                self._connection.send("end")
        ends = time.monotonic() + END_BOUND_S
        while not self.poll(1.0).ended:
            if time.monotonic() > ends:
                raise BenchError("the player does not end")
        return self.last

    def wait(self) -> Report:
        """The last report, once it ends by itself."""
        while not self.poll(1.0).ended:
            pass
        return self.last


@contextmanager
def player(play: Play, address: str, secret: str) -> Iterator[Player]:
    """Plays to a timeseries process until it is done or the block is left."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(play, address, secret, there), daemon=True)
    process.start()
    there.close()
    try:
        yield Player(here, process)
    finally:
        process.terminate()
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()
        here.close()


def _main(play: Play, address: str, secret: str, told: "Connection[Any, Any]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Playing(play, told).run(address, secret))
    except Exception as error:
        cause = error
        while isinstance(cause, ExceptionGroup):  # the first of a tick's requests; the others were cancelled
            cause = cause.exceptions[0]
        told.send(f"{type(cause).__name__}: {cause}")


class _Playing:
    def __init__(self, play: Play, told: "Connection[Any, Any]") -> None:
        self._play = play
        self._told = told
        self._mix = Mix(play.servers, start_ms=play.start_ms)
        self._slices = [slice(at, at + ROWS_LIMIT) for at in range(0, play.servers, ROWS_LIMIT)]
        self._report = Report(rows=[0] * len(self._slices))
        self._over = asyncio.Event()
        self._started = 0.0

    async def run(self, address: str, secret: str) -> None:
        metadata = (("authorization", f"Bearer {secret}"),)
        async with grpc.aio.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            method: Any = channel.unary_unary(APPEND, None, timeseries_pb2.AppendResponse.FromString)

            async def call(request: bytes) -> Any:
                return await method(request, metadata=metadata, timeout=CALL_BOUND_S)

            await call(self._mix.register())
            loop = asyncio.get_running_loop()
            loop.add_reader(self._told.fileno(), self._end)
            self._started = time.monotonic()
            loop.call_later(self._play.seconds, self._over.set)
            async with tasks.beside("bench-telling", self._telling()):
                await self._ticks(call)
            loop.remove_reader(self._told.fileno())
        self._tell(ended=True)

    async def _telling(self) -> None:
        """A tick that is stuck is told of too."""
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._tell()

    def _end(self) -> None:
        """The parent has said so, or is gone."""
        asyncio.get_running_loop().remove_reader(self._told.fileno())
        self._over.set()

    async def _ticks(self, call: Any) -> None:
        """One tick after the other; the next one's values are made meanwhile."""
        following = asyncio.create_task(asyncio.to_thread(self._mix.values, 0))
        for tick in range(self._play.ticks):
            values = await following
            following = asyncio.create_task(asyncio.to_thread(self._mix.values, tick + 1))
            due_s = self._started + tick * self._play.pace_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), max(0.0, due_s - time.monotonic()))
            if self._over.is_set():
                break
            self._report.due_points = (tick + 1) * self._mix.tick_points
            if await self._send(call, tick, values):
                self._report.ticks += 1
                self._report.late_s = time.monotonic() - due_s if self._play.pace_s else 0.0
        await following

    async def _send(self, call: Any, tick: int, values: Floats) -> bool:
        """Sends a tick; whether all of it was acknowledged."""
        waiting, whole = iter(enumerate(self._slices)), True

        async def work() -> None:
            nonlocal whole
            for number, chosen in waiting:
                whole = await self._request(call, tick, values, number, chosen) and whole

        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(work())
        return whole

    async def _request(self, call: Any, tick: int, values: Floats, number: int, chosen: slice) -> bool:
        unsure = False
        request = self._mix.request(tick, values, chosen)
        points = values[chosen].size
        while not self._over.is_set():
            try:
                response = await call(request)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _SENT_AGAIN:
                    raise
                unsure = unsure or error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
                again = self._report.sent_again
                again[error.code().name] = again.get(error.code().name, 0) + 1
                self._report.last_error = (error.details() or "")[:300]
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), RETRY_S)
                continue
            if response.accepted_points != points:
                raise BenchError(f"{response.accepted_points} of {points} points were accepted: {response.errors[:1]}")
            self._report.points += points
            self._report.rows[number] += len(values[chosen])
            return True
        self._report.unsure += unsure
        return False

    def _tell(self, *, ended: bool = False) -> None:
        report = self._report
        report.seconds = time.monotonic() - self._started
        if self._play.pace_s:
            due = min(self._play.ticks, int(report.seconds / self._play.pace_s) + 1)
            report.due_points = due * self._mix.tick_points
        used = resource.getrusage(resource.RUSAGE_SELF)
        report.cpu_s, report.peak_bytes = used.ru_utime + used.ru_stime, used.ru_maxrss * 1_024
        report.ended = ended
        with contextlib.suppress(BrokenPipeError):
            self._told.send(report)


def start_before(now_ms: int, hours: float) -> int:
    """A tick's time so long before now: rows may be up to 1 h ahead of the server's clock, and age takes old days."""
    return int(np.floor((now_ms - hours * 3_600_000) / INTERVAL_MS)) * INTERVAL_MS
