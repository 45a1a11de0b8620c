"""Takes events from their writers, keeps them as facts, and knows where each chain ends.

What must stay true: an event is taken when it follows the chain's known end, and never another one under its number;
taken is durable (`Facts.record`); the ends are known again after any death, from the last checkpoint and the facts that
came since. What is taken is what the database must have in the end.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import orjson

from fleet.audit.event import START, Event, Link, digest_of, from_json, to_json
from runtime.errors import FailedPrecondition, InvalidArgument
from services.metadata.audit.checkpoint import Said
from services.metadata.audit.store import AuditStore
from services.metadata.facts import Facts
from services.metadata.journal import Fact
from services.metadata.kinds import AUDIT_EVENT
from services.metadata.queries import instant_of

log = logging.getLogger(__name__)

MAX_EVENTS: Final = 1_000
MAX_WRITER_ID_CHARACTERS: Final = 64


class Sink:
    """Where all chains come together."""

    def __init__(self, facts: Facts, store: AuditStore) -> None:
        self._facts = facts
        self._store = store
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.ends: dict[str, Link] = {}
        """Writer -> the last event taken: it and all before are durable."""
        self._begun: dict[str, Link] = {}
        self.months: set[str] = set()
        """"YYYY-MM" of all events that were taken and have not gone by age."""

    async def recover(self, last: Said | None) -> None:
        """Finds the ends again, from the last checkpoint and the facts since; before anything is taken."""
        self.learn(last)
        for fact in await self._facts.last_of_subjects(AUDIT_EVENT.name, "seq"):
            event = event_of(fact)
            if event.seq > self.end(event.writer_id).seq:
                self.ends[event.writer_id] = event.link
        self.months |= {month_of(fact.created_us) for fact in await self._facts.unwritten(AUDIT_EVENT.name)}

    def learn(self, last: Said | None) -> None:
        """Takes the ends and months of the last checkpoint, but for ends that are known to be later ones."""
        if last is not None:
            for writer, end in last.chains.items():
                self.ends[writer] = max(end, self.end(writer), key=lambda link: link.seq)
            self.months.update(last.months)

    def end(self, writer_id: str) -> Link:
        """How far a chain goes; START for one that is not known."""
        return self.ends.get(writer_id, START)

    def begun(self, writer_id: str) -> Link:
        """The last event of a chain that was accepted, and may be on its way only."""
        return max(self.end(writer_id), self._begun.get(writer_id, START))

    async def append(self, events: Sequence[Event]) -> None:
        """Takes events of one chain; returns when they are durable. Those that were taken before are skipped.

        Raises:
            InvalidArgument: they are no events, or of several chains.
            FailedPrecondition: AUDIT_CHAIN_BROKEN.
            ResourceExhausted, Unavailable: as `Facts.record`; some of them may have been taken.
        """
        if not events:
            return
        writer = events[0].writer_id
        _check(events, writer)
        async with self._locks[writer]:
            end = await self._end_before(events[0])
            for event in events:
                if event.seq <= end.seq:
                    await self._check_taken(event)
                    continue
                if (event.seq, event.prev_hash) != (end.seq + 1, end.hash) or digest_of(event) != event.hash:
                    raise _broken(
                        f"event {event.seq} of {writer} does not follow {end.seq}, the last one that is known"
                    )
                end = event.link
            new = [event for event in events if event.seq > self.end(writer).seq]
            self._begun[writer] = end
            await self._facts.record_all([fact_of(event) for event in new])
            self.ends[writer] = end
            # Together with the end: a checkpoint that named a month too early would have verifying miss its partition.
            self.months.update(month_of(event.time_us) for event in new)

    async def _end_before(self, event: Event) -> Link:
        """The chain's end; where the event does not follow it, the database may know more than a lost or full disk."""
        end = self.end(event.writer_id)
        if event.seq > end.seq + 1 and await self._store.hash_of(event.writer_id, event.seq - 1) == event.prev_hash:
            end = Link(event.seq - 1, event.prev_hash)
            log.warning("the audit chain of %s goes on behind %d, as the database has it", event.writer_id, end.seq)
            self.ends[event.writer_id] = end
        return end

    async def _check_taken(self, event: Event) -> None:
        """One whose number was taken before is that event, sent again, and not another one of a journal put back."""
        fact = await self._facts.find(AUDIT_EVENT.name, event.id)
        found = event_of(fact).hash if fact is not None else await self._store.hash_of(event.writer_id, event.seq)
        if found != event.hash:
            raise _broken(f"event {event.seq} of {event.writer_id} is another one here")


def _broken(why: str) -> FailedPrecondition:
    return FailedPrecondition(why, reason="AUDIT_CHAIN_BROKEN")


def _check(events: Sequence[Event], writer: str) -> None:
    if len(events) > MAX_EVENTS:
        raise InvalidArgument(f"more than {MAX_EVENTS} events", field="events")
    if not writer or len(writer) > MAX_WRITER_ID_CHARACTERS or not writer.isascii() or not writer.isprintable():
        raise InvalidArgument("is no writer's id", field="events[0].writer_id")
    for number, event in enumerate(events):
        if event.writer_id != writer:
            raise InvalidArgument("is another chain's", field=f"events[{number}].writer_id")


def month_of(time_us: int) -> str:
    """The month, "YYYY-MM", whose partition an event of a time is in."""
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m")


def fact_of(event: Event) -> Fact:
    """The fact that holds an event; its payload is what `audit_insert` takes an array of."""
    row = orjson.loads(to_json(event))
    row["time"] = instant_of(row["time_us"]).isoformat()
    return Fact(
        kind=AUDIT_EVENT.name,
        id=event.id,
        subject=event.writer_id,
        created_us=event.time_us,
        payload=orjson.dumps(row).decode(),
    )


def event_of(fact: Fact) -> Event:
    """The inverse."""
    row: Mapping[str, object] = {key: value for key, value in orjson.loads(fact.payload).items() if key != "time"}
    return from_json(orjson.dumps(row).decode())
