"""Findings as callers get them: recorded in the journal, read from PostgreSQL and from what it lacks.

    told, said ─> journal ─ sync ─> acknowledged ─ ship ─> PostgreSQL
    read: what the journal has that PostgreSQL lacks, first; then PostgreSQL, without those findings

What must stay true: what is told or said gets a later time than all before, whatever the clock does, and is stored in
that order, so that a time says how far somebody has followed; the journal is read first, so that what is inserted
between the two questions is in both answers and not in none; parts of a finding are joined, which may be done twice.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from fleet.anomaly import Anomaly
from runtime.clock import Clock
from runtime.errors import NotFound, Unavailable
from services.metadata import checks
from services.metadata.anomalies import telling
from services.metadata.anomalies.model import Recorded, Remark, of_remark, together
from services.metadata.anomalies.postgres import PostgresAnomalies
from services.metadata.anomalies.query import AnomalyFilter, AnomalyQuery
from services.metadata.facts import Facts
from services.metadata.journal import KEPT_MS, Fact, Journal
from services.metadata.journal_query import Newest
from services.metadata.queries import instant_of
from services.metadata.store import Page
from services.metadata.store_connection import Database

MAX_LOCAL: Final = 10_000
"""Facts of each kind that are read of the journal, the newest ones. PostgreSQL lacks so many only when it was away for
long; until it has caught up, findings told before them are as it has them."""
IN_THREAD: Final = 200
"""More findings than this are joined in a thread; these take 2 ms."""
KNOWN_WITHIN_S: Final = 1.0
SETTLED_WITHIN_S: Final = 5.0
BATCH: Final = 500
NOTED_EVERY_MS: Final = 600_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a follower is told.

    Attributes:
        version: to go on with; of who has all there is, the same for all followers.
        findings: as they are now, in the order in which they changed.
        is_snapshot: they are those that go on, or some of them where `continues` is set.
        is_partial: those of a day ago and before are missing, as the database is away.
    """

    version: int
    findings: Sequence[Recorded]
    is_snapshot: bool = False
    continues: bool = False
    is_partial: bool = False


class AnomalyStore:
    """The record of findings; see the module."""

    def __init__(self, database: Database, facts: Facts, clock: Clock) -> None:
        self._postgres = PostgresAnomalies(database)
        self._facts = facts
        self._clock = clock
        self._last_us = 0
        self._stored_us = 0
        self._change = asyncio.Event()
        self._returns = 0
        self._left_us = 0
        """What changed up to then may have left the journal; of what changed later this knows when it was stored."""
        self._noted: list[tuple[int, int]] = []  # when something was stored, and the last change until the next one
        database.on_return(self._returned)

    def _returned(self) -> None:
        """PostgreSQL answers again: who was told a part may have the rest."""
        self._returns += 1
        self._wake()

    def _wake(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    @classmethod
    async def opened(cls, database: Database, facts: Facts, clock: Clock) -> Self:
        """A store whose times go on after those in the journal, and in PostgreSQL as soon as it answers."""
        store = cls(database, facts, clock)

        def newest(journal: Journal) -> list[Fact]:
            kinds = (telling.TOLD, telling.SAID)
            return [fact for kind in kinds for fact in journal.newest(Newest(kind, unwritten=False), None, 1)]

        times = [fact.created_us for fact in await facts.read(newest)]
        store._last_us = store._stored_us = store._left_us = max([clock.now_ms() * 1_000, *times])
        await store._go_on()
        return store

    async def _go_on(self) -> None:
        """A clock that was ahead for longer than the journal goes back left later times in PostgreSQL, and followers
        who have come so far: what is told from now on is news for them if its time is later still."""
        with suppress(Unavailable):
            last_us = await self._postgres.last_us(within_s=KNOWN_WITHIN_S)
            self._last_us, self._stored_us = max(self._last_us, last_us), max(self._stored_us, last_us)

    async def record(self, anomalies: Sequence[Anomaly]) -> None:
        """Keeps findings durably as they are now; one that is known as it is, or as it was later, stays.

        Raises:
            InvalidArgument: naming the field; nothing was kept.
            ResourceExhausted, Unavailable: as `Facts.record`.
        """
        for index, anomaly in enumerate(anomalies):
            telling.check_anomaly(anomaly, f"anomalies[{index}]")
        await self._store(lambda: [telling.told_fact(anomaly, self._next_us()) for anomaly in anomalies])

    async def _store(self, facts: Callable[[], list[Fact]]) -> None:
        """Whoever is cancelled meanwhile: what is stored must be told to followers."""
        await asyncio.shield(asyncio.ensure_future(self._store_all(facts)))

    async def _store_all(self, made: Callable[[], list[Fact]]) -> None:
        facts = made()  # at once with what follows: they are stored in the order of their times
        try:
            await self._facts.record_all(facts)
        finally:
            self._stored_us = max([self._stored_us, *(fact.created_us for fact in facts)])
            self._note(self._clock.now_ms())
            self._wake()

    def _note(self, now_ms: int) -> None:
        """Notes what was stored just now, in a day 144 times at most."""
        if self._noted and now_ms < self._noted[-1][0] + NOTED_EVERY_MS:
            now_ms = min(now_ms, self._noted.pop()[0])
        self._noted.append((now_ms, self._stored_us))
        self._kept_from(self._clock.now_ms())

    def _kept_from(self, now_ms: int) -> int:
        """The journal has all that changed after this time."""
        left = [until_us for stored_ms, until_us in self._noted if stored_ms <= now_ms - KEPT_MS]
        self._noted = [(stored_ms, until_us) for stored_ms, until_us in self._noted if stored_ms > now_ms - KEPT_MS]
        self._left_us = max([self._left_us, *left])
        return min(self._left_us, (now_ms - KEPT_MS) * 1_000)

    def _next_us(self, after_us: int = 0) -> int:
        self._last_us = max(self._clock.now_ms() * 1_000, self._last_us + 1, after_us + 1)
        return self._last_us

    async def remark(self, anomaly_id: str, *, is_real: bool | None, author: str, comment: str) -> Recorded:
        """Keeps that somebody takes care of a finding (`is_real` is None), or what it was; returns it with that.

        Raises:
            InvalidArgument, NotFound: naming the field.
            Unavailable: OLDER_UNAVAILABLE, the finding cannot be read; others as `Facts.record`.
        """
        checks.check_text(comment, "comment", max_bytes=checks.MAX_COMMENT_BYTES)
        author = checks.check_text(author, "author")[: telling.MAX_AUTHOR_CHARACTERS]
        known = await self.get(anomaly_id, within_s=KNOWN_WITHIN_S)
        assert known.anomaly is not None
        server_id = known.anomaly.server_id
        remarks: list[Remark] = []

        def made() -> list[Fact]:
            # A clock that was ahead for longer than the journal goes back has left later times in PostgreSQL.
            time_us = self._next_us(known.changed_us)
            remarks.append(
                Remark(anomaly_id=anomaly_id, author=author, comment=comment, time_us=time_us, is_real=is_real)
            )
            return [telling.said_fact(remarks[0], server_id)]

        await self._store(made)
        return known.joined(of_remark(remarks[0]))

    async def get(self, anomaly_id: str, *, within_s: float | None = None) -> Recorded:
        """A finding.

        Raises:
            InvalidArgument, NotFound: naming the field.
            Unavailable: OLDER_UNAVAILABLE, the journal does not have it and PostgreSQL does not answer.
        """
        telling.check_id(anomaly_id)
        prefix = f"{anomaly_id}/"

        def read(journal: Journal) -> dict[str, Recorded]:
            kinds = (telling.TOLD, telling.SAID)
            return _joined(fact for kind in kinds for fact in journal.beginning(kind, prefix, unwritten=False))

        local = (await self._facts.read(read)).get(anomaly_id, Recorded())
        try:
            known = local.joined((await self._postgres.get([anomaly_id], within_s=within_s)).get(anomaly_id))
        except Unavailable as error:
            if local.anomaly is None:
                raise _older_unavailable() from error
            return local
        if known.anomaly is None:
            raise NotFound(f"there is no finding {anomaly_id}", field="id")
        return known

    async def listing(self, filters: AnomalyFilter, *, page_size: int = 0, page_token: str = "") -> Page[Recorded]:
        """A page of findings, newest first.

        Raises:
            InvalidArgument: naming the field.
            Unavailable: OLDER_UNAVAILABLE, PostgreSQL does not answer and the journal has nothing for this page.
        """
        query = AnomalyQuery.of(filters, page_size, page_token)
        local = await self._local(unwritten=True)
        found: list[Recorded] = []
        total, stale_since = 0, None
        try:
            found, total = await self._postgres.newest(query, list(local))
            local = await self._completed(local)
        except Unavailable:
            local, found, total = await self._local(unwritten=False), [], 0
            stale_since = instant_of(self._clock.now_ms() * 1_000)
        ours = await _by_size(local, lambda: [one for one in local.values() if query.filters.takes(one)])
        found += [one for one in ours if query.is_on_page(one)]
        found.sort(key=lambda one: one.place, reverse=True)
        shown = tuple(found[: query.limit])
        if stale_since is not None and not shown:
            raise _older_unavailable()
        token = query.next_token(shown, more=len(found) > query.limit or stale_since is not None)
        return Page(items=shown, next_page_token=token, total_size=total + len(ours), stale_since=stale_since)

    async def follow(self, after_us: int) -> AsyncGenerator[Told, None]:
        """Tells the findings that go on, then each that changes; those that go on once more where some of them could
        not be read, when they can.

        Args:
            after_us: `version` that the follower has; 0: what changed before does not matter.

        Raises:
            Unavailable: OLDER_UNAVAILABLE, what changed since is in PostgreSQL only.
        """
        # nothing is newer than what was stored last, so a later version has all there is, too, and is told so
        version, is_partial, returns = min(after_us or self._stored_us, self._stored_us), True, -1
        is_told = not after_us
        while True:
            change, stored_us = self._change, self._stored_us
            if is_partial and returns != self._returns:
                returns, is_partial = self._returns, False
                await self._go_on()
                async for told in self._going_on(version):
                    is_partial = told.is_partial
                    yield told
            changed = await self._changed(version)
            if changed:
                version = changed[-1].changed_us
            elif stored_us > version or not is_told:  # what was stored by then was read, and none of it is news
                version = max(version, stored_us)
            else:
                await change.wait()
                continue
            is_told = True
            yield Told(version=version, findings=changed)

    async def _going_on(self, version: int) -> AsyncGenerator[Told, None]:
        token, more = "", True
        while more:
            try:
                page = await self.listing(AnomalyFilter(open=True), page_size=BATCH, page_token=token)
            except Unavailable as error:
                if error.reason != "OLDER_UNAVAILABLE":
                    raise
                yield Told(version=version, findings=(), is_snapshot=True, is_partial=True)
                return
            token = page.next_page_token
            more = bool(token)
            yield Told(version=version, findings=page.items, is_snapshot=True, continues=more)

    async def _changed(self, after_us: int) -> list[Recorded]:
        """The first that changed after a time, in that order."""
        local = await self._local(unwritten=True)
        found: list[Recorded] = []
        try:
            found = await self._postgres.changed(after_us, list(local), BATCH)
            local = await self._completed(local)
        except Unavailable as error:
            if after_us < self._kept_from(self._clock.now_ms()):
                raise _older_unavailable() from error
            local, found = await self._local(unwritten=False), []
        found += [one for one in local.values() if one.anomaly is not None and one.changed_us > after_us]
        found.sort(key=lambda one: one.changed_us)
        return found[:BATCH]

    async def count(self, start_us: int) -> list[dict[str, Any]]:
        """Of each detector, of what began at a time or later: found, open, acknowledged, said_real, said_false.

        Raises:
            Unavailable: PostgreSQL does not answer, or lacks what was recorded before (CATCHING_UP).
        """
        for kind in (telling.TOLD, telling.SAID):
            if not await self._facts.settled(kind, SETTLED_WITHIN_S):
                raise Unavailable(
                    "what was found is not in the metadata database yet", reason="CATCHING_UP", retry_after_s=1.0
                )
        return await self._postgres.count(start_us)

    async def _local(self, *, unwritten: bool) -> dict[str, Recorded]:
        """What the journal knows of findings; `unwritten`: of those of which PostgreSQL lacks something."""

        def read(journal: Journal) -> dict[str, Recorded]:
            kinds = (telling.TOLD, telling.SAID)
            return _joined(
                fact for kind in kinds for fact in journal.newest(Newest(kind, unwritten=unwritten), None, MAX_LOCAL)
            )

        return await self._facts.read(read)

    async def _completed(self, local: dict[str, Recorded]) -> dict[str, Recorded]:
        """With what PostgreSQL has of them."""
        if not local:
            return local
        known = await self._postgres.get(list(local))
        return await _by_size(local, lambda: {one: part.joined(known.get(one)) for one, part in local.items()})


async def _by_size(local: dict[str, Recorded], work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if len(local) > IN_THREAD else work()


def _joined(facts: Iterable[Fact]) -> dict[str, Recorded]:
    return together(telling.part_of(fact) for fact in facts)


def _older_unavailable() -> Unavailable:
    return Unavailable(
        "older findings are in the metadata database only, which does not answer",
        reason="OLDER_UNAVAILABLE",
        retry_after_s=1.0,
    )
