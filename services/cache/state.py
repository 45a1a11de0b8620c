"""The truth about the fleet: one state for each server, changed by rows, descriptors, silence and removal.

Everything that changes gets the next sequence number, and the servers are kept in the order of their last change. So
"what changed since n" is a walk from the end, and a watcher or a store that is behind by any number of changes finds
each server once, as it is now. Other replicas change it too: what they wrote is joined with what is known here.

What must stay true:

* a row that is not newer than the sample of its set (`order_of`) changes nothing, so every update may be sent again;
* silence is measured on our monotonic clock from when rows arrived, never by the sender's time or the wall clock;
* a removed server stays removed, whatever is sent of it, until it is admitted again;
* a server's stamp only grows, and what was absorbed of it is never lost again.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from fleet.health import DEFAULT_RULES, HealthRules, ServerStatus, judge, offline_after_ms
from fleet.model import NO_DETAILS, MetricSet, Rows, ServerDescriptor, ServerDetails
from runtime.clock import Clock
from runtime.errors import ResourceExhausted
from services.cache import room
from services.cache.arrivals import Arrival, Arrivals, SampleMerger, is_newer
from services.cache.merge import in_local_time, is_restored, join
from services.cache.metric_sets import MetricSets
from services.cache.model import (
    Fleet,
    FleetSummary,
    Removal,
    Sample,
    ServerState,
    Stored,
    newest_headline,
    version_of,
)

MAX_REMOVED_SERVERS = 100_000
"""Removed servers that are remembered; the one removed longest ago is forgotten first, but not for one that is not
there: whoever tells of more removed servers than that, and again when the watchers begin anew, would never end."""
MAX_FLEET_BASES = 16
"""Of each replica the last few; an older one of them is in no store any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a sender tells: servers, and rows each with the set that names its columns. Checked already.

    Attributes:
        told_before: of servers of which nobody has told us; of others it is ignored.
        admit_removed: takes servers back that were removed.
        details: what is recorded of servers, by id; of those that are not there it is ignored. Of a later revision than
            the one that was deleted they take a server back that is described beside them.
    """

    descriptors: Sequence[ServerDescriptor] = ()
    told_before: Sequence[ServerDescriptor] = ()
    batches: Sequence[tuple[MetricSet, Rows]] = ()
    admit_removed: bool = False
    details: Mapping[str, ServerDetails] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Which servers' states an update changed, how many rows were no newer than the state or of removed servers, and
    why some servers were left out for want of room."""

    changed: tuple[str, ...] = ()
    ignored_rows: int = 0
    no_room: ResourceExhausted | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Absorbed:
    """Whose state or removal changed by what others wrote, and of whom we know more than they wrote."""

    changed: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()


class LiveState:
    """The state of every server. Not safe for threads; no method waits."""

    def __init__(self, clock: Clock, sets: MetricSets, *, epoch: str, rules: HealthRules = DEFAULT_RULES) -> None:
        self.epoch = epoch  # also the writer of every change that is made here
        self.sequence = 0
        self.stamp = 0  # the latest one that went into this
        self.bases: dict[str, str] = {}  # by id: the version of the store's copy that went into what is known here
        self.fleet_bases: deque[str] = deque(maxlen=MAX_FLEET_BASES)  # the same of the fleet, the newest last
        self.oldest_removal = 0  # removals up to this sequence may be forgotten
        self._clock = clock
        self._sets = sets
        self._rules = rules
        self._states: dict[str, ServerState] = {}  # in order of sequence
        self._removed: dict[str, tuple[int, Removal]] = {}  # with the sequence of the removal, in that order
        self._silent_at: dict[str, float] = {}  # monotonic; servers that are not offline
        self._edges: dict[str, int] = {}  # ms; when a maintenance window of a server begins or ends next
        self._by_status = [0] * len(ServerStatus)
        self._values = 0
        self._ids: list[str] | None = []  # sorted; None: to be sorted again
        self._samples = SampleMerger()

    # --- changes

    def update(self, update: Update) -> Outcome:
        """Applies rows and descriptors; one new state, and sequence number, for each server that changed."""
        described = {one.server_id: one for one in update.told_before if not self._is_described(one.server_id)}
        described.update((descriptor.server_id, descriptor) for descriptor in update.descriptors)
        lives: dict[str, tuple[int, int]] = {}
        if update.admit_removed:
            lives = self._admit(
                (*described, *(server_id for _, rows in update.batches for server_id in rows.server_ids))
            )
        elif update.details:
            lives = self._admit([server_id for server_id in described if self._is_restored(server_id, update)])
        arrivals, ignored = self._arrivals(update.batches)
        news = {
            server_id: descriptor
            for server_id, descriptor in described.items()
            if server_id not in self._removed and not self._is_known(descriptor)
        }
        touched = dict.fromkeys((*news, *arrivals, *(server_id for server_id in lives if server_id in self._states)))
        touched.update(
            (server_id, None)
            for server_id, details in update.details.items()
            if (state := self._states.get(server_id)) is not None and details.revision > state.details.revision
        )
        crowd = room.without_room(
            touched, arrivals, self._sample_of, self._held_by, servers=len(self), values=self._values
        )
        for server_id in crowd.server_ids:
            del touched[server_id]
        now_ms, now_s = self._clock.now_ms(), self._clock.monotonic()
        for server_id in touched:
            state = self._renewed(server_id, news.get(server_id), arrivals.get(server_id, {}), now_ms, now_s)
            details = update.details.get(server_id)
            if details is not None and details.revision > state.details.revision:
                state = replace(state, details=details)
            if server_id in lives:
                life, after = lives[server_id]
                state = replace(state, life=life, stamp=max(state.stamp, after))
            self._put(state)
        return Outcome(changed=tuple(touched), ignored_rows=ignored, no_room=crowd.error)

    def sweep(self, *, deaf: bool = False) -> tuple[str, ...]:
        """Marks the servers offline that have been silent for too long, and those whose maintenance begins or ends.

        Returns their ids. While we are `deaf` to other replicas, servers that were last heard by them are given time:
        the silence is ours.
        """
        now_ms, now_s = self._clock.now_ms(), self._clock.monotonic()
        turned = [server_id for server_id, edge_ms in self._edges.items() if edge_ms <= now_ms]
        for server_id in turned:
            self._put(replace(self._states[server_id], sequence=self._next()))
        silent = [server_id for server_id, at_s in self._silent_at.items() if at_s <= now_s]
        for place, server_id in reversed(list(enumerate(silent))):
            state = self._states[server_id]
            if deaf and state.writer != self.epoch:
                del silent[place]
                self._silent_at[server_id] = now_s + offline_after_ms(state.descriptor.report_interval_ms) / 1_000
                continue
            judged = replace(state, status=ServerStatus.OFFLINE, sequence=self._next())
            self._put(replace(judged, stamp=max(now_ms, state.stamp + 1), writer=self.epoch))
        return tuple(dict.fromkeys((*turned, *silent)))

    def remove(self, server_ids: Iterable[str], revisions: Mapping[str, int] | None = None) -> int:
        """Forgets servers and remembers that they are removed, and the revisions of their records, by id. Returns how
        many were there."""
        there = 0
        now_ms = self._clock.now_ms()
        for server_id in server_ids:
            known, revision = self.stored(server_id), (revisions or {}).get(server_id, 0)
            is_there = isinstance(known, ServerState)
            there += is_there
            if isinstance(known, ServerState) and revision:
                revision = max(revision, known.details.revision)  # what is known of it is of before, whatever it says
            if isinstance(known, Removal) and known.revision >= revision:
                continue
            if known is None and len(self._removed) >= MAX_REMOVED_SERVERS:
                continue
            life, stamp = (max(now_ms, known.life + 1), max(now_ms, known.stamp + 1)) if known else (now_ms, now_ms)
            self._drop(Removal(server_id=server_id, stamp=stamp, writer=self.epoch, life=life, revision=revision))
        return there

    def absorb(self, stored: Iterable[Stored], *, at_start: bool = False) -> Absorbed:
        """Joins what was read from the store with what is known here.

        The silence of a server that others have heard since counts from now.

        Args:
            stored: what others wrote, or what was written before this start.
            at_start: its values are as good as new: while we were away, nobody could have been heard.
        """
        now_ms, now_s = self._clock.now_ms(), self._clock.monotonic()
        changed, ahead = [], []
        for theirs in stored:
            server_id = theirs.server_id
            mine = self._states.get(server_id) or self.removal(server_id)
            if mine is None:
                if isinstance(theirs, ServerState) and len(self._states) >= room.MAX_SERVERS:
                    continue
                joined: Stored = theirs
                if isinstance(theirs, ServerState) and not theirs.version:
                    joined = replace(theirs, stamp=theirs.received_ms or 1, writer=self.epoch)
            elif not theirs.version:
                joined = mine  # nobody vouches for it, and how its metrics were split is not known
            else:
                joined = join(mine, theirs, now_ms=now_ms, writer=self.epoch, rules=self._rules)
            if theirs.version:
                self.bases[server_id] = theirs.version
            if joined is not mine:
                changed.append(server_id)
                if isinstance(joined, Removal):
                    self._drop(joined)
                else:
                    self._removed.pop(server_id, None)
                    local = in_local_time(joined, mine, self._sets.get, None if at_start else now_ms, now_s)
                    self._put(replace(local, sequence=self._next()))
            if joined.version != theirs.version:
                ahead.append(server_id)
        return Absorbed(changed=tuple(changed), ahead=tuple(ahead))

    # --- reading

    def get(self, server_id: str) -> ServerState | None:
        """One server's state; None for an unknown one."""
        return self._states.get(server_id)

    def is_removed(self, server_id: str) -> bool:
        return server_id in self._removed

    def removal(self, server_id: str) -> Removal | None:
        """That a server was removed; None when it was not, or when that is forgotten."""
        found = self._removed.get(server_id)
        return found[1] if found else None

    def stored(self, server_id: str) -> Stored | None:
        """What a store is to hold of a server; None when nothing is known of it."""
        return self._states.get(server_id) or self.removal(server_id)

    def fleet(self) -> Fleet:
        """All states in order of id, and the counts."""
        if self._ids is None:
            self._ids = sorted(self._states)
        states = [self._states[server_id] for server_id in self._ids]
        version = version_of(self.stamp or 1, self.epoch)
        return Fleet(states=states, summary=self.summary(), version=version, bases=tuple(self.fleet_bases))

    def summary(self) -> FleetSummary:
        return FleetSummary(
            total=len(self._states),
            healthy=self._by_status[ServerStatus.HEALTHY],
            warning=self._by_status[ServerStatus.WARNING],
            critical=self._by_status[ServerStatus.CRITICAL],
            offline=self._by_status[ServerStatus.OFFLINE],
        )

    def ids(self) -> Iterator[str]:
        return iter(self._states)

    def changed_after(self, sequence: int) -> list[ServerState]:
        """The states with a higher sequence, in its order. Costs what changed, not the fleet."""
        newest_first = takewhile(lambda state: state.sequence > sequence, reversed(self._states.values()))
        return list(newest_first)[::-1]

    def removed_after(self, sequence: int) -> list[tuple[str, int]]:
        """Ids and sequences of later removals, in order; complete for a `sequence` of at least `oldest_removal`."""
        all_newest_first = ((server_id, removed_at) for server_id, (removed_at, _) in reversed(self._removed.items()))
        newest_first = takewhile(lambda removal: removal[1] > sequence, all_newest_first)
        return list(newest_first)[::-1]

    def __len__(self) -> int:
        return len(self._states)

    # --- how

    def _admit(self, server_ids: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Begins a new life for each, later than any removal; by id, its time and the first stamp of it."""
        now_ms = self._clock.now_ms()
        lives = {}
        for server_id in dict.fromkeys(server_ids):
            known = self.stored(server_id)
            self._removed.pop(server_id, None)
            lives[server_id] = (max(now_ms, known.life + 1), known.stamp + 1) if known else (now_ms, now_ms)
        return lives

    def _is_restored(self, server_id: str, update: Update) -> bool:
        removal, details = self.removal(server_id), update.details.get(server_id)
        return removal is not None and details is not None and is_restored(details, removal)

    def _is_described(self, server_id: str) -> bool:
        state = self._states.get(server_id)
        return state is not None and state.described > 0

    def _is_known(self, descriptor: ServerDescriptor) -> bool:
        state = self._states.get(descriptor.server_id)
        return state is not None and state.descriptor == descriptor

    def _arrivals(self, batches: Sequence[tuple[MetricSet, Rows]]) -> tuple[Arrivals, int]:
        """The newest row of each server and set that is newer than what is known, and how many others there were."""
        arrivals: Arrivals = {}
        ignored = 0
        now_ms = self._clock.now_ms()
        for metric_set, rows in batches:
            set_id, columns = metric_set.id, self._sets.headline_columns(metric_set)
            for index, (server_id, time_ms) in enumerate(zip(rows.server_ids, rows.times_ms.tolist(), strict=True)):
                mine = arrivals.get(server_id)
                before = mine.get(set_id) if mine else None
                known = before or self._sample_of(server_id, set_id)
                if server_id in self._removed or (known is not None and not is_newer(time_ms, known, now_ms)):
                    ignored += 1
                    continue
                arrivals.setdefault(server_id, {})[set_id] = Arrival(metric_set, columns, rows, index, time_ms)
        return arrivals, ignored

    def _sample_of(self, server_id: str, set_id: str) -> Sample | None:
        state = self._states.get(server_id)
        if state is not None:
            for sample in state.samples:
                if sample.set_id == set_id:
                    return sample
        return None

    def _held_by(self, server_id: str) -> int | None:
        state = self._states.get(server_id)
        return None if state is None else state.cells

    def _renewed(
        self,
        server_id: str,
        descriptor: ServerDescriptor | None,
        arrivals: dict[str, Arrival],
        now_ms: int,
        now_s: float,
    ) -> ServerState:
        old = self._states.get(server_id)
        stamp = max(now_ms, old.stamp + 1) if old else now_ms
        described = stamp if descriptor is not None else old.described if old else 0
        if descriptor is None:
            descriptor = old.descriptor if old else ServerDescriptor(server_id=server_id, hostname=server_id)
        samples, status = (old.samples, old.status) if old else ((), ServerStatus.OFFLINE)
        if arrivals:
            most = room.MAX_LIVE_VALUES - self._values + (old.cells if old else 0)
            samples = self._samples.merged(samples, arrivals, now_ms, now_s, most)
            status = judge(status, *newest_headline(samples), self._rules)
        return ServerState(
            descriptor=descriptor,
            status=status,
            observed_ms=samples[-1].time_ms if samples else None,
            received_ms=samples[-1].received_ms if samples else None,
            heard_s=now_s if arrivals or old is None else old.heard_s,
            samples=samples,
            sequence=self._next(),
            stamp=stamp,
            writer=self.epoch,
            life=old.life if old else 0,
            described=described,
            details=old.details if old else NO_DETAILS,
        )

    def _next(self) -> int:
        self.sequence += 1
        return self.sequence

    def _drop(self, removal: Removal) -> None:
        server_id = removal.server_id
        state = self._states.pop(server_id, None)
        if state is not None:
            self._uncount(state)
            self._ids = None
        self._removed.pop(server_id, None)
        self._removed[server_id] = self._next(), removal
        self.stamp = max(self.stamp, removal.stamp)
        while len(self._removed) > MAX_REMOVED_SERVERS:
            forgotten = next(iter(self._removed))
            self.oldest_removal, _ = self._removed.pop(forgotten)
            self.bases.pop(forgotten, None)

    def _put(self, state: ServerState) -> None:
        server_id = state.server_id
        self.stamp = max(self.stamp, state.stamp)
        in_maintenance = False
        edge_ms = None
        if state.details.maintenance:
            now_ms = self._clock.now_ms()
            in_maintenance, edge_ms = state.details.in_maintenance(now_ms), state.details.next_edge_ms(now_ms)
        if in_maintenance != state.in_maintenance:
            state = replace(state, in_maintenance=in_maintenance)
        old = self._states.pop(server_id, None)  # so that the new one goes to the end of the order
        if old is None:
            self._ids = None
        else:
            self._uncount(old)
        self._states[server_id] = state
        self._by_status[state.status] += 1
        self._values += state.cells
        if edge_ms is not None:
            self._edges[server_id] = edge_ms
        if state.status != ServerStatus.OFFLINE:
            self._silent_at[server_id] = state.heard_s + offline_after_ms(state.descriptor.report_interval_ms) / 1_000

    def _uncount(self, state: ServerState) -> None:
        self._by_status[state.status] -= 1
        self._values -= state.cells
        self._silent_at.pop(state.server_id, None)
        self._edges.pop(state.server_id, None)
