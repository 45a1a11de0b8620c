"""What watchers of the fleet are sent.

A watcher is a version and nothing more: its next message holds every server that changed since, once, as it is now,
however long it took to read the last one. So a slow reader costs no memory; watchers that keep up and want the same
share the same bytes; and one that was cut off goes on from the last version that it saw, at any gateway process. Whose
scope is another one since is given everything anew: his version says what it was.

What must stay true: after any message a watcher knows every server as it was at the message's version (while a
snapshot goes on, those servers that were sent). Where it is not known what a reader may have seen, it is told that a
server is gone once too often rather than not at all. Findings (`findings`) come with the servers, and their version
is the last part of the fleet's.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from fleet.access import Scope
from fleet.codec import delimited
from gateway.entry import Places, ServerEntry
from gateway.findings import Anomaly, Findings
from gateway.state import FleetState, Removal
from gateway.watchers import Watchers
from openmanager.gateway.v1 import fleet_pb2
from runtime.clock import Clock
from runtime.errors import InvalidArgument
from runtime.prepared import Prepared

MAX_WATCHERS: Final = 5_000
WATCH_INTERVAL_S: Final = 0.05
"""The least time between two messages of a stream. A change after a longer pause goes out at once."""
MAX_WATCH_MESSAGE_BYTES: Final = 1 << 20
"""A message ends with the server that reaches this; the next one follows at once."""
MAX_SHARED: Final = 64
"""Messages of one version that are kept for others; who is at a place of his own has one made for him."""
TURN_S: Final = 0.0005
"""After so long of making bytes other calls get their turn; those of a server with 511 metrics take 0.3 ms."""

_RESPONSE = fleet_pb2.WatchFleetResponse
_VERSION: Final = re.compile(r"(.+)-([0-9]{1,19})(?:\.([0-9]{1,18}))?(?:@([0-9a-f]{16}))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which servers a reader wants and may see, and how much of them; an empty environment or role is any."""

    view: fleet_pb2.ServerView.ValueType
    environment: str = ""
    role: str = ""
    scope: Scope | None = None

    @property
    def mark(self) -> str:
        """Of the scope; empty: he sees all."""
        return "" if self.scope is None else self.scope.mark

    def has(self, entry: ServerEntry) -> bool:
        """Whether the server is one of them."""
        environment, role = entry.place
        if self.scope is not None and not self.scope.has(entry.id, environment, role):
            return False
        return self.environment in {"", environment} and self.role in {"", role}

    def has_finding(self, entry: ServerEntry | None) -> bool:
        """Whether he is told of findings of a server; None: one that is not in the fleet any more."""
        if entry is None:
            return self.scope is None and not self.environment and not self.role
        return self.has(entry)

    def may_know(self, server_id: str, places: Places) -> bool:
        """Whether the reader may have seen a server that had these places."""
        return self.scope is None or any(self.scope.has(server_id, *place) for place in places)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a reader is in an epoch: he has seen servers up to one sequence and knows who was gone at another, a later
    one in the middle of a snapshot, and has the findings up to a version. None: he has seen nothing."""

    servers: int
    gone: int
    findings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _News:
    """What there is to tell: servers that changed and that went up to a sequence, findings up to a version."""

    epoch: str
    sequence: int
    entries: list[ServerEntry]
    removed: list[Removal]
    findings: list[Anomaly]
    findings_version: int
    unseen: Mapping[str, list[Anomaly]]
    """By server: of those that have come into the reader's sight, who was not told of them before."""


@dataclass(frozen=True, slots=True)
class _Message:
    prepared: Prepared
    after: _Place
    more: bool
    is_empty: bool


class Changes:
    """All streams of one gateway process."""

    def __init__(self, state: FleetState, findings: Findings, clock: Clock) -> None:
        self._state = state
        self._findings = findings
        self._clock = clock
        self._watchers = Watchers(MAX_WATCHERS, "the fleet")
        self._messages: dict[tuple[_Place | None, Wanted], _Message] = {}  # of the versions `_messages_of`
        self._messages_of = ("", 0)
        self._making = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._watchers)

    async def watch(self, wanted: Wanted, after_version: str = "") -> AsyncGenerator[Prepared, None]:
        """Yields serialized WatchFleetResponses until it is closed.

        Args:
            wanted: what of the fleet.
            after_version: what the reader has; empty: nothing.

        Raises:
            InvalidArgument: field after_version.
            ResourceExhausted: MAX_WATCHERS.
            Unavailable: the fleet was never received.
        """
        epoch, place, mark = _parsed(after_version)
        if mark != wanted.mark:  # he saw other servers then, and nobody knows which
            epoch, place = "", None
        self._state.check_known()
        with self._watchers.counted():
            while True:
                if epoch != self._state.epoch:
                    epoch, place = self._state.epoch, None
                message = await self._message(place, wanted)
                if epoch != self._state.epoch:
                    continue
                sent_at_s = self._clock.monotonic()
                if place is None or not message.is_empty:
                    yield message.prepared
                place = message.after
                if message.more:
                    continue
                while self._has_all(epoch, place):
                    await self._state.changed()
                if self._clock.monotonic() < sent_at_s + WATCH_INTERVAL_S:
                    await self._clock.sleep_until(sent_at_s + WATCH_INTERVAL_S)

    def _has_all(self, epoch: str, place: _Place) -> bool:
        servers = (epoch, place.servers) == (self._state.epoch, self._state.sequence)
        return servers and place.findings >= self._findings.version

    async def _message(self, place: _Place | None, wanted: Wanted) -> _Message:
        """What follows a place; made once for all who are there."""
        found = self._shared(place, wanted)
        if found is not None:
            return found
        async with self._making:  # one makes it and the others find it
            found = self._shared(place, wanted)
            if found is not None:
                return found
            versions = self._versions
            removed = None if place is None else self._state.removed_after(place.gone)
            findings = None if place is None else self._findings.since(place.findings)
            # anew, too, when more happened than is remembered
            start = None if removed is None or findings is None else place
            found = await _built(self._what_follows(start, wanted, removed or []), start, wanted)
            if self._versions == versions and len(self._messages) < MAX_SHARED:
                self._messages[place, wanted] = found
            return found

    def _what_follows(self, start: _Place | None, wanted: Wanted, removed: list[Removal]) -> _News:
        findings = self._findings.since(0 if start is None else start.findings) or []
        entries = self._state.changed_after(-1 if start is None else start.servers)
        came: set[str] = set()
        if start is not None and not wanted.has_finding(None):
            came = {entry.id for entry in entries if entry.placed_at > start.servers and wanted.has(entry)}
        return _News(
            epoch=self._state.epoch,
            sequence=self._state.sequence,
            entries=entries,
            removed=removed,
            findings=[one for one in findings if wanted.has_finding(self._state.find(one.server_id))],
            findings_version=self._findings.version,
            unseen=self._findings.of(came) if came else {},
        )

    @property
    def _versions(self) -> tuple[str, int]:
        return self._state.version, self._findings.version

    def _shared(self, place: _Place | None, wanted: Wanted) -> _Message | None:
        if self._messages_of != self._versions:
            self._messages, self._messages_of = {}, self._versions
        return self._messages.get((place, wanted))


async def _built(news: _News, place: _Place | None, wanted: Wanted) -> _Message:
    """A message of what changed. The fleet may go on changing meanwhile: entries do not."""
    parts: list[bytes] = []
    gone: list[str] = []
    size, after, more, since_s = 0, news.sequence, False, time.monotonic()
    for number, entry in enumerate(news.entries, start=1):
        if wanted.has(entry):
            new = [delimited(_RESPONSE.SERVERS_FIELD_NUMBER, entry.server(wanted.view))]
            new += [_finding(one) for one in news.unseen.get(entry.id, ())]
            parts += new
            size += sum(map(len, new))
            since_s = await _turns(since_s)
        elif place is not None and entry.placed_at > place.servers and wanted.may_know(entry.id, entry.places):
            gone.append(entry.id)
        if size >= MAX_WATCH_MESSAGE_BYTES and number < len(news.entries):
            after, more = entry.sequence, True
            break
    gone += [one.id for one in news.removed if one.sequence <= after and wanted.may_know(one.id, one.places)]
    findings = 0 if place is None else place.findings
    if not more:  # after all that it is about
        findings = max(findings, news.findings_version)
        parts += [_finding(one) for one in news.findings if one.server_id not in news.unseen]
    mark = wanted.mark
    head = _RESPONSE(
        version=f"{news.epoch}-{after}" + (f".{findings}" if findings else "") + (f"@{mark}" if mark else ""),
        snapshot=place is None,
        continues=more,
        removed=[fleet_pb2.RemovedServer(id=server_id) for server_id in sorted(gone)],
    )
    data = head.SerializeToString() + b"".join(parts)
    known = news.sequence if place is None else max(place.gone, after)
    return _Message(Prepared(data), _Place(after, known, findings), more, is_empty=not parts and not gone)


def _finding(anomaly: Anomaly) -> bytes:
    return delimited(_RESPONSE.ANOMALIES_FIELD_NUMBER, anomaly.SerializeToString())


class HasView(Protocol):
    """What is listed."""

    def server(self, view: fleet_pb2.ServerView.ValueType) -> bytes:
        """A serialized Server."""


async def made(entries: Iterable[HasView], view: fleet_pb2.ServerView.ValueType) -> None:
    """Has the bytes of servers made, and lets others have their turn meanwhile."""
    since_s = time.monotonic()
    for entry in entries:
        entry.server(view)
        since_s = await _turns(since_s)


async def _turns(since_s: float) -> float:
    """Lets others have their turn if this one has gone on long enough since; returns since when it goes on."""
    if time.monotonic() - since_s < TURN_S:
        return since_s
    await asyncio.sleep(0)
    return time.monotonic()


def _parsed(version: str) -> tuple[str, _Place | None, str]:
    """Epoch, place and mark of the scope; of no version, or that of a snapshot's first event, an epoch that there is
    not."""
    if version in {"", "0"}:
        return "", None, ""
    found = _VERSION.fullmatch(version)
    if found is None:
        raise InvalidArgument("not a version of the fleet, as a message of this stream has one", field="after_version")
    epoch, sequence, findings, mark = found.groups()
    return epoch, _Place(int(sequence), int(sequence), int(findings or 0)), mark or ""
