"""What can be asked of a store, asynchronously: each question is work for a small pool of threads.

What must stay true: nothing is read on the event loop; a reader that goes away stops its work; an error of the storage
is noted and told as one of ours.
"""

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Final, TypeVar

import apsw

from fleet.model import MetricSet, ServerDescriptor
from runtime import telemetry
from runtime.errors import Cancelled, Unavailable
from services.timeseries.engine.catalog import MetricInfo
from services.timeseries.engine.database import storage_error
from services.timeseries.engine.last import LastValues, last_values
from services.timeseries.engine.query import Query, Scan, SeriesResult
from services.timeseries.engine.rows import StoredRows, stored_rows
from services.timeseries.engine.store import Store
from services.timeseries.engine.tail import TailSource
from services.timeseries.engine.told import Told

_T = TypeVar("_T")

_READ_AHEAD_POINTS: Final = 100_000
"""A query hands over so many points at once: a hop between threads costs 0.06 ms."""
_POINT_BYTES: Final = 16  # of a message: a time and a value

_tracer = telemetry.tracer("timeseries.engine")


class Reads:
    """The reading half of an engine; belongs to the event loop in which it was made."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._closing = threading.Event()
        self._scans: set[Scan] = set()
        self._readers = ThreadPoolExecutor(store.settings.read_threads, "timeseries-read")
        self._tails = TailSource(store)

    def stop_reading(self) -> None:
        """Ends what is being read, and refuses what comes."""
        self._closing.set()
        for scan in self._scans:
            scan.cancel.set()

    async def query(self, query: Query) -> AsyncIterator[SeriesResult]:
        """The series with points in the range, in order of server id and metric key.

        Raises:
            InvalidArgument: field start_time, step or aggregation.
            ResourceExhausted: MAX_SERIES, MAX_POINTS or MAX_SCANNED_POINTS.
        """
        async with aclosing(self._scanned(query, iter, _points)) as results:
            async for result in results:
                yield result

    async def packed(
        self, query: Query, pack: Callable[[Iterator[SeriesResult]], Iterator[bytes]]
    ) -> AsyncGenerator[bytes, None]:
        """What `pack` makes of the results, in the thread that reads them: a small answer is one trip to it and back.

        Raises as `query`.
        """
        async with aclosing(self._scanned(query, pack, _bytes_as_points)) as messages:
            async for message in messages:
                yield message

    async def _scanned(
        self, query: Query, make: Callable[[Iterator[SeriesResult]], Iterator[_T]], points: Callable[[_T], int]
    ) -> AsyncGenerator[_T, None]:
        """What is made of the results in a reader's thread; `points` says how many there are in one of them."""
        scan = Scan(self._store, query)
        made = make(scan.results())
        self._scans.add(scan)
        span = _tracer.start_span("engine.query")  # not made current: the caller's context changes between two results
        try:
            more = True
            while more:
                taken, more = await self.read(partial(_take, made, points))
                for one in taken:
                    yield one
        finally:
            span.end()
            scan.cancel.set()
            self._scans.discard(scan)

    def stored_rows(self, server_id: str, start_ms: int, end_ms: int) -> AsyncGenerator[StoredRows, None]:
        """The rows of a server in `[start, end)`, in order of time and sequence."""
        return self.each(lambda check: stored_rows(self._store, server_id, start_ms, end_ms, check))

    async def told(self, server_id: str | None = None) -> dict[str, Told]:
        """What each server, or one, said of itself in the course of time."""
        return await self.read(lambda: self._tails.told(server_id))

    async def last_values(
        self, server_ids: tuple[str, ...] | None = None, metrics: tuple[str, ...] | None = None
    ) -> list[LastValues]:
        """The newest point of each series, by server, in order of its id. None: all servers, all metrics.

        Raises:
            ResourceExhausted: MAX_SERIES.
        """

        def read(check: Callable[[], None]) -> Iterator[list[LastValues]]:
            yield last_values(self._store, server_ids, metrics, check)

        async with aclosing(self.each(read)) as found:
            return await anext(found)

    async def list_metrics(self, server_id: str | None = None) -> list[MetricInfo]:
        """The metrics that rows were written for (by one server, or by any), by key."""

        def read() -> list[MetricInfo]:
            with self._store.lock:
                return self._store.catalog.list_metrics(server_id)

        return await self.read(read)

    def servers(self) -> dict[str, ServerDescriptor | None]:
        """Every server that has rows or was told of, with its latest descriptor."""
        with self._store.lock:
            catalog = self._store.catalog
            return {server_id: catalog.descriptors.get(server_id) for server_id in sorted(catalog.servers)}

    def knows_server(self, server_id: str) -> bool:
        """Whether the server has rows or was told of."""
        return server_id in self._store.catalog.servers

    def unknown_metrics(self, selectors: Iterable[str]) -> list[str]:
        """The selectors (a key, or a bare name) that match no metric of any server."""
        with self._store.lock:
            return [selector for selector in selectors if not self._store.catalog.match([selector])]

    def metric_set(self, content_id: str) -> MetricSet | None:
        """A stored set by its content id."""
        stored = self._store.catalog.sets.get(content_id)
        return stored.metric_set if stored else None

    async def each(self, make: Callable[[Callable[[], None]], Iterator[_T]]) -> AsyncGenerator[_T, None]:
        """What a generator gives, a trip to a reader's thread each. It is made with a check that it is to call often:
        that raises Cancelled once the caller is gone."""
        gone = threading.Event()

        def check() -> None:
            if gone.is_set() or self._closing.is_set():
                raise Cancelled("the reader went away")

        things = make(check)
        try:
            while thing := await self.read(lambda: list(itertools.islice(things, 1))):
                yield thing[0]
        finally:
            gone.set()

    async def read(self, work: Callable[[], _T]) -> _T:
        """What `work` returns, in a reader's thread.

        Raises:
            Unavailable: STORAGE_FAILED, CLOSING.
        """
        if self._closing.is_set():
            raise Unavailable("the engine is closing", reason="CLOSING")
        try:
            return await self._loop.run_in_executor(self._readers, work)
        except apsw.Error as error:
            self._store.faults.note(f"a read failed: {error}")
            raise storage_error(error) from error


def _points(result: SeriesResult) -> int:
    return len(result.times_ms)


def _bytes_as_points(message: bytes) -> int:
    return len(message) // _POINT_BYTES


def _take(made: Iterator[_T], points: Callable[[_T], int]) -> tuple[list[_T], bool]:
    """The next things, up to `_READ_AHEAD_POINTS`, and whether there may be more."""
    taken, size = [], 0
    for one in made:
        taken.append(one)
        size += points(one)
        if size >= _READ_AHEAD_POINTS:
            return taken, True
    return taken, False
