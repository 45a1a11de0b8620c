"""To which timeseries replica a server's rows go, and what happens while that one is away.

A server belongs to the replica that comes first by rendezvous hash (of its id and the replica's target), so every
sender chooses alike without talking to the others, and a replica that goes away spreads its servers over the rest.
What must stay true:

* a batch is acknowledged when each of its rows is acknowledged by some replica; a row that one replica may have taken
  before it went away is sent again to another, and is the same point there;
* a replica is told a server's descriptor and a metric set before the first row that needs them, also when the server
  comes to it from another one, when whoever told us of it did so before we were started, and when it lost its data, or
  the last of them, as one that was restored from a backup has;
* with one replica nothing of this costs anything.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from fleet.codec import descriptor_to_pb, rows_from_pb, rows_to_pb
from fleet.model import ServerDescriptor
from fleet.validation import MAX_ROW_ERRORS, check_batch
from openmanager.fleet.v1 import metric_pb2
from openmanager.timeseries.v1 import timeseries_pb2, timeseries_pb2_grpc
from runtime.channel import Channel, calling
from runtime.circuit import Circuit, CircuitState
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted, Unavailable
from runtime.limits import MAX_MESSAGE_BYTES

REMEMBERED_SERVERS = 65_536
SERVERS_TOGETHER = 5_000
"""Told in one call without rows."""

FULL = frozenset({"DISK_FULL", "HEADS_FULL"})
"""Reasons for which a replica takes no rows, and keeps nothing of those that it is sent, until somebody makes room."""

GONE_REASON = "PEER_UNAVAILABLE"
"""Of a failure that is not the process's own word."""

Describe = Callable[[str], ServerDescriptor | None]
"""What is known elsewhere of a server."""


def nobody_knows(_server_id: str) -> None:
    """There is no elsewhere."""


class Replica:
    """One timeseries process, and what it has been told."""

    def __init__(self, channel: Channel, clock: Clock) -> None:
        self.target = channel.target
        self.circuit = Circuit(f"timeseries replica {channel.target}", clock)
        self._stub = timeseries_pb2_grpc.TimeSeriesServiceStub(channel.grpc)
        self._durable_sets: set[str] = set()  # it has acknowledged them
        self._told: dict[str, ServerDescriptor] = {}
        self._sequence = 0  # the highest that it gave a batch
        self._may_lack = False  # it was gone, or gives sequences again

    def forget_set(self, set_id: str) -> None:
        """The set is held no more: it is sent again with the next rows that use it."""
        self._durable_sets.discard(set_id)

    def lacks(self, server: ServerDescriptor) -> bool:
        """Whether it was not told that this is what the server is."""
        return self._told.get(server.server_id) != server

    def was_told_of(self, server_id: str) -> bool:
        """Whether it was told anything of the server."""
        return server_id in self._told

    async def append(
        self,
        batch: metric_pb2.MetricBatch,
        metric_set: metric_pb2.MetricSet | None,
        servers: Sequence[ServerDescriptor],
    ) -> timeseries_pb2.AppendResponse:
        """Returns once it has acknowledged the rows; `metric_set` is theirs, None: unknown here."""
        if self._may_lack:
            try:
                await self._tell_again()
            except Unavailable as error:
                if error.reason == GONE_REASON:
                    raise  # else it may still take rows, as one whose store does not follow
        request = timeseries_pb2.AppendRequest(batch=batch, servers=[descriptor_to_pb(server) for server in servers])
        if metric_set is not None and metric_set.id not in self._durable_sets:
            request.metric_sets.append(metric_set)
        try:
            response = await self._send(request)
        except FailedPrecondition as error:
            if error.reason != "METRIC_SET_UNKNOWN" or request.metric_sets or metric_set is None:
                raise
            await self._tell_again()  # it has lost its data since it acknowledged the set
            request.metric_sets.append(metric_set)
            response = await self._send(request)
        if metric_set is not None:
            self._durable_sets.add(metric_set.id)
        self._told.update((server.server_id, server) for server in servers)
        return response

    async def _send(self, request: timeseries_pb2.AppendRequest) -> timeseries_pb2.AppendResponse:
        """Sends the rows, after what they need where both are too much for one message."""
        if (request.metric_sets or request.servers) and request.ByteSize() > MAX_MESSAGE_BYTES:
            await self._call(timeseries_pb2.AppendRequest(metric_sets=request.metric_sets, servers=request.servers))
            request = timeseries_pb2.AppendRequest(batch=request.batch)
        return await self._call(request)

    async def _tell_again(self) -> None:
        """Tells of all servers, whose rows would have no tags in the stores that follow; sets come with their rows."""
        self._durable_sets.clear()
        told = [descriptor_to_pb(server) for server in self._told.values()]
        for start in range(0, len(told), SERVERS_TOGETHER):
            await self._call(timeseries_pb2.AppendRequest(servers=told[start : start + SERVERS_TOGETHER]))
        self._may_lack = False

    async def _call(self, request: timeseries_pb2.AppendRequest) -> timeseries_pb2.AppendResponse:
        """Notes what says that it may be another one now: it was restored, and had to be stopped for that."""
        before = self._sequence
        try:
            async with calling("timeseries"):
                response: timeseries_pb2.AppendResponse = await self._stub.Append(request)
        except Unavailable as error:
            self._may_lack |= error.reason == GONE_REASON
            raise
        if 0 < response.sequence <= before:  # it had given that before it was asked for this
            self._may_lack, self._sequence = True, response.sequence
        else:
            self._sequence = max(self._sequence, response.sequence)
        return response


class Replicas:
    """All of them."""

    def __init__(self, channels: Sequence[Channel], clock: Clock, describe: Describe = nobody_knows) -> None:
        """Takes at least one channel, each to another process; `describe` is asked of servers that nobody told of."""
        self._describe = describe
        self._replicas = tuple(Replica(channel, clock) for channel in channels)
        self._order = lru_cache(maxsize=REMEMBERED_SERVERS)(self._ordered)

    def forget_set(self, set_id: str) -> None:
        """The set is held no more."""
        for replica in self._replicas:
            replica.forget_set(set_id)

    async def append(
        self,
        batch: metric_pb2.MetricBatch,
        metric_set: metric_pb2.MetricSet | None,
        news: Sequence[ServerDescriptor],
        known: Mapping[str, ServerDescriptor],
    ) -> timeseries_pb2.AppendResponse:
        """Returns once every row is acknowledged.

        Args:
            batch: the rows.
            metric_set: the set of the rows, with its id; None: not known here.
            news: servers that are new or have changed.
            known: what is known of servers, without the news.

        Raises:
            InvalidArgument: a structural fault; nothing was kept.
            Unavailable, DeadlineExceeded, ResourceExhausted: no replica takes some of the rows; others may be kept.
                Send all again.
        """
        if len(self._replicas) == 1:
            return await self._replicas[0].append(batch, metric_set, news)
        if metric_set is not None:
            check_batch(batch, len(metric_set.metrics))
        servers = known if not news else {**known, **{server.server_id: server for server in news}}
        return await self._spread(batch, metric_set, [server.server_id for server in news], servers)

    async def _spread(
        self,
        batch: metric_pb2.MetricBatch,
        metric_set: metric_pb2.MetricSet | None,
        told: Iterable[str],
        servers: Mapping[str, ServerDescriptor],
    ) -> timeseries_pb2.AppendResponse:
        joined = timeseries_pb2.AppendResponse()
        rows_left, told_left = {index: row.server_id for index, row in enumerate(batch.rows)}, list(told)
        failed: set[int] = set()
        while rows_left or told_left:
            parts: dict[int, tuple[list[int], set[str]]] = {}
            for index, server_id in rows_left.items():
                rows, described = parts.setdefault(self._choose(server_id, failed), ([], set()))
                rows.append(index)
                described.add(server_id)
            for server_id in told_left:
                parts.setdefault(self._choose(server_id, failed), ([], set()))[1].add(server_id)
            chosen = list(parts.items())
            answers = await asyncio.gather(
                *(self._send(number, batch, metric_set, *part, servers) for number, part in chosen),
                return_exceptions=True,
            )
            error: BaseException | None = None
            for (number, (rows, described)), answer in zip(chosen, answers, strict=True):
                if isinstance(answer, BaseException):
                    if not _another_may_take_it(answer):
                        raise answer
                    failed.add(number)
                    error = answer
                    continue
                _add(joined, answer, rows)
                for index in rows:
                    del rows_left[index]
                told_left = [server_id for server_id in told_left if server_id not in described]
            if error is not None and len(failed) == len(self._replicas):
                raise error
        return joined

    async def _send(
        self,
        number: int,
        batch: metric_pb2.MetricBatch,
        metric_set: metric_pb2.MetricSet | None,
        rows: list[int],
        server_ids: Iterable[str],
        servers: Mapping[str, ServerDescriptor],
    ) -> timeseries_pb2.AppendResponse:
        replica = self._replicas[number]
        known = (
            servers.get(server_id) or (None if replica.was_told_of(server_id) else self._describe(server_id))
            for server_id in sorted(server_ids)
        )
        descriptors = [server for server in known if server is not None and replica.lacks(server)]
        part = batch if len(rows) == len(batch.rows) else _selected(batch, metric_set, rows)
        with replica.circuit.attempt():
            return await replica.append(part, metric_set if rows else None, descriptors)

    def _choose(self, server_id: str, failed: set[int]) -> int:
        """The first replica for a server that is not known to be away; of those alone, the first that did not fail."""
        left = [number for number in self._order(server_id) if number not in failed]
        there = (number for number in left if self._replicas[number].circuit.state is not CircuitState.OPEN)
        return next(there, left[0])

    def _ordered(self, server_id: str) -> tuple[int, ...]:
        def weight(number: int) -> bytes:
            text = f"{self._replicas[number].target}\n{server_id}"
            return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()

        return tuple(sorted(range(len(self._replicas)), key=weight, reverse=True))


def _another_may_take_it(error: BaseException) -> bool:
    """Whether it is this replica alone that cannot take rows: it is away, or its disk or memory is full."""
    if isinstance(error, ResourceExhausted):
        return error.reason in FULL
    return isinstance(error, Unavailable | DeadlineExceeded)


def _selected(
    batch: metric_pb2.MetricBatch, metric_set: metric_pb2.MetricSet | None, rows: list[int]
) -> metric_pb2.MetricBatch:
    """Some rows of a batch, in order."""
    if metric_set is None or not rows:
        return metric_pb2.MetricBatch()
    chosen = np.zeros(len(batch.rows), np.bool_)
    chosen[rows] = True
    return rows_to_pb(rows_from_pb(batch, len(metric_set.metrics)).select(chosen))


def _add(joined: timeseries_pb2.AppendResponse, answer: timeseries_pb2.AppendResponse, rows: Sequence[int]) -> None:
    """Adds a replica's answer; its errors name rows by their place in what it was sent."""
    joined.sequence = joined.sequence or answer.sequence
    joined.accepted_points += answer.accepted_points
    joined.rejected_points += answer.rejected_points
    for error in answer.errors[: MAX_ROW_ERRORS - len(joined.errors)]:
        place = rows[error.row]
        joined.errors.add(
            row=place,
            field=error.field.replace(f"rows[{error.row}]", f"rows[{place}]"),
            reason=error.reason,
            message=error.message,
        )
