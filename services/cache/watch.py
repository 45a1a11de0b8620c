"""The stream of changes.

A watcher is a place in the order of changes and nothing more: its next message holds every server whose state changed
since, once, as it is now, however long it took to read the last one. That is a latest-wins slot for each server without
any memory for each watcher; and since a message depends only on where a watcher is and where the state is, watchers
that keep up share one and the same bytes.

What must stay true: after applying any prefix of a stream a watcher knows every server as it was at the message's
version (while `snapshot` is spread over several messages, those servers that were sent); no message needs a metric
set that the stream has not held.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fleet.model import MetricSet
from openmanager.cache.v1 import cache_pb2
from runtime.clock import Clock
from runtime.errors import ResourceExhausted
from services.cache.model import ServerState
from services.cache.state import LiveState
from services.cache.wire import Encoder, delimited, sets_of, tag

MAX_WATCHERS = 256
"""Streams at once; one more is refused with RESOURCE_EXHAUSTED."""
WATCH_INTERVAL_S = 0.05
"""The least time between two messages of a stream, so that a fleet of agents with ticks of their own is not as many
messages. A change after a longer pause goes out at once."""
MAX_WATCH_MESSAGE_BYTES = 1 << 20
"""A message ends with the state that reaches this; the next one follows at once. 250 states of 511 metrics, 3-5 ms."""
MAX_REMOVED_PER_MESSAGE = 10_000
"""A watcher that is behind by more removals starts over with a snapshot."""

_RESPONSE = cache_pb2.WatchServersResponse
_STATE_TAG = tag(_RESPONSE.STATES_FIELD_NUMBER)
_REMOVED_TAG = tag(_RESPONSE.REMOVED_SERVER_IDS_FIELD_NUMBER)
_SET_TAG = tag(_RESPONSE.METRIC_SETS_FIELD_NUMBER)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """What every watcher at one place gets: the bytes without metric sets, the place after it, the sets it needs.

    Attributes:
        more: the states did not fit; the rest is to follow at once.
    """

    data: bytes
    place: int
    sets: dict[str, MetricSet]
    more: bool


class Watchers:
    """All running streams."""

    def __init__(self, live: LiveState, encoder: Encoder, clock: Clock) -> None:
        self._live = live
        self._encoder = encoder
        self._clock = clock
        self._changed = asyncio.Event()
        self._count = 0
        self._messages: dict[int | None, _Message] = {}  # by place; of the current sequence only
        self._messages_at = 0

    def __len__(self) -> int:
        return self._count

    def notify(self) -> None:
        """Says that the state has changed."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Yields serialized WatchServersResponses until it is closed.

        Raises:
            ResourceExhausted: MAX_WATCHERS.
        """
        if self._count >= MAX_WATCHERS:
            raise ResourceExhausted(
                f"there are {self._count} watchers already (MAX_WATCHERS)", metadata={"limit": "MAX_WATCHERS"}
            )
        self._count += 1
        try:
            place: int | None = None
            sent: set[str] = set()
            while True:
                message = self._message(place)
                sent_at_s = self._clock.monotonic()
                yield message.data + self._unsent(message.sets, sent)
                place = message.place
                if message.more:
                    continue
                while self._live.sequence == place:
                    await self._changed.wait()
                if self._clock.monotonic() < sent_at_s + WATCH_INTERVAL_S:
                    await self._clock.sleep_until(sent_at_s + WATCH_INTERVAL_S)
        finally:
            self._count -= 1

    def _unsent(self, sets: dict[str, MetricSet], sent: set[str]) -> bytes:
        if sets.keys() <= sent:
            return b""
        parts: list[bytes] = []
        for set_id, metric_set in sets.items():
            if set_id not in sent:
                parts += (_SET_TAG, self._encoder.metric_set(metric_set))
        sent.update(sets)
        return b"".join(parts)

    def _message(self, place: int | None) -> _Message:
        if place is not None and place < self._live.oldest_removal:
            place = None
        if self._messages_at != self._live.sequence:
            self._messages, self._messages_at = {}, self._live.sequence
        message = self._messages.get(place)
        if message is None:
            message = self._messages[place] = self._build(place)
        return message

    def _build(self, place: int | None) -> _Message:
        states = self._live.changed_after(place or 0)
        removed = [] if place is None else self._live.removed_after(place)
        if len(removed) > MAX_REMOVED_PER_MESSAGE:
            return self._message(None)
        parts, taken = self._fitting(states)
        more = len(taken) < len(states)
        after = taken[-1].sequence if more else self._live.sequence
        for server_id, sequence in removed:
            if sequence <= after:
                parts += (_REMOVED_TAG, delimited(server_id.encode()))
        version = cache_pb2.Version(epoch=self._live.epoch, sequence=after)
        head = _RESPONSE(version=version, snapshot=place is None, continues=more).SerializeToString()
        return _Message(data=head + b"".join(parts), place=after, sets=sets_of(taken), more=more)

    def _fitting(self, states: list[ServerState]) -> tuple[list[bytes], list[ServerState]]:
        """As many states, in order, as one message may hold with their sets; at least one of any."""
        parts: list[bytes] = []
        sets: set[str] = set()
        size = 0
        for count, state in enumerate(states, start=1):
            data = self._encoder.state(state)
            parts += (_STATE_TAG, data)
            size += len(data) + 1
            for sample in state.samples:
                if sample.metric_set.id not in sets:
                    sets.add(sample.metric_set.id)
                    size += len(self._encoder.metric_set(sample.metric_set))
            if size >= MAX_WATCH_MESSAGE_BYTES:
                return parts, states[:count]
        return parts, states
