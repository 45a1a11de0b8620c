"""The rows that wait for the cache: a latest-wins slot for each sender's group of servers.

While the cache keeps up, a batch passes through as it is. While it is away, a newer batch of the same set and servers
replaces the older one, so an outage of any length costs the memory of one tick. Rows that were measured before those
that wait, since a sender makes up for what it could not send, replace none. The bound on values only matters when
senders regroup their servers all the time; what it drops is counted, and the history has it all the same.
"""

from collections.abc import Sequence

import numpy as np
from opentelemetry.context import Context

from fleet.codec import rows_from_pb, rows_to_pb
from fleet.model import Rows
from fleet.validation import MAX_AHEAD_MS
from openmanager.fleet.v1 import metric_pb2
from runtime import telemetry

_dropped = telemetry.meter(__name__).create_counter(
    "openmanager.writer.dropped_batches", unit="{batch}", description="Batches that the cache was never told of."
)

MAX_WAITING_VALUES = 25_000_000
"""200 MB: two ticks of 20,000 servers x 511 metrics."""

MAX_REQUEST_VALUES = 1_000_000
"""Taken at once: 8 MB."""

_Key = tuple[str, tuple[str, ...]]


class PendingRows:
    """Batches by set and servers, in order of arrival."""

    def __init__(self) -> None:
        self._slots: dict[_Key, metric_pb2.MetricBatch] = {}
        self._context = Context()
        self._values = 0
        self.dropped_batches = 0

    def add(self, batch: metric_pb2.MetricBatch, context: Context, now_ms: int) -> None:
        """Puts a batch into its slot; ``context`` is its trace.

        `now_ms`: our clock. What waits and lies too far ahead of it counts as measured before: the cache refuses it.
        """
        self._context = context
        self._replace(_key(batch), batch, now_ms)
        while self._values > MAX_WAITING_VALUES and len(self._slots) > 1:
            self._remove(next(iter(self._slots)))
            self.dropped_batches += 1
            _dropped.add(1)

    def take(self) -> tuple[list[metric_pb2.MetricBatch], Context]:
        """Takes the oldest batches out, as many as fit one call, and the trace of the newest."""
        taken: list[metric_pb2.MetricBatch] = []
        values = 0
        for key, batch in list(self._slots.items()):
            if taken and values + len(batch.values) > MAX_REQUEST_VALUES:
                break
            values += len(batch.values)
            taken.append(batch)
            self._remove(key)
        return taken, self._context

    def give_back(self, batches: Sequence[metric_pb2.MetricBatch], context: Context, now_ms: int) -> None:
        """Puts batches back that could not be delivered, unless a newer one has taken the slot."""
        newer = self._slots
        self._slots, self._values = {}, 0
        for batch in batches:
            self._put(_key(batch), batch)
        for key, batch in newer.items():
            self._replace(key, batch, now_ms)
        if not newer:
            self._context = context

    def __len__(self) -> int:
        return len(self._slots)

    def _replace(self, key: _Key, batch: metric_pb2.MetricBatch, now_ms: int) -> None:
        waiting = self._slots.get(key)
        self._remove(key)
        self._put(key, batch if waiting is None else _latest(waiting, batch, now_ms))

    def _put(self, key: _Key, batch: metric_pb2.MetricBatch) -> None:
        self._slots[key] = batch
        self._values += len(batch.values)

    def _remove(self, key: _Key) -> None:
        batch = self._slots.pop(key, None)
        if batch is not None:
            self._values -= len(batch.values)


def _key(batch: metric_pb2.MetricBatch) -> _Key:
    return batch.metric_set_id, tuple(row.server_id for row in batch.rows)


def _latest(waiting: metric_pb2.MetricBatch, batch: metric_pb2.MetricBatch, now_ms: int) -> metric_pb2.MetricBatch:
    """Of each row of two batches of the same servers the one measured later, the second one's where both are of one
    time."""
    if all(_time(new) >= _time(old) for old, new in zip(waiting.rows, batch.rows, strict=True)):
        return batch
    metrics = len(batch.values) // len(batch.rows)
    old, new = rows_from_pb(waiting, metrics), rows_from_pb(batch, metrics)
    later = (new.times_ms >= old.times_ms) | (old.times_ms > now_ms + MAX_AHEAD_MS)
    return rows_to_pb(
        Rows(
            metric_set_id=new.metric_set_id,
            server_ids=new.server_ids,
            times_ms=np.where(later, new.times_ms, old.times_ms),
            values=np.where(later[:, np.newaxis], new.values, old.values),
        )
    )


def _time(row: metric_pb2.MetricRow) -> tuple[int, int]:
    return row.time.seconds, row.time.nanos
