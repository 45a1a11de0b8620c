"""The findings that go on and those that changed lately, mirrored from metadata for whoever watches.

A watcher is a version and nothing more, as in `changes`: the time of the last change that he has, which means the same
in every gateway process. What must stay true: who has a version is given every finding that changed since, once, as it
is now, or is told that what he has is void; nothing that is known is newer than the version; while metadata is away
servers are watched all the same.
"""

from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from typing import Final

from fleet.codec import us_from_timestamp
from gateway.state import FleetState
from gateway.watchers import Watchers
from openmanager.fleet.v1 import anomaly_pb2
from openmanager.gateway.v1 import analytics_pb2
from openmanager.metadata.v1 import anomaly_pb2 as metadata_pb2
from openmanager.metadata.v1 import anomaly_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import InvalidArgument, Unavailable

KEPT: Final = 2_000
"""Findings that are over; who is behind by more is given those that go on, anew."""
KNOWN_FOR_S: Final = 3_600
"""A gateway that starts asks for what changed since so long, for watchers that another one had."""
MAX_WATCHERS: Final = 1_000
AHEAD_MS: Final = 60_000
"""A version may be so far ahead of our clock and of what metadata has told, since gateways are not equally far. Who has
one further ahead would hear of nothing."""

_NOT_YET: Final = ("", 0)
Anomaly = anomaly_pb2.Anomaly
Wants = Callable[[str], bool]
"""Whether a watcher wants findings of a server."""


class Findings:
    """The mirror. ``follow`` keeps it up to date for as long as it runs."""

    def __init__(self, metadata: Channel, state: FleetState, clock: Clock) -> None:
        self._stub = anomaly_pb2_grpc.AnomalyStoreServiceStub(metadata.grpc)
        self._state = state
        self._clock = clock
        self._known: dict[str, Anomaly] = {}
        self._complete_from = 0
        self._lacks = False
        """Whether findings of a day ago and before may be missing."""
        self._watchers = Watchers(MAX_WATCHERS, "findings")
        self._moved: tuple[object, bool] = (None, False)
        self.version = 0
        """The time of the last change, microseconds since the Unix epoch; 0: metadata was never reached."""

    async def follow(self) -> None:
        """Mirrors metadata until the stream breaks.

        Raises:
            OpenManagerError: it broke; what is known stays.
        """
        after = self.version or (self._clock.now_ms() - KNOWN_FOR_S * 1_000) * 1_000
        waiting: list[Anomaly] = []
        partial: bool | None = None  # whether the snapshot that waits is
        newest = 0  # of what waits: the snapshot has changes that come once more behind it, in their place
        async with calling("metadata"):
            async for message in self._stub.FollowAnomalies(metadata_pb2.FollowAnomaliesRequest(after_version=after)):
                waiting += message.anomalies
                newest = max([newest, *map(_version, message.anomalies)])
                if message.snapshot and not message.continues:
                    partial = message.partial
                if message.continues or message.version < newest:
                    continue
                # of a snapshot it is the version that was asked for: a first one no other gateway knows
                if message.snapshot and not self.version:
                    continue
                if not self.version:
                    self._complete_from = min(after, message.version)  # nothing has changed in between
                self._take(waiting, message.version)
                waiting = []
                filled = self._lacks and partial is False
                if partial is not None:
                    self._lacks, partial = partial, None
                if filled:  # with findings that are older than what watchers have: they are given all that go on
                    self.version += 1
                    self._complete_from = self.version

    def _take(self, anomalies: Iterable[Anomaly], version: int) -> None:
        """Takes all that changed up to a version at once: a watcher has what he was told by its version."""
        for anomaly in anomalies:
            before = self._known.get(anomaly.id)
            if before is None or _version(before) < _version(anomaly):
                self._known[anomaly.id] = anomaly
        self._forget()
        self.version = max(self.version, version)
        self._state.wake()

    def _forget(self) -> None:
        over = [one for one in self._known.values() if one.HasField("end_time")]
        if len(over) > KEPT + KEPT // 4:  # a quarter at a time
            over.sort(key=_version)
            for one in over[: len(over) - KEPT]:
                self._complete_from = max(self._complete_from, _version(one))
                del self._known[one.id]

    def since(self, version: int) -> list[Anomaly] | None:
        """What changed after a version, in that order; after 0, what goes on. None: it is not known any more, or the
        version is of a time to come, of a clock that was wrong."""
        if version > max(self.version, (self._clock.now_ms() + AHEAD_MS) * 1_000):
            return None
        if not self.version or version >= self.version:
            return []
        if not version:
            found = [one for one in self._known.values() if not one.HasField("end_time")]
        elif version < self._complete_from:
            return None
        else:
            found = [one for one in self._known.values() if _version(one) > version]
        return sorted(found, key=_version)

    def of(self, server_ids: Collection[str]) -> dict[str, list[Anomaly]]:
        """What is known of servers: what goes on, and what has changed lately."""
        found: dict[str, list[Anomaly]] = {}
        for one in sorted(self._known.values(), key=_version):
            if one.server_id in server_ids:
                found.setdefault(one.server_id, []).append(one)
        return found

    async def watch(
        self, wants: Wants, after_version: str, *, by_place: bool = False, mark: str = ""
    ) -> AsyncGenerator[analytics_pb2.WatchAnomaliesResponse, None]:
        """Yields what goes on, then what changes, until it is closed.

        Args:
            wants: whose findings; asked anew for each.
            after_version: what the watcher has.
            by_place: what he wants depends on where servers are: when one of which something goes on has come to its
                place or has left the fleet, he is given all that goes on, anew; so he is where he goes on with a
                version, after what changed, as nobody knows where servers were then.
            mark: of his scope; with a version of another one he has nothing.

        Raises:
            InvalidArgument: field after_version.
            ResourceExhausted: MAX_WATCHERS.
            Unavailable: metadata was never reached.
        """
        version = _parsed(after_version, mark)
        end = f"@{mark}" if mark else ""
        looked = _NOT_YET if version else self._looked
        if not self.version:
            raise Unavailable("the findings have not been received from metadata yet", retry_after_s=1.0)
        with self._watchers.counted():
            while True:
                reached, found = self.version, self.since(version)
                if found is None:
                    version, found = 0, self.since(0)
                is_whole = not version
                if is_whole:
                    looked = self._looked
                shown = [one for one in found or () if wants(one.server_id)]
                if shown or is_whole:
                    yield analytics_pb2.WatchAnomaliesResponse(
                        version=f"{reached}{end}", snapshot=is_whole, anomalies=shown
                    )
                version = max(version, reached)  # another gateway may have been further
                while version >= self.version:
                    if by_place and self._moved_since(looked):
                        looked = self._looked
                        shown = [one for one in self.since(0) or () if wants(one.server_id)]
                        yield analytics_pb2.WatchAnomaliesResponse(
                            version=f"{version}{end}", snapshot=True, anomalies=shown
                        )
                        continue
                    looked = self._looked
                    await self._state.changed()

    @property
    def _looked(self) -> tuple[str, int]:
        """A state of the fleet."""
        return self._state.epoch, self._state.sequence

    def _moved_since(self, looked: tuple[str, int]) -> bool:
        """Whether a server of which something goes on has come to its place, or has left the fleet, since a state; kept
        for the next one, as most watchers looked last at the same."""
        asked = looked, self._looked, self.version
        if self._moved[0] != asked:
            self._moved = asked, looked != self._looked and self._has_moved(*looked)
        return self._moved[1]

    def _has_moved(self, epoch: str, sequence: int) -> bool:
        removed = self._state.removed_after(sequence) if epoch == self._state.epoch else None
        if removed is None:
            return True
        gone = {one.id for one in removed}
        for server_id in {one.server_id for one in self._known.values() if not one.HasField("end_time")}:
            entry = self._state.find(server_id)
            if server_id in gone if entry is None else entry.placed_at > sequence:
                return True
        return False


def _version(anomaly: Anomaly) -> int:
    return us_from_timestamp(anomaly.update_time)


def _parsed(version: str, mark: str) -> int:
    number, _, marked = version.partition("@")
    if version and (not number.isdecimal() or len(number) > 18 or len(marked) > 16):
        raise InvalidArgument("not a version, as a message of this stream has one", field="after_version")
    return int(number or 0) if marked == mark else 0
