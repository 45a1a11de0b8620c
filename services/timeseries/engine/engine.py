"""The engine as the service uses it: asynchronous, bounded, and never on the event loop with work.

Appends go to the writer's thread, reads to a small pool, closing heads to one worker, upkeep (roll-ups, merging,
retention) to another. What must stay true: `append`
returns only after the commit; a cancelled caller leaves the engine intact (its batch may or may not be stored); a
reader that goes away stops its work; after `open` is left every thread has ended and every file is closed.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw
import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricSet, Rows, ServerDescriptor
from runtime import tasks, telemetry
from runtime.clock import Clock
from runtime.errors import FailedPrecondition, ResourceExhausted, Unavailable
from services.timeseries.engine.cursors import Cursors
from services.timeseries.engine.database import file_bytes, opening_error
from services.timeseries.engine.frozen import too_late
from services.timeseries.engine.merge import Merger
from services.timeseries.engine.reads import Reads
from services.timeseries.engine.retention import Retention
from services.timeseries.engine.settings import EngineSettings
from services.timeseries.engine.status import EngineStatus
from services.timeseries.engine.store import Store
from services.timeseries.engine.tail import TailBatch
from services.timeseries.engine.tiers import coarsest
from services.timeseries.engine.upkeep import Rollups
from services.timeseries.engine.writer import Append, Writer, check_rows

_T = TypeVar("_T")
_tracer = telemetry.tracer("timeseries.engine")


class Engine(Reads):
    """Made by `Engine.open`. All methods belong to the event loop in which it was opened."""

    def __init__(self, folder: Path, store: Store) -> None:
        super().__init__(store)
        self._folder = folder
        self._progress = asyncio.Event()
        self._close_wanted = asyncio.Event()
        self._gate = asyncio.Lock()
        self._closing_heads = asyncio.Lock()
        self._keeping_up = asyncio.Lock()
        self._waiting_appends = 0
        self._closer = ThreadPoolExecutor(1, "timeseries-blocks")
        self._upkeep = ThreadPoolExecutor(1, "timeseries-upkeep")
        self._writer = Writer(store, lambda wanted: self._notify(close_wanted=wanted))
        self.cursors = Cursors(store, self._writer, self)
        self._rollups = Rollups(store, self._closing.is_set)
        self._merger = Merger(store, self._closing.is_set)
        self._retention = Retention(
            store, self._rollups, lambda run: self._writer.call(run).result(), self._closing.is_set
        )

    @classmethod
    @asynccontextmanager
    async def open(
        cls, folder: Path, *, clock: Clock, settings: EngineSettings | None = None
    ) -> "AsyncIterator[Engine]":
        """Opens or creates the engine of a folder, replays its journal and keeps it maintained until it is left."""
        try:
            store = await asyncio.to_thread(Store, folder, settings or EngineSettings(), clock)
        except apsw.Error as error:
            raise opening_error(folder, error) from error
        try:
            engine = cls(folder, store)
        except BaseException:
            store.close()
            raise
        running = [
            tasks.start("timeseries-periodic-closing", tasks.run_forever("closing heads", engine._periodically)),
            tasks.start("timeseries-closing", tasks.run_forever("closing heads", engine._on_demand)),
            tasks.start("timeseries-upkeep", tasks.run_forever("upkeep", engine._keep_up_periodically)),
        ]
        try:
            yield engine
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await asyncio.shield(engine._close())

    async def _close(self) -> None:
        self.stop_reading()
        await asyncio.to_thread(self._writer.stop)
        self._signal(False)
        for pool in (self._upkeep, self._closer, self._readers):
            await asyncio.to_thread(pool.shutdown)
        await asyncio.to_thread(self._tails.close)
        await asyncio.to_thread(self.cursors.close)
        await asyncio.to_thread(self._store.close)

    async def append(
        self,
        rows: Rows | None = None,
        *,
        metric_sets: Sequence[MetricSet] = (),
        servers: Sequence[ServerDescriptor] = (),
        endings: int | None = None,
    ) -> int:
        """Stores a batch and returns its sequence once it is on disk and readable.

        Args:
            rows: the rows, whose arrays must not change until this returns; None: only servers are told.
            metric_sets: sets that may not be known here.
            servers: new or changed servers; they hold for this batch and what follows.
            endings: what `too_late` gave for these rows, or, where none of them was before `aged_ms`, the `endings`
                from before that was looked at; None: nobody looked.

        Raises:
            InvalidArgument: the rows do not fit together or to their set, or a time is outside 1970 to 2262.
            FailedPrecondition: METRIC_SET_UNKNOWN.
            ResourceExhausted: BATCH_TOO_LARGE, TOO_MANY_WAITING, HEADS_FULL, DISK_FULL; nothing is kept.
            Unavailable: STORAGE_FAILED, CLOSING, RESTART_NEEDED, EVICTED_MEANWHILE.
        """
        if rows is not None:
            check_rows(rows)
        batch = Append(rows=rows, metric_sets=metric_sets, servers=servers, endings=endings)
        with _tracer.start_as_current_span("journal.commit") as span:
            await self._submit(batch)
            sequence = await asyncio.wrap_future(batch.done)
            span.set_attribute("timeseries.sequence", sequence)
            return sequence

    async def _submit(self, batch: Append) -> None:
        """Puts a batch in line when there is room, in the order of asking."""
        settings = self._store.settings
        if batch.bytes > settings.waiting_bytes_limit:
            raise ResourceExhausted(
                f"a batch of {batch.bytes} bytes is over waiting_bytes_limit = {settings.waiting_bytes_limit}",
                reason="BATCH_TOO_LARGE",
            )
        if self._waiting_appends >= settings.waiting_appends_limit:
            raise ResourceExhausted(
                f"waiting_appends_limit = {settings.waiting_appends_limit} appends wait already",
                reason="TOO_MANY_WAITING",
            )
        self._waiting_appends += 1
        try:
            async with self._gate:
                while not self._has_room(batch.bytes):
                    await self._progress.wait()
                self._writer.submit(batch)
        finally:
            self._waiting_appends -= 1

    def _has_room(self, wanted: int) -> bool:
        settings = self._store.settings
        if self._closing.is_set():
            raise Unavailable("the engine is closing", reason="CLOSING")
        if self._store.heads.bytes > settings.head_bytes_limit:
            if self._store.close_failing:
                raise ResourceExhausted(
                    f"head_bytes_limit = {settings.head_bytes_limit} is reached and blocks cannot be stored",
                    reason="HEADS_FULL",
                )
            return False
        return self._writer.waiting_bytes + wanted <= settings.waiting_bytes_limit

    def _notify(self, *, close_wanted: bool) -> None:
        """From the writer's thread: wakes tails and waiting appends, and the closing of heads."""
        self._loop.call_soon_threadsafe(self._signal, close_wanted)

    def _signal(self, close_wanted: bool) -> None:
        self._progress.set()
        self._progress = asyncio.Event()
        if close_wanted:
            self._close_wanted.set()

    async def _periodically(self) -> None:
        while True:
            await self._store.clock.sleep(self._store.settings.maintenance_interval_s)
            await self._close_due(everything=False)

    async def _on_demand(self) -> None:
        while True:
            await self._close_wanted.wait()
            self._close_wanted.clear()
            await self._close_due(everything=False)

    async def _keep_up_periodically(self) -> None:
        while True:
            await self._store.clock.sleep(self._store.settings.maintenance_interval_s)
            await self._keep_up(everything=False)

    async def maintain(self, *, everything: bool = False) -> None:
        """Closes the heads that are due (or all), sweeps the journal, makes roll-ups, evicts what is too old or over
        the disk's limit, and merges short blocks; runs by itself every few seconds."""
        await self._close_due(everything=everything)
        await self._keep_up(everything=everything)

    async def _close_due(self, *, everything: bool) -> None:
        async with self._closing_heads:
            close = partial(self._store.close_heads, self._closing.is_set, everything=everything)
            await self._loop.run_in_executor(self._closer, close)
            self._signal(False)
            await self._sweep()

    async def _sweep(self) -> None:
        while await asyncio.wrap_future(self._writer.call(self._store.sweep)) >= self._store.settings.sweep_rows:
            pass

    async def _keep_up(self, *, everything: bool) -> None:
        async with self._keeping_up:
            try:
                await self._loop.run_in_executor(self._upkeep, partial(self._upkeep_once, everything=everything))
                await self._sweep()
                await asyncio.wrap_future(self._writer.call(self._store.note_partitions))
            finally:  # also on a full disk, where these may well fail and the limit is what helps
                if not self._closing.is_set():
                    await self._loop.run_in_executor(self._upkeep, self._retention.keep_limit)
            self._signal(False)

    def _upkeep_once(self, *, everything: bool) -> None:
        self._retention.end_lost()
        self._rollups.run(everything=everything)
        self._retention.evict_aged()
        self._merger.run(everything=everything)

    @property
    def first_sequence(self) -> int:
        """The oldest sequence that a tail can still read; one past `last_sequence` when there is none."""
        return self._store.swept_through + 1

    @property
    def last_sequence(self) -> int:
        """The newest acknowledged sequence; 0 when there was none ever."""
        return self._store.last_sequence

    @property
    def needs_restart(self) -> bool:
        """Whether rows that are durable could not be applied, so that nothing can be acknowledged or answered."""
        return self._writer.is_broken

    @property
    def oldest_ms(self) -> int:
        """Rows before this instant are too late, whatever they are. The service refuses them."""
        return self._retention.oldest_ms

    @property
    def aged_ms(self) -> int:
        """Rows before this instant may be too late: ask `too_late`."""
        return self._retention.aged_ms

    @property
    def endings(self) -> int:
        """How many partitions went so far: whether what was said of rows may still hold."""
        return self._store.endings

    def held_from_ms(self, step_ms: int) -> int:
        """From which instant on windows of that width are made of all that was ever written; 0: points. Never before
        the journal was made: another one may have taken rows until then."""
        return self._retention.held_from_ms(coarsest(step_ms))

    @property
    def lacks_ms(self) -> tuple[int, int]:
        """Between which instants rows were taken by another, after this store's backup and before it was restored."""
        return self._store.journal.lacks_ms

    async def too_late(self, server_ids: Sequence[str], times_ms: NDArray[np.int64]) -> tuple[NDArray[np.bool_], int]:
        """Which rows are for roll-ups whose points are gone, and what to give to `append` with the others, so that they
        are refused should more have gone meanwhile."""
        endings = self._store.endings
        return await self.read(lambda: too_late(self._store, server_ids, times_ms)), endings

    async def tail(self, from_sequence: int = 0) -> AsyncIterator[TailBatch]:
        """Acknowledged batches in order, first those kept from `from_sequence` on, then each new one; without end.

        Args:
            from_sequence: the first one wanted; 0: only what is committed from now on. What is swept already is
                told by the `missed` of the first batch that is still there.

        Raises:
            FailedPrecondition: SEQUENCE_AHEAD: the sequence is past the next one: it is another journal's.
        """
        wanted, first = from_sequence or self.last_sequence + 1, True
        if wanted > self.last_sequence + 1:
            raise FailedPrecondition(
                f"the journal ends at {self.last_sequence}, {from_sequence} was never given", reason="SEQUENCE_AHEAD"
            )
        while not self._closing.is_set():
            progress = self._progress
            limit = self._store.settings.tail_read_bytes
            batches = await self.read(partial(self._tails.read, wanted, limit, first=first))
            for batch in batches:
                yield batch
                wanted, first = batch.sequence + 1, False
            if not batches:
                await progress.wait()

    async def status(self) -> EngineStatus:
        """What the engine holds, how far it is and what went wrong."""
        return await self.read(self._status)

    def _status(self) -> EngineStatus:
        store, retention = self._store, self._retention
        journal_bytes = file_bytes(store.journal_path)
        with store.lock:
            head_points, head_bytes = store.heads.points, store.heads.bytes
            unrolled = sum(len(tier.marks) for tier in store.tiers)
        return EngineStatus(
            points=store.partitions.points + head_points,
            head_points=head_points,
            head_bytes=head_bytes,
            disk_bytes=store.disk_bytes,
            tier_bytes={tier.kind.folder: tier.partitions.bytes for tier in store.tiers},
            unrolled_marks=unrolled,
            journal_bytes=journal_bytes,
            disk_free_bytes=shutil.disk_usage(self._folder).free,
            first_sequence=self.first_sequence,
            last_sequence=self.last_sequence,
            waiting_bytes=self._writer.waiting_bytes,
            waiting_appends=self._waiting_appends,
            damaged=store.faults.damaged,
            last_error=store.faults.last,
            closing_fails=store.close_failing,
            refusing=self._writer.refusing,
            oldest_day=retention.oldest_day,
            evicted_partitions=retention.evicted,
            evicted_unshipped=dict(retention.evicted_unshipped),
            disk_bytes_limit=store.settings.disk_bytes_limit,
            disk_pressed=retention.pressed,
            disk_over_limit=retention.over,
            followers=self._tails.followers(),
        )
