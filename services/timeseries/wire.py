"""Between protobuf messages and the engine's values: what is checked, and how answers are cut into messages.

What must stay true: everything that a sender can get wrong is found here, before anything is journaled, and named by
its field; one batch costs the event loop less than 10 ms (a large one is decoded in a thread).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fleet import validation
from fleet.codec import (
    descriptor_from_pb,
    descriptor_to_pb,
    metric_set_from_pb,
    metric_set_to_pb,
    ms_from_duration,
    ms_from_timestamp,
    packed_doubles,
    rows_from_pb,
    rows_to_pb,
    timestamp_from_ms,
    varint,
)
from fleet.model import MetricSet, RowError, Rows, ServerDescriptor
from openmanager.fleet.v1 import history_pb2, metric_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.errors import InvalidArgument
from services.timeseries.combine import DEFAULT_PERCENTILE, MAX_TOP, Across, Combination
from services.timeseries.engine.aggregate import Aggregation
from services.timeseries.engine.last import LastValues, Names
from services.timeseries.engine.query import Query, SeriesResult
from services.timeseries.engine.tail import TailBatch

MAX_MESSAGE_POINTS = 50_000
"""Points of one message of an answer: 800 KB."""

MAX_LAST_BYTES = 1 << 20
"""About so many bytes of last values make a message: those of 65,000 series, or fewer with their names."""

MIN_STEP_MS = 1_000
MAX_STEP_MS = 315_576_000_000_000
"""10,000 years: what a Duration may say; over gRPC it may be anything."""
THREAD_ROWS = 1_000
THREAD_VALUES = 500_000
"""Batches over either are decoded in a thread: 1,000 rows take 0.8 ms, 500,000 values 1.4 ms."""

_SERIES_TAG = bytes((timeseries_pb2.QueryResponse.SERIES_FIELD_NUMBER << 3 | 2,))
_TIMES_TAG = history_pb2.Series.TIMES_FIELD_NUMBER << 3 | 2
_VALUES_TAG = history_pb2.Series.VALUES_FIELD_NUMBER << 3 | 2

_LAST_TIMES_TAG = timeseries_pb2.ServerLastValues.TIMES_FIELD_NUMBER << 3 | 2
_LAST_VALUES_TAG = timeseries_pb2.ServerLastValues.VALUES_FIELD_NUMBER << 3 | 2

_AGGREGATIONS = {
    history_pb2.AGGREGATION_UNSPECIFIED: Aggregation.AVG,
    history_pb2.AGGREGATION_AVG: Aggregation.AVG,
    history_pb2.AGGREGATION_MIN: Aggregation.MIN,
    history_pb2.AGGREGATION_MAX: Aggregation.MAX,
    history_pb2.AGGREGATION_SUM: Aggregation.SUM,
    history_pb2.AGGREGATION_COUNT: Aggregation.COUNT,
    history_pb2.AGGREGATION_LAST: Aggregation.LAST,
    history_pb2.AGGREGATION_RATE: Aggregation.RATE,
    history_pb2.AGGREGATION_FIRST: Aggregation.FIRST,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A request that passed every check.

    Attributes:
        metric_sets: sets that came with it.
        servers: servers that came with it.
        rows: the rows that are taken; None when there are none.
        accepted_points: points of those rows.
        rejected_points: points of the others.
        errors: why, as many as an answer lists.
        endings: what the engine is to be told with the rows.
    """

    metric_sets: tuple[MetricSet, ...]
    servers: tuple[ServerDescriptor, ...]
    rows: Rows | None
    accepted_points: int
    rejected_points: int
    errors: tuple[RowError, ...]
    endings: int


class Lateness(Protocol):
    """What the engine says of old rows."""

    @property
    def endings(self) -> int:
        """How many days went so far."""
        ...

    @property
    def oldest_ms(self) -> int:
        """Rows before this instant are too late."""
        ...

    @property
    def aged_ms(self) -> int:
        """Rows before this instant may be too late."""
        ...

    async def too_late(self, server_ids: Sequence[str], times_ms: NDArray[np.int64]) -> tuple[NDArray[np.bool_], int]:
        """Which rows are, and what `append` is to be told with the others."""
        ...


async def decode(
    request: timeseries_pb2.AppendRequest, known: Callable[[str], MetricSet | None], now_ms: int, lateness: Lateness
) -> Decoded:
    """Checks and decodes a request.

    Args:
        request: as it came.
        known: the stored set of an id.
        now_ms: our clock.
        lateness: what judges old rows.

    Raises:
        InvalidArgument: a structural fault, naming the field.
        FailedPrecondition: METRIC_SET_UNKNOWN.
    """
    large = len(request.batch.rows) > THREAD_ROWS or len(request.batch.values) > THREAD_VALUES or request.metric_sets
    parsed = await asyncio.to_thread(_parse, request, known) if large else _parse(request, known)
    late, endings = None, lateness.endings  # before the age: a day may go right after the look at it
    if parsed.rows is not None and (parsed.rows.times_ms < lateness.aged_ms).any():
        late, endings = await lateness.too_late(parsed.rows.server_ids, parsed.rows.times_ms)
    judge = partial(_judged, parsed, now_ms, lateness.oldest_ms, late, endings)
    return await asyncio.to_thread(judge) if large else judge()


class _Parsed(NamedTuple):
    """A request whose structure is right; its rows are not judged yet."""

    metric_sets: tuple[MetricSet, ...]
    servers: tuple[ServerDescriptor, ...]
    rows: Rows | None


def _parse(request: timeseries_pb2.AppendRequest, known: Callable[[str], MetricSet | None]) -> _Parsed:
    metric_sets = []
    for index, message in enumerate(request.metric_sets):
        metric_set = metric_set_from_pb(message)
        validation.check_metric_set(metric_set, f"metric_sets[{index}].metrics", message.id)
        metric_sets.append(metric_set)
    servers = tuple(descriptor_from_pb(message) for message in request.servers)
    validation.check_descriptors(servers)
    return _Parsed(tuple(metric_sets), servers, _rows(request.batch, {one.id: one for one in metric_sets}, known))


def _rows(
    batch: metric_pb2.MetricBatch, sent: dict[str, MetricSet], known: Callable[[str], MetricSet | None]
) -> Rows | None:
    if not batch.rows and not batch.values:
        return None
    metric_set = sent.get(batch.metric_set_id) or known(batch.metric_set_id)
    if metric_set is None:
        raise validation.metric_set_unknown(batch.metric_set_id, "metric_set_id")
    validation.check_batch(batch, len(metric_set))
    return rows_from_pb(batch, len(metric_set))


def _judged(parsed: _Parsed, now_ms: int, oldest_ms: int, late: NDArray[np.bool_] | None, endings: int) -> Decoded:
    rows, rejected = parsed.rows, 0
    errors: list[RowError] = []
    if rows is not None:
        keep, errors = validation.row_faults(rows, now_ms, oldest_ms, late)
        if errors:
            rejected = rows.select(~keep).points
            rows = rows.select(keep)
    return Decoded(
        metric_sets=parsed.metric_sets,
        servers=parsed.servers,
        rows=rows if rows is not None and rows.server_ids else None,
        accepted_points=rows.points if rows is not None else 0,
        rejected_points=rejected,
        errors=tuple(errors[: validation.MAX_ROW_ERRORS]),
        endings=endings,
    )


def query_of(message: history_pb2.HistoryQuery) -> Query:
    """The engine's query.

    Raises:
        InvalidArgument: naming the field.
    """
    if not message.metrics or not all(message.metrics):
        raise InvalidArgument("name at least one metric", field="metrics")
    for field in ("start_time", "end_time"):
        if not message.HasField(field):
            raise InvalidArgument("the range has no such end", field=field)
    start_ms, end_ms = ms_from_timestamp(message.start_time), ms_from_timestamp(message.end_time)
    if start_ms > end_ms:
        raise InvalidArgument("the range starts after its end", field="start_time")
    step_ms = ms_from_duration(message.step)
    if (step_ms and not MIN_STEP_MS <= step_ms <= MAX_STEP_MS) or message.step.nanos % 1_000_000:
        raise InvalidArgument("the step is 0, or 1 s to 10,000 years, in whole milliseconds", field="step")
    aggregation = _AGGREGATIONS.get(message.aggregation)
    if aggregation is None:
        raise InvalidArgument(f"there is no aggregation number {message.aggregation}", field="aggregation")
    return Query(
        server_ids=tuple(message.server_ids) or None,
        metrics=tuple(message.metrics),
        start_ms=start_ms,
        end_ms=end_ms,
        step_ms=step_ms,
        aggregation=aggregation,
    )


def combination_of(message: history_pb2.HistoryQuery, query: Query) -> Combination:
    """What is to become of the query's single series.

    Raises:
        InvalidArgument: naming the field.
    """
    try:
        across = Across(message.across_servers)
    except ValueError:
        raise InvalidArgument(
            f"there is no server aggregation number {message.across_servers}", field="across_servers"
        ) from None
    if across is not Across.NONE and not query.step_ms:
        raise InvalidArgument("putting servers together needs a step", field="step")
    if not 0 <= message.top <= MAX_TOP:
        raise InvalidArgument(f"top lies outside 0 to {MAX_TOP}", field="top")
    if message.top and across is not Across.NONE:
        raise InvalidArgument("top and across_servers exclude each other", field="top")
    percentile = message.percentile if message.HasField("percentile") else DEFAULT_PERCENTILE
    if not 0 <= percentile <= 100:
        raise InvalidArgument("the percentile lies outside 0 to 100", field="percentile")
    if message.HasField("percentile") and across is not Across.PERCENTILE:
        raise InvalidArgument("a percentile is only for across_servers PERCENTILE", field="percentile")
    return Combination(across=across, percentile=percentile, top=message.top)


class Packer:
    """Series packed into serialized messages (`QueryResponse`) of bounded size; a long series is cut into parts that
    follow each other.

    A message is the serialized fields one after the other, so the numbers are copied once, and those of times that
    several series share are made once: 3 us a series of 120 points, where filling a message takes 12.
    """

    def __init__(self) -> None:
        self._encoded: list[bytes] = []
        self._points = 0
        self._times = self._packed_times = b""

    def add(self, result: SeriesResult) -> Iterator[bytes]:
        """Takes a series; returns the messages that are full now."""
        for start in range(0, len(result.times_ms), MAX_MESSAGE_POINTS):
            chosen = slice(start, start + MAX_MESSAGE_POINTS)
            values = result.values[chosen]
            if self._points and self._points + len(values) > MAX_MESSAGE_POINTS:
                yield b"".join(self._encoded)
                self._encoded, self._points = [], 0
            times = result.times_ms[chosen].tobytes()
            if times != self._times:
                self._times = times
                self._packed_times = packed_doubles(_TIMES_TAG, result.times_ms[chosen] / 1000)
            names = history_pb2.Series(server_id=result.server_id, metric=result.metric_key, unit=result.unit)
            if result.resolution_ms:
                names.resolution.FromMilliseconds(result.resolution_ms)
            parts = (names.SerializeToString(), self._packed_times, packed_doubles(_VALUES_TAG, values))
            self._encoded += (_SERIES_TAG, varint(sum(map(len, parts))), *parts)
            self._points += len(values)

    def end(self) -> Iterator[bytes]:
        """The last message, if there is anything left to say."""
        if self._encoded:
            yield b"".join(self._encoded)


def query_responses(results: Iterable[SeriesResult]) -> Iterator[bytes]:
    """Series as messages."""
    packer = Packer()
    for result in results:
        yield from packer.add(result)
    yield from packer.end()


async def combined_responses(results: AsyncIterator[SeriesResult]) -> AsyncGenerator[bytes, None]:
    """The same of series that come one by one."""
    packer = Packer()
    async for result in results:
        for message in packer.add(result):
            yield message
    for message in packer.end():
        yield message


def selectors_of(message: timeseries_pb2.LastValuesRequest) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The servers and the metrics that are asked for; None: all.

    Raises:
        InvalidArgument: naming the field.
    """
    for field in ("server_ids", "metrics"):
        if not all(getattr(message, field)):
            raise InvalidArgument("an empty name names nothing; leave the list empty for all", field=field)
    return tuple(message.server_ids) or None, tuple(message.metrics) or None


def last_responses(found: list[LastValues]) -> Iterator[timeseries_pb2.LastValuesResponse]:
    """Servers packed into messages of bounded size; 0.2 ms for 20 x 511."""
    numbers: dict[Names, int] = {}
    response, size = timeseries_pb2.LastValuesResponse(), 0
    for server in found:
        if size > MAX_LAST_BYTES:
            yield response
            response, size = timeseries_pb2.LastValuesResponse(), 0
        if server.names not in numbers:
            numbers[server.names] = len(numbers)
            columns = response.columns.add(metrics=server.names.keys)
            columns.units.extend([metric.unit for metric in server.names.metrics])
            size += columns.ByteSize()
        message = response.servers.add(server_id=server.server_id, columns=numbers[server.names])
        times = server.times_ms[~np.isnan(server.values)]
        alike = bool((times == times[0]).all())
        message.MergeFromString(packed_doubles(_LAST_TIMES_TAG, (times[:1] if alike else server.times_ms) / 1000))
        message.MergeFromString(packed_doubles(_LAST_VALUES_TAG, server.values))
        size += 16 * len(server.values)
    if response.servers:
        yield response


def tail_response(batch: TailBatch, sent_sets: set[str]) -> timeseries_pb2.TailMetricsResponse:
    """One journaled batch as a message, with its set when ``sent_sets`` lacks it (and then has it)."""
    message = timeseries_pb2.TailMetricsResponse(
        sequence=batch.sequence,
        receive_time=timestamp_from_ms(batch.received_ms),
        servers=[descriptor_to_pb(server) for server in batch.descriptors],
    )
    if batch.metric_set is not None and batch.metric_set.id not in sent_sets:
        sent_sets.add(batch.metric_set.id)
        message.metric_set.CopyFrom(metric_set_to_pb(batch.metric_set))
    if batch.rows is not None:
        message.batch.CopyFrom(rows_to_pb(batch.rows))
    return message
