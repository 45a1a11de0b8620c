"""The rows that wait for the cache: a latest-wins slot for each sender's group of servers.

While the cache keeps up, a batch passes through as it is. While it is away, a batch of the same set and servers
replaces the one before, unless all of its rows are older (a back-fill beside what is measured now), so an outage of any
length costs the memory of one tick. The bound on values only matters when senders regroup their servers all the time;
what it drops is counted, and the history has it all the same.
"""

from collections.abc import Sequence

from opentelemetry.context import Context

from fleet.codec import ms_from_timestamp
from fleet.validation import MAX_AHEAD_MS
from openmanager.fleet.v1 import metric_pb2

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
        """Puts a batch into its slot, if what is there is not later; ``context`` is its trace.

        `now_ms`: our clock. What lies too far ahead of it is not taken for later: the cache refuses it.
        """
        key = _key(batch)
        waiting = self._slots.get(key)
        if waiting is not None and _is_later(waiting, batch, now_ms):
            return
        self._context = context
        self._remove(key)
        self._put(key, batch)
        while self._values > MAX_WAITING_VALUES and len(self._slots) > 1:
            self._remove(next(iter(self._slots)))
            self.dropped_batches += 1

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
            waiting = self._slots.get(key)
            if waiting is None or not _is_later(waiting, batch, now_ms):
                self._remove(key)
                self._put(key, batch)
        if not newer:
            self._context = context

    def __len__(self) -> int:
        return len(self._slots)

    def _put(self, key: _Key, batch: metric_pb2.MetricBatch) -> None:
        self._slots[key] = batch
        self._values += len(batch.values)

    def _remove(self, key: _Key) -> None:
        batch = self._slots.pop(key, None)
        if batch is not None:
            self._values -= len(batch.values)


def _is_later(waiting: metric_pb2.MetricBatch, batch: metric_pb2.MetricBatch, now_ms: int) -> bool:
    """Whether no row of a batch is news beside the same server's row that waits, and some are older."""
    theirs, ours = ([ms_from_timestamp(row.time) for row in one.rows] for one in (waiting, batch))
    return theirs != ours and all(
        our <= their <= now_ms + MAX_AHEAD_MS for our, their in zip(ours, theirs, strict=True)
    )


def _key(batch: metric_pb2.MetricBatch) -> _Key:
    return batch.metric_set_id, tuple(row.server_id for row in batch.rows)
