"""SIMULATOR_MODE=replay: plays a recording through the same path as everything else.

What must stay true: every row that can be read is sent once, in the order of time, and nothing is given up when
timeseries is away: a recording waits. Stopping keeps the place; starting goes on from it. With ``shift`` the recording
ends at the moment at which it was first started.
"""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from fleet.model import Rows, ServerDescriptor, WriteBatch
from fleet.validation import MAX_REPORT_INTERVAL_MS
from runtime.clock import Clock
from services.simulator.delivery import Delivery, parcel_of
from services.simulator.feed import TICK_SPAN, Progress, tracer
from services.simulator.recording import Block, Header, Recording, RecordingReader

MAX_BATCH_POINTS: Final = 50_000
"""Points of one batch: five of them are a message of 2 MB."""
PROGRESS_LOG_S: Final = 10.0
_ENVIRONMENT = "recorded"
_log = logging.getLogger(__name__)


class Replay:
    """Plays one recording."""

    def __init__(
        self, path: Path, folder: Path, header: Header, clock: Clock, *, speed: float | None, shift: bool
    ) -> None:
        """Prepares; nothing is read yet.

        Args:
            path: the recording, CSV or gzip of it.
            folder: where its rows are kept sorted; emptied first.
            header: what ``read_header`` returned for the file; it may be another one when that is read.
            speed: seconds of the recording in a second; None: as fast as batches are accepted.
            shift: whether times are moved so that the recording ends when it is started; else they are kept.
        """
        self._path = path
        self._folder = folder
        self._header = header
        self._clock = clock
        self._speed = speed
        self._shift = shift
        self._recording: Recording | None = None
        self._finished = False
        self._fetching: asyncio.Task[Block | None] | None = None
        self._offset_ms = 0
        self._blocks: Iterator[Block] = iter(())
        self._block: Block | None = None
        self._position = 0
        self._rows_sent = 0
        self._batch_rows = max(1, MAX_BATCH_POINTS // len(header.metric_set))
        self._descriptors: list[ServerDescriptor] = []

    @property
    def server_count(self) -> int:
        return len(self._descriptors)

    @property
    def metric_count(self) -> int:
        return len(self._header.metric_set)

    @property
    def interval_s(self) -> float:
        return self._report_interval_ms() / 1000.0

    @property
    def progress(self) -> Progress:
        if self._recording is None:
            return Progress()
        return Progress(rows=self._rows_sent, total_rows=self._recording.rows, bad_lines=self._recording.bad_lines)

    async def run(self, delivery: Delivery) -> None:
        """Plays from where it was stopped to the end, and waits until all of it is acknowledged.

        Raises:
            InvalidArgument: the header is wrong, or no row can be read.
        """
        recording = self._recording
        if recording is None or self._finished:
            recording = await self._load()
        told_s = self._clock.monotonic()
        await self._advance(recording)
        played_from_ms = int(self._block.times_ms[self._position]) if self._block else 0
        played_since_s = self._clock.monotonic()
        while self._block is not None:
            due = await self._due_rows(self._block, played_from_ms, played_since_s)
            await self._send(delivery, self._block, due)
            await self._advance(recording)
            if self._clock.monotonic() - told_s >= PROGRESS_LOG_S:
                told_s = self._clock.monotonic()
                _log.info("replaying", extra={"rows": self._rows_sent, "percent": self._percent(recording)})
        await delivery.drained()
        _log.info("the recording was played", extra={"rows": self._rows_sent, "bad_lines": recording.bad_lines})
        self._finished = True  # started once more, it is played once more

    async def _advance(self, recording: Recording) -> None:
        """Goes to the next block where this one is played. Stopped while it is fetched, the next start has it; where
        that fails, the next start fetches it again."""
        if self._block is not None and self._position < len(self._block):
            return
        if self._fetching is None:
            self._fetching = asyncio.create_task(asyncio.to_thread(next, self._blocks, None), name="replay-fetch")
        try:
            self._block, self._position = await asyncio.shield(self._fetching), 0
        except Exception:
            self._fetching = None
            self._blocks = recording.blocks(after_rows=self._rows_sent)  # a generator that failed has ended
            raise
        self._fetching = None

    async def _load(self) -> Recording:
        recording = await self._read()
        self._finished = False
        for line in recording.named_lines:
            _log.warning("the recording has a bad line", extra={"line": line})
        self._recording = recording
        if recording.header != self._header:
            self._header = recording.header
            self._batch_rows = max(1, MAX_BATCH_POINTS // len(self._header.metric_set))
        self._blocks = recording.blocks()
        self._block, self._position, self._rows_sent, self._fetching = None, 0, 0, None
        self._offset_ms = self._clock.now_ms() - recording.last_ms if self._shift else 0
        self._descriptors = [
            ServerDescriptor(
                server_id=server_id,
                hostname=server_id,
                environment=_ENVIRONMENT,
                report_interval_ms=self._report_interval_ms(),
            )
            for server_id in recording.server_ids
        ]
        extra = {"rows": recording.rows, "servers": len(recording.server_ids), "bad_lines": recording.bad_lines}
        _log.info("the recording is read", extra=extra)
        return recording

    async def _read(self) -> Recording:
        """Reads the file in a thread; stopped meanwhile, the thread ends too, and the next start reads again."""
        reader = RecordingReader(self._path, self._folder)
        reading = asyncio.create_task(asyncio.to_thread(reader.read), name="replay-read")
        try:
            return await asyncio.shield(reading)
        except asyncio.CancelledError:
            reader.give_up()
            await asyncio.gather(reading, return_exceptions=True)
            raise

    def _report_interval_ms(self) -> int:
        """Returns how often rows of a server are sent, in the time of whoever watches."""
        recorded_ms = self._recording.interval_ms if self._recording else 0
        shown_ms = max(1, round(recorded_ms / (self._speed or 1.0))) if recorded_ms else 0
        return min(shown_ms, MAX_REPORT_INTERVAL_MS)

    async def _due_rows(self, block: Block, played_from_ms: int, played_since_s: float) -> int:
        """Waits until the next row is due and returns the end of the rows that are due by then."""
        end = min(len(block), self._position + self._batch_rows)
        if self._speed is None:
            return end
        after_s = (int(block.times_ms[self._position]) - played_from_ms) / 1000.0 / self._speed
        await self._clock.sleep_until(played_since_s + after_s)
        passed_s = max(after_s, self._clock.monotonic() - played_since_s)
        reached_ms = played_from_ms + passed_s * 1000.0 * self._speed
        due = int(np.searchsorted(block.times_ms, reached_ms, side="right"))
        return min(end, max(due, self._position + 1))

    async def _send(self, delivery: Delivery, block: Block, end: int) -> None:
        rows = slice(self._position, end)
        servers = block.servers[rows]
        batch = WriteBatch(
            metric_set=self._header.metric_set,
            rows=Rows(
                metric_set_id=self._header.metric_set.id,
                server_ids=tuple(self._descriptors[index].server_id for index in servers.tolist()),
                times_ms=block.times_ms[rows] + self._offset_ms,
                values=block.values[rows],
            ),
            servers=tuple(self._descriptors[index] for index in np.unique(servers).tolist()),
        )
        span = tracer.start_span(TICK_SPAN, attributes={"simulator.rows": end - self._position})
        parcel = parcel_of(int(batch.rows.times_ms[-1]), [batch], span)
        try:
            await delivery.put_when_room(parcel)
        except BaseException:
            span.end()
            raise
        self._rows_sent += end - self._position
        self._position = end

    def _percent(self, recording: Recording) -> float:
        return round(100.0 * self._rows_sent / recording.rows, 1)
