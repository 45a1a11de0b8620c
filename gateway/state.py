"""The live state of the fleet, mirrored from the cache so that a read is a look-up.

The gateway subscribes to the cache. While the subscription is broken (the cache is restarted, say) the cache is asked
instead, at most once in ASK_INTERVAL_S for all readers together; when it does not answer either, the last known state
is served, and ``age_s`` says how old it is.

What must stay true: a whole state takes the place of the one before at once, never in parts; entries are in the order
of the cache's sequence, so that a version (epoch and sequence) means the same in every gateway process; what a reader
is given is made once a version and only when somebody reads it.
"""

import asyncio
import hashlib
import math
from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable
from itertools import takewhile
from typing import Final, NamedTuple

from fleet.codec import descriptor_from_pb, metric_set_from_pb
from fleet.model import ServerDescriptor
from gateway.entry import Places, ServerEntry, Sets
from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from runtime import deadline
from runtime.channel import Channel, calling
from runtime.circuit import Circuit
from runtime.clock import Clock
from runtime.errors import OpenManagerError, Unavailable
from runtime.prepared import Prepared

ASK_INTERVAL_S: Final = 1.0
ASK_TIMEOUT_S: Final = 0.5
MAX_REMOVED: Final = 10_000
"""Removals that are remembered; who is behind by more is given everything anew."""
MAX_GAPS: Final = 100
"""Stretches of sequences of which only the end was received; who is in the middle of one is given everything anew."""
MAX_UNUSED_METRICS: Final = 500_000
"""Metrics of sets that no server has any more, 400 bytes each: beyond these and as many as are in use the subscription
begins anew, since the cache sends a set once in each."""
MAX_KEPT_ANSWERS: Final = 512
MAX_KEPT_BYTES: Final = 32 << 20
"""Of answers about the fleet as it is now, of which JSON of about the same size may be kept too."""


class Removal(NamedTuple):
    """A server that is gone since a sequence, and the places that it had."""

    id: str
    sequence: int
    places: Places


class FleetState:
    """The mirror. ``follow`` keeps it up to date for as long as it runs."""

    def __init__(self, cache: Channel, clock: Clock) -> None:
        self._stub = cache_pb2_grpc.CacheServiceStub(cache.grpc)
        self._clock = clock
        self._circuit = Circuit("cache", clock)
        self._entries: dict[str, ServerEntry] = {}  # in order of sequence
        self._ids: list[str] = []  # in order
        self._removed: OrderedDict[str, Removal] = OrderedDict()  # by id, in order of sequence
        self._known_from = 0  # removals up to this sequence may be unknown
        self._gaps: deque[tuple[int, int]] = deque()  # sequences between which we did not listen, in order
        self._received_s: float | None = None
        self._change = asyncio.Event()
        self._kept: dict[object, Prepared] = {}
        self._kept_bytes = 0
        self._asked: asyncio.Task[None] | None = None
        self._asked_s = -math.inf
        self.epoch = ""
        self.sequence = 0
        self.following = False

    async def follow(self, on_snapshot: Callable[[], None]) -> None:
        """Mirrors the cache until the subscription breaks.

        Args:
            on_snapshot: called each time the whole state has been received.

        Raises:
            OpenManagerError: the subscription broke; the state stays as it is.
        """
        while True:
            await self._follow_once(on_snapshot)

    async def _follow_once(self, on_snapshot: Callable[[], None]) -> None:
        """Returns when the subscription has brought too many sets that are not used any more."""
        sets = self._used_sets()
        held = most = _metrics(sets)
        whole: list[cache_pb2.ServerState] | None = None
        try:
            async with calling("cache"):
                stream = self._stub.WatchServers(cache_pb2.WatchServersRequest())
                async for message in stream:
                    for pb in message.metric_sets:
                        if pb.id not in sets:
                            sets[pb.id] = metric_set_from_pb(pb)
                            held += len(pb.metrics)
                    if message.snapshot:  # anew, too, where too much happened between two parts of one
                        whole = []
                    if whole is None:
                        self._change_some(message, sets)
                    else:
                        gone = set(message.removed_server_ids)  # between two parts of a whole
                        whole = [state for state in whole if state.descriptor.server_id not in gone]
                        whole.extend(message.states)
                        if not message.continues:
                            self._replace(whole, message.version, sets)
                            whole = None
                            self.following = True
                            on_snapshot()
                    if whole is not None:
                        continue  # what is shown is what it was, and as old
                    self._tell()
                    if held > most:
                        most = 2 * _metrics(self._used_sets()) + MAX_UNUSED_METRICS
                        if held > most:
                            stream.cancel()
                            return
        finally:
            self.following = False

    def _used_sets(self) -> Sets:
        """The sets of what is known, by id."""
        used: Sets = {}
        for entry in self._entries.values():
            used.update(entry.sets)
        return used

    async def refresh(self) -> None:
        """While the subscription is broken: asks the cache, unless that was done a moment ago."""
        if self.following or (self._asked is None and self._clock.monotonic() < self._asked_s + ASK_INTERVAL_S):
            return
        if self._asked is None:
            self._asked = asyncio.create_task(self._ask(), name="ask-cache")
        await asyncio.shield(self._asked)

    async def _ask(self) -> None:
        deadline.current.set(None)  # it is for all readers, not only for the one that began it
        try:
            with self._circuit.attempt():
                async with calling("cache"):
                    answer = await self._stub.ListServerStates(
                        cache_pb2.ListServerStatesRequest(), timeout=ASK_TIMEOUT_S
                    )
        except OpenManagerError:  # its age is told with the state
            return
        finally:
            self._asked, self._asked_s = None, self._clock.monotonic()
        version = answer.version
        overtaken = version.epoch == self.epoch and version.sequence < self.sequence  # by a subscription meanwhile
        if not self.following and not overtaken:
            sets = {pb.id: metric_set_from_pb(pb) for pb in answer.metric_sets}
            self._replace(sorted(answer.states, key=lambda state: state.sequence), version, sets)
            self._tell()

    def _replace(self, states: Iterable[cache_pb2.ServerState], version: cache_pb2.Version, sets: Sets) -> None:
        """Takes a whole state, in order of sequence; one that came twice in parts is as it was the last time."""
        before, goes_on = self._entries, version.epoch == self.epoch
        entries: dict[str, ServerEntry] = {}
        for state in states:
            server_id = state.descriptor.server_id
            entries.pop(server_id, None)
            entry = before.get(server_id)
            if entry is None or (entry.epoch, entry.sequence) != (version.epoch, state.sequence):
                entry = ServerEntry(state, sets, version.epoch, entry, self._places_before(server_id, version.epoch))
            entries[server_id] = entry
        if not goes_on:
            self._removed.clear()
            self._gaps.clear()
            self._known_from = version.sequence
        else:
            self._remember_gap(self.sequence, version.sequence)
        self.epoch, self.sequence = version.epoch, version.sequence
        self._entries, self._ids = entries, sorted(entries)
        for server_id in entries:
            self._removed.pop(server_id, None)
        for server_id in before.keys() - entries.keys() if goes_on else ():
            self._remember_removed(before[server_id])

    def _change_some(self, message: cache_pb2.WatchServersResponse, sets: Sets) -> None:
        version, before_it = message.version, self.sequence
        self.sequence = version.sequence
        if any(server_id not in self._entries for server_id in message.removed_server_ids):
            self._remember_gap(before_it, version.sequence)  # they came and went: others may have told of both
        for server_id in message.removed_server_ids:
            gone = self._entries.pop(server_id, None)
            if gone is not None:
                self._ids.remove(server_id)
                self._remember_removed(gone)
        for state in message.states:
            server_id = state.descriptor.server_id
            before = self._entries.pop(server_id, None)
            places = self._places_before(server_id, version.epoch)
            if before is None:
                insort(self._ids, server_id)
                self._removed.pop(server_id, None)
            self._entries[server_id] = ServerEntry(state, sets, version.epoch, before, places)

    def _places_before(self, server_id: str, epoch: str) -> Places:
        """Those of a server that was removed and comes back."""
        removal = self._removed.get(server_id)
        return frozenset() if removal is None or epoch != self.epoch else removal.places

    def _remember_removed(self, entry: ServerEntry) -> None:
        self._removed[entry.id] = Removal(entry.id, self.sequence, entry.places)
        self._removed.move_to_end(entry.id)
        while len(self._removed) > MAX_REMOVED:
            _, oldest = self._removed.popitem(last=False)
            self._known_from = oldest.sequence

    def _remember_gap(self, start: int, end: int) -> None:
        """Another gateway's readers may have seen servers, or places of servers, that came and went meanwhile."""
        if end <= start + 1:
            return
        self._gaps.append((start, end))
        if len(self._gaps) > MAX_GAPS:
            _, self._known_from = self._gaps.popleft()

    def _tell(self) -> None:
        self._received_s = self._clock.monotonic()
        self._kept, self._kept_bytes = {}, 0
        self.wake()

    def wake(self) -> None:
        """Has those who wait for a change look: of something beside it, too, that they were given."""
        self._change.set()
        self._change = asyncio.Event()

    @property
    def version(self) -> str:
        """Of the whole fleet: epoch and sequence."""
        return f"{self.epoch}-{self.sequence}"

    @property
    def known(self) -> bool:
        """Whether the fleet was ever received."""
        return self.epoch != ""

    @property
    def age_s(self) -> float:
        """How old the state may be, in seconds: 0 while the subscription stands, infinite when nothing was received."""
        if self.following:
            return 0.0
        return math.inf if self._received_s is None else self._clock.monotonic() - self._received_s

    def find(self, server_id: str) -> ServerEntry | None:
        """The server, or None, also while nothing was ever received."""
        return self._entries.get(server_id)

    def get(self, server_id: str) -> ServerEntry | None:
        """The server, or None.

        Raises:
            Unavailable: the fleet was never received.
        """
        self.check_known()
        return self._entries.get(server_id)

    def all(self) -> list[ServerEntry]:
        """Every server in order of id.

        Raises:
            Unavailable: the fleet was never received.
        """
        self.check_known()
        return [self._entries[server_id] for server_id in self._ids]

    def changed_after(self, sequence: int) -> list[ServerEntry]:
        """The servers that changed after a sequence of this epoch, in order; costs what changed."""
        newest_first = takewhile(lambda entry: entry.sequence > sequence, reversed(self._entries.values()))
        return list(newest_first)[::-1]

    def removed_after(self, sequence: int) -> list[Removal] | None:
        """The servers that went after a sequence of this epoch, in order; None: not all are known, or not all that a
        reader has seen who is there."""
        if sequence < self._known_from or any(start < sequence < end for start, end in self._gaps):
            return None
        newest_first = takewhile(lambda removal: removal.sequence > sequence, reversed(self._removed.values()))
        return list(newest_first)[::-1]

    def descriptor(self, server_id: str) -> ServerDescriptor | None:
        """What is known of a server; None for an unknown one."""
        entry = self._entries.get(server_id)
        return None if entry is None else descriptor_from_pb(entry.state.descriptor)

    def revision(self, server_id: str) -> int | None:
        """Of what is known of a server's record; None for an unknown server."""
        entry = self._entries.get(server_id)
        return None if entry is None else entry.revision

    async def kept(self, question: object, make: Callable[[], Awaitable[bytes]], *, part: object = None) -> Prepared:
        """The answer to a question about the whole fleet, made once a version.

        `part`: of which part of the fleet (None: the whole); its tag tells nothing of what happens elsewhere.
        """
        found = self._kept.get((question, part))
        if found is None:
            kept, version = self._kept, self.version
            data = await make()
            found = Prepared(data, etag=version if part is None else content_tag(data))
            if kept is self._kept and len(kept) < MAX_KEPT_ANSWERS:
                size = self._kept_bytes + len(found.data)
                if size <= MAX_KEPT_BYTES:
                    kept[question, part], self._kept_bytes = found, size
        return found

    def __contains__(self, server_id: object) -> bool:
        return server_id in self._entries

    async def changed(self) -> None:
        """Returns at the next change."""
        await self._change.wait()

    async def until(self, condition: Callable[[], bool], within_s: float) -> bool:
        """Waits for the mirror to satisfy a condition; tells whether it did in time."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    await self.changed()
        except TimeoutError:
            return False
        return True

    def check_known(self) -> None:
        """Raises Unavailable while nothing was ever received."""
        if not self.known:
            raise Unavailable("the live state has not been received from the cache yet", retry_after_s=1.0)


def content_tag(data: bytes) -> str:
    """An entity tag of nothing but the answer itself."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _metrics(sets: Sets) -> int:
    return sum(map(len, sets.values()))
