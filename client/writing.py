"""Batches, and the stream that gets them onto the gateway's disk whatever happens in between.

What must stay true: answers come in the order of the batches, one for each; a batch without an answer is sent again
when the connection breaks (harmless: the same server, metric and time is the same point); every stream sends a metric
set before it relies on it, so a gateway that forgot one gets it again; at most `in_flight` batches are held.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import grpc
import grpc.aio
import numpy as np
from numpy.typing import ArrayLike

from client.backoff import Backoff
from client.channel import MAX_MESSAGE_BYTES
from client.errors import OpenManagerError, from_rpc_error
from client.history import timestamp
from client.watching import OnLost
from openmanager.fleet.v1 import metric_pb2
from openmanager.gateway.v1 import ingest_pb2

Call = grpc.aio.StreamStreamCall[ingest_pb2.WriteMetricsRequest, ingest_pb2.WriteMetricsResponse]
Batches = Iterable[ingest_pb2.WriteMetricsRequest] | AsyncIterable[ingest_pb2.WriteMetricsRequest]

IN_FLIGHT: Final = 8
"""Batches on their way; the gateway writes one after the other, so more only hide the way there and back."""
MAX_KEPT_ERRORS: Final = 100
_SET_UNKNOWN: Final = "METRIC_SET_UNKNOWN"
_CAUSE_LOST: Final = "Internal error from Core"
"""What grpc.aio (1.85) makes of a stream that is ended while a batch is being written, whatever the gateway said: of a
third of the refusals with eight small batches in flight, measured. The next stream sends its first batch alone, so that
nothing is being written when the refusal comes."""


@dataclass(slots=True)
class Totals:
    """What came of several batches.

    Attributes:
        accepted_points, rejected_points: of all.
        errors: of all; at most 100 are kept.
    """

    accepted_points: int = 0
    rejected_points: int = 0
    errors: list[metric_pb2.RowError] = field(default_factory=list)

    def add(self, answer: ingest_pb2.WriteMetricsResponse) -> None:
        """Counts an answer."""
        self.accepted_points += answer.accepted_points
        self.rejected_points += answer.rejected_points
        self.errors += answer.errors[: MAX_KEPT_ERRORS - len(self.errors)]


def batch(
    metrics: Iterable[metric_pb2.Metric],
    rows: Iterable[tuple[str, datetime | float]],
    values: ArrayLike,
    servers: Iterable[metric_pb2.ServerDescriptor] = (),
) -> ingest_pb2.WriteMetricsRequest:
    """A batch of its parts.

    Args:
        metrics: the columns.
        rows: (server id, when it was measured: a datetime with its zone, or seconds since the Unix epoch).
        values: shape (rows, metrics), or flat, row after row; NaN means no value.
        servers: what is known of the servers; once a stream, and on change.
    """
    return ingest_pb2.WriteMetricsRequest(
        metrics=metrics,
        rows=[metric_pb2.MetricRow(server_id=server_id, time=timestamp(moment)) for server_id, moment in rows],
        values=np.asarray(values, np.float64).ravel().tolist(),
        servers=servers,
    )


class Writing:
    """One run of batches. `async for answer in writing.run()`."""

    def __init__(
        self,
        call: Callable[[], Call],
        address: str,
        batches: Batches,
        *,
        backoff: Backoff,
        retry_for_s: float,
        on_lost: OnLost | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        self._call = call
        self._address = address
        self._source = _Source(batches)
        self._backoff = backoff
        self._retry_for_s = retry_for_s
        self._on_lost = on_lost
        self._in_flight = in_flight
        self._unanswered: deque[ingest_pb2.WriteMetricsRequest] = deque()

    async def run(self) -> AsyncGenerator[ingest_pb2.WriteMetricsResponse, None]:
        """An answer for each batch, in their order.

        Raises:
            OpenManagerError: a batch was refused (as many answers as came belong to those before it), or there was no
                acknowledgement for `retry_for_s`.
        """
        failures, failing_since, careful = 0, 0.0, False
        try:
            while True:
                sending = _Stream(1 if careful else self._in_flight)
                try:
                    async with contextlib.aclosing(self._once(sending)) as answers:
                        async for answer in answers:
                            failures, careful, sending.window = 0, False, self._in_flight
                            yield answer
                    break
                except grpc.aio.AioRpcError as failed:
                    if failed.details() == _CAUSE_LOST and not careful:
                        careful = True
                        continue
                    error = from_rpc_error(failed, self._address)
                    if error.reason == _SET_UNKNOWN and sending.relied_on_a_set(self._unanswered):
                        continue  # a new stream sends it
                    failing_since = failing_since if failures else time.monotonic()
                    delay_s = self._backoff.delay_s(failures, error)
                    ends = time.monotonic() + delay_s > failing_since + self._retry_for_s
                    if not error.is_transient or ends:
                        raise error from failed
                    failures += 1
                if self._on_lost is not None:
                    self._on_lost(error, delay_s)
                await asyncio.sleep(delay_s)
            if self._source.fault is not None:
                raise self._source.fault
        finally:
            await self._source.close()

    async def _once(self, sending: "_Stream") -> AsyncGenerator[ingest_pb2.WriteMetricsResponse, None]:
        """Sends over one stream, what is unanswered first, until all is answered or the stream breaks."""
        stream = self._call()
        sender = asyncio.create_task(self._send(stream, sending), name="write-metrics")
        try:
            while (answer := await stream.read()) is not grpc.aio.EOF:
                assert isinstance(answer, ingest_pb2.WriteMetricsResponse)
                sending.answered(self._unanswered.popleft())
                yield answer
                sending.room.set()
            if self._unanswered or not self._source.ended:  # a proxy may end a stream as if all were well
                raise grpc.aio.AioRpcError(
                    grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "the stream was ended early"
                )
        finally:
            stream.cancel()
            sender.cancel()
            (outcome,) = await asyncio.gather(sender, return_exceptions=True)
            if isinstance(outcome, Exception):
                raise outcome

    async def _send(self, stream: Call, sending: "_Stream") -> None:
        try:
            while True:
                while sending.waiting >= sending.window:
                    sending.room.clear()
                    await sending.room.wait()
                if sending.waiting == len(self._unanswered):
                    following = await self._source.take()
                    if following is None:
                        break
                    self._unanswered.append(following)
                try:
                    encoded = sending.encoded(self._unanswered[sending.waiting])
                except OpenManagerError:
                    while sending.waiting:  # what is wrong with it is not to be taken for the fault of one before it
                        sending.room.clear()
                        await sending.room.wait()
                    raise
                sending.waiting += 1
                await stream.write(encoded)
            await stream.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the stream is over; whoever reads it learns why
        except Exception:
            stream.cancel()
            raise


class _Stream:
    """One stream: how many batches wait for their answers on it, and what it has told the gateway of metric sets."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.waiting = 0
        self.room = asyncio.Event()
        self._last: bytes | None = None
        self._relied: set[int] = set()

    def encoded(self, request: ingest_pb2.WriteMetricsRequest) -> ingest_pb2.WriteMetricsRequest:
        """The request, without the metrics when those of the one before it on this stream are the same."""
        if request.ByteSize() > MAX_MESSAGE_BYTES:
            raise OpenManagerError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a batch of {request.ByteSize() >> 20} MiB: a gateway takes at most 16 MiB (MAX_MESSAGE_BYTES)",
                reason="MESSAGE_TOO_LARGE",
            )
        if not request.metrics:
            if request.metric_set_id:
                self._last = None  # what leaves its metrics out now has the columns of this id
            return request
        key = _key(request)
        if key != self._last:
            self._last = key
            return request
        self._relied.add(id(request))
        return ingest_pb2.WriteMetricsRequest(rows=request.rows, values=request.values, servers=request.servers)

    def answered(self, request: ingest_pb2.WriteMetricsRequest) -> None:
        """Forgets the request."""
        self.waiting -= 1
        self._relied.discard(id(request))

    def relied_on_a_set(self, unanswered: Sequence[ingest_pb2.WriteMetricsRequest]) -> bool:
        """Whether the first of the requests was sent without the metrics that it has."""
        return bool(unanswered) and id(unanswered[0]) in self._relied


def _key(request: ingest_pb2.WriteMetricsRequest) -> bytes:
    columns = ingest_pb2.WriteMetricsRequest(metrics=request.metrics, metric_set_id=request.metric_set_id)
    return columns.SerializeToString(deterministic=True)


class _Source:
    """The caller's batches, each with the metrics that it means.

    Taking one goes on when the stream that waited for it breaks: cancelling it would end the caller's generator.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches if isinstance(batches, AsyncIterable) else _as_async(batches)
        self._iterator = aiter(self._batches)
        self._taking: asyncio.Task[ingest_pb2.WriteMetricsRequest | None] | None = None
        self._metrics: Sequence[metric_pb2.Metric] = ()
        self._set_id = ""
        self.ended = False
        self.fault: Exception | None = None

    async def take(self) -> ingest_pb2.WriteMetricsRequest | None:
        """The next batch; None after the last, and where the caller's iterator fails."""
        if self.ended:
            return None
        if self._taking is None:
            self._taking = asyncio.create_task(self._next(), name="next-batch")
        request = await asyncio.shield(self._taking)
        self._taking = None
        return request

    async def _next(self) -> ingest_pb2.WriteMetricsRequest | None:
        try:
            request = await anext(self._iterator)
        except StopAsyncIteration:
            self.ended = True
            return None
        except Exception as fault:
            self.fault, self.ended = fault, True
            return None
        if request.metrics or request.metric_set_id:
            self._metrics, self._set_id = tuple(request.metrics), request.metric_set_id
        elif self._metrics or self._set_id:
            whole = ingest_pb2.WriteMetricsRequest(metrics=self._metrics, metric_set_id=self._set_id)
            whole.MergeFrom(request)
            return whole
        return request

    async def close(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.gather(self._taking, return_exceptions=True)
        closing = getattr(self._iterator, "aclose", None)
        if closing is not None:
            await closing()


async def _as_async(
    batches: Iterable[ingest_pb2.WriteMetricsRequest],
) -> AsyncGenerator[ingest_pb2.WriteMetricsRequest, None]:
    for one in batches:
        yield one
