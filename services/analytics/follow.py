"""Following the tail: batches as they were journaled become batches to be judged, in order, each once.

What must stay true: after an interruption of any kind the next stream asks for the first sequence that is not in the
state; rows that were gone before they could be read are told, never passed over in silence; a batch that cannot be
judged does not hold up the ones behind it. Nothing is queued here: the next batch is read when the last one is judged,
and the journal keeps what waits.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

import numpy as np

from fleet.codec import metric_set_from_pb, ms_from_timestamp, rows_from_pb
from fleet.model import Rows
from fleet.validation import check_batch, metric_set_unknown
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.errors import FailedPrecondition, ResourceExhausted
from services.analytics.core import Analysis, Batch
from services.analytics.detect import NO_COLUMNS, SetColumns
from services.analytics.scores import METRIC_SET as SCORES
from services.analytics.scoring.arrays import Integers

MAX_STREAM_SETS: Final = 50_000
"""Metric sets known of one stream. A stream says each once, so when these are too many it is started over."""
MAX_PART_ROWS: Final = 256
MAX_PART_VALUES: Final = 30_000
"""Rows, and their values, that are taken in one go: .3 ms, 6 ms where all series are new."""
LARGE_BATCH_ROWS: Final = 2_000
LARGE_SET_METRICS: Final = 2_000
"""Larger ones are decoded in a thread: it takes 1 us a row and 3 us a metric."""

_log = logging.getLogger(__name__)

_Sets = dict[str, SetColumns]
"""Id of a metric set -> what the detector said of it."""


class TailFollower:
    """Feeds an analysis from the timeseries service."""

    def __init__(self, timeseries: Channel, analysis: Analysis) -> None:
        self._stub = timeseries_pb2_grpc.TimeSeriesServiceStub(timeseries.grpc)
        self._analysis = analysis
        self._stumbled_at: int | None = None

    async def follow(self) -> None:
        """Reads one stream to its end.

        Raises:
            OpenManagerError: the stream broke off, or a batch could not be judged; call again.
        """
        asked = self._analysis.next_sequence
        sets: _Sets = {}
        call = self._stub.TailMetrics(timeseries_pb2.TailMetricsRequest(from_sequence=asked))
        try:
            async with calling("timeseries"):
                async for message in call:
                    await self._take(message, sets)
        except FailedPrecondition as error:
            if error.reason == "SEQUENCE_AHEAD":
                _log.error("the journal does not know sequence %d: it is another one, and is followed from now", asked)
                self._analysis.pass_to(0)
            raise
        finally:
            call.cancel()

    async def _take(self, message: timeseries_pb2.TailMetricsResponse, sets: _Sets) -> None:
        try:
            if message.HasField("metric_set"):
                await self._learn_set(message, sets)
            expected = self._analysis.next_sequence
            if message.sequence < expected:
                return
            if message.sequence > expected > 0:  # sequences have no holes
                self._analysis.lose(expected, message.sequence)
                self._analysis.pass_to(message.sequence)
            if message.batch.metric_set_id == SCORES.id and message.batch.rows:  # our own
                self._analysis.pass_to(message.sequence + 1)
            else:
                await self._analysis.apply(await _decoded(message, sets))
        except Exception as error:
            if self._stumbled_at != message.sequence:  # a new stream sends it again, with its set
                self._stumbled_at = message.sequence
                raise
            self._analysis.skip(message.sequence, error)

    async def _learn_set(self, message: timeseries_pb2.TailMetricsResponse, sets: _Sets) -> None:
        if len(sets) >= MAX_STREAM_SETS:
            raise ResourceExhausted(f"the stream has named {len(sets)} metric sets (MAX_STREAM_SETS): it starts over")

        def learn() -> SetColumns:
            return self._analysis.detector.columns_of(metric_set_from_pb(message.metric_set))

        large = len(message.metric_set.metrics) > LARGE_SET_METRICS
        key = message.metric_set.id or message.batch.metric_set_id
        sets[key] = await asyncio.to_thread(learn) if large else learn()


async def _decoded(message: timeseries_pb2.TailMetricsResponse, sets: _Sets) -> Batch:
    if len(message.batch.rows) > LARGE_BATCH_ROWS:
        return await asyncio.to_thread(_decode, message, sets)
    return _decode(message, sets)


def _decode(message: timeseries_pb2.TailMetricsResponse, sets: _Sets) -> Batch:
    """The batch of a message; one that only told servers has no rows.

    Raises:
        FailedPrecondition: the stream has not sent the set of its rows.
        InvalidArgument: its values are not rows x metrics.
    """
    columns = sets.get(message.batch.metric_set_id)
    if columns is None:
        if message.batch.rows:
            raise metric_set_unknown(message.batch.metric_set_id, "batch.metric_set_id")
        columns = NO_COLUMNS
    check_batch(message.batch, len(columns))
    rows: Rows = rows_from_pb(message.batch, len(columns))
    return Batch(
        sequence=message.sequence,
        received_ms=ms_from_timestamp(message.receive_time),
        columns=columns,
        rows=rows,
        parts=parts_of(rows.server_ids, rows.times_ms, MAX_PART_VALUES // max(len(columns), 1)),
    )


def parts_of(server_ids: Sequence[str], times_ms: Integers, most: int = MAX_PART_ROWS) -> list[Integers]:
    """Cuts rows into runs that can be taken at once.

    Returns:
        Indices of rows, at most `most` and MAX_PART_ROWS in each. A server is in each at most once, and its rows are in
        order of their times from run to run.
    """
    count, most = len(server_ids), min(max(most, 1), MAX_PART_ROWS)
    numbers: dict[str, int] = {}
    servers = np.array([numbers.setdefault(server_id, len(numbers)) for server_id in server_ids], np.int64)
    if len(numbers) == count:
        return _cut(np.arange(count), most)
    order = np.lexsort((times_ms, servers))
    starts = np.flatnonzero(np.diff(servers[order], prepend=-1))
    rank = np.arange(count) - np.repeat(starts, np.diff(starts, append=count))
    by_rank = np.argsort(rank, kind="stable")
    runs = np.split(order[by_rank], np.flatnonzero(np.diff(rank[by_rank])) + 1)
    return [part for run in runs for part in _cut(run, most)]


def _cut(rows: Integers, most: int) -> list[Integers]:
    return [rows[start : start + most] for start in range(0, len(rows), most)]
