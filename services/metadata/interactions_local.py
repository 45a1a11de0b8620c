"""Interactions as callers get them: recorded in the journal, read from PostgreSQL and from what it lacks.

What must stay true: what was acknowledged is read by every later call, an interaction with the latest rating and
correction; what was erased is read by none, nor taken for what is recorded again; what is answered without PostgreSQL
says so. One exception: filters by rating go by what PostgreSQL has, and a rating that waits there behind others (it was
away) is only shown.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from typing import Final
from uuid import UUID

from runtime.clock import Clock
from runtime.errors import InvalidArgument, NotFound, Unavailable
from services.metadata import calibration, checks, erasing, interactions
from services.metadata.embeddings import Embeddings
from services.metadata.facts import IN_FLIGHT_FACTS, MAX_NOTED_BETWEEN, Facts
from services.metadata.interaction_query import InteractionQuery, check_filters
from services.metadata.interactions_export import Exports
from services.metadata.interactions_postgres import PostgresInteractions
from services.metadata.journal import Fact, Journal
from services.metadata.journal_query import Newest
from services.metadata.known import Known
from services.metadata.queries import instant_of, microseconds_of
from services.metadata.store import Calibration, Erased, Example, Interaction, InteractionFilter, NewInteraction, Page
from services.metadata.store_connection import Database

KNOWN_WITHIN_S: Final = 1.0
"""How long recording under an id of the caller's looks for it in PostgreSQL."""
LISTING_TRIES: Final = 5
"""A listing that a backlog overtakes is asked for again; the last one may count some interactions twice."""
DEFAULT_SIMILAR: Final = 10
MAX_SIMILAR: Final = 100
CAUGHT_UP_WITHIN_S: Final = 5.0
"""How long an answer that only PostgreSQL gives waits for what is on its way there."""
SETTLE_WITHIN_S: Final = 2.0
"""How long a listing waits for ratings on their way to PostgreSQL: a few ms, but for a backlog."""


class LocalInteractions:
    """The part of `MetadataStore` that is about interactions."""

    def __init__(self, database: Database, facts: Facts, *, clock: Clock) -> None:
        self._interactions = PostgresInteractions(database)
        self._known_ids = Known(self._interactions, KNOWN_WITHIN_S)
        self._exports = Exports(database)
        self._embeddings = Embeddings(database, self._some_wait)
        self._own_database = database
        self._facts = facts
        self._clock = clock
        self._last_us = 0

    def _stale_since(self) -> datetime:
        """About since when PostgreSQL is away."""
        return instant_of(self._clock.now_ms() * 1_000)

    async def record_interaction(self, interaction: NewInteraction) -> Interaction:
        fact = interactions.checked_fact(interaction, self._next_us())
        if interaction.id:
            erased, said = await self._facts.read(
                lambda journal: (
                    interactions.erasures(journal),
                    journal.beginning(interactions.FEEDBACK, f"{fact.id}/", unwritten=True),
                )
            )
            known = await self._known(UUID(fact.id))
            if known is not None and not erased.take(known):
                return interactions.with_feedback(known, said)
        if interaction.embedding:
            await self._embeddings.check_new(interaction.embedding, within_s=KNOWN_WITHIN_S)
        stored = await self._facts.record(fact)
        if stored is fact:
            return interactions.of_fact(fact)
        return interactions.with_feedback(interactions.of_fact(stored), await self._said(fact.id, unwritten=False))

    def _next_us(self) -> int:
        """Now, and later than the last time, so that listings show recordings in their order."""
        self._last_us = max(self._clock.now_ms() * 1_000, self._last_us + 1)
        return self._last_us

    async def _known(self, interaction_id: UUID) -> Interaction | None:
        """What PostgreSQL has under an id; None also when it does not answer."""
        with suppress(Unavailable):
            return await self._known_ids.find(interaction_id)
        return None

    async def get_interaction(self, interaction_id: str) -> Interaction:
        wanted = checks.check_interaction_id(interaction_id)
        return await self._get(wanted, within_s=None)

    async def _get(self, wanted: UUID, *, within_s: float | None) -> Interaction:
        # The journal first: what is inserted between the two questions is then in both answers and not in none.
        local = await self._facts.find(interactions.KIND, str(wanted), unwritten=True)
        said = await self._said(str(wanted), unwritten=True)
        erased = await self._facts.read(interactions.erasures)
        found = None
        try:
            found = await self._interactions.get(wanted, within_s=within_s)
            found = None if found is not None and erased.take(found) else found
        except Unavailable:
            local = local or await self._facts.find(interactions.KIND, str(wanted))
            if local is None:
                raise
        if found is None and local is not None:  # PostgreSQL may have what was said of one that it refused
            found, said = interactions.of_fact(local), await self._said(str(wanted), unwritten=False)
        if found is None:
            raise NotFound(f"there is no interaction {wanted}", field="id")
        return interactions.with_feedback(found, said)

    async def _said(self, interaction_id: str, *, unwritten: bool) -> list[Fact]:
        return await self._facts.read(
            lambda journal: journal.beginning(interactions.FEEDBACK, f"{interaction_id}/", unwritten=unwritten)
        )

    async def rate_interaction(self, interaction_id: str, rating: int, comment: str = "") -> Interaction:
        wanted = checks.check_interaction_id(interaction_id)
        checks.check_feedback(rating, comment)
        rated = await self._to_be_judged(wanted)
        fact = interactions.rating_fact(rated, rating, comment, self._next_us())
        return interactions.with_feedback(rated, [await self._facts.record(fact)])

    async def correct_interaction(self, interaction_id: str, correction: str) -> Interaction:
        wanted = checks.check_interaction_id(interaction_id)
        checks.check_correction(correction)
        corrected = await self._to_be_judged(wanted)
        fact = interactions.correction_fact(corrected, correction, self._next_us())
        return interactions.with_feedback(corrected, [await self._facts.record(fact)])

    async def _to_be_judged(self, wanted: UUID) -> Interaction:
        try:
            return await self._get(wanted, within_s=KNOWN_WITHIN_S)
        except Unavailable as error:
            raise Unavailable(
                "the interaction is in the metadata database only, if anywhere, which does not answer",
                reason="OLDER_UNAVAILABLE",
                retry_after_s=1.0,
            ) from error

    async def list_interactions(
        self, filters: InteractionFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[Interaction]:
        query = InteractionQuery.of(filters, page_size, page_token)
        if filters.min_rating or filters.max_rating:
            await self._facts.settled(interactions.FEEDBACK, SETTLE_WITHIN_S)
        for _ in range(LISTING_TRIES):
            noted = self._facts.noted
            # The journal first: what is inserted between the two questions is then in both answers and not in none.
            local, waiting, first_ids = await self._local(query, unwritten=True)
            said, erased = await self._facts.read(
                lambda journal: (
                    journal.newest(Newest(interactions.FEEDBACK), None, IN_FLIGHT_FACTS),
                    interactions.erasures(journal),
                )
            )
            try:
                found, total, written = await self._interactions.newest(query, first_ids, erased)
            except Unavailable:
                return await self._list_local_interactions(query)
            if self._facts.noted - noted <= MAX_NOTED_BETWEEN:
                break
        kept = {interaction.id for interaction in found}
        found = _shown(found, said) + [interaction for interaction in local if interaction.id not in kept]
        found.sort(key=interactions.order, reverse=True)
        return query.page(found, total + waiting - written)

    async def export_interactions(
        self, filters: InteractionFilter, *, redact: bool = True
    ) -> AsyncGenerator[Example, None]:
        check_filters(filters)
        await self._all_settled()
        async with aclosing(self._exports.examples(filters, redact=redact)) as examples:
            async for example in examples:
                yield example

    async def search_interactions(
        self, words: str, filters: InteractionFilter, *, page_size: int = 0, page_token: str = ""
    ) -> Page[Interaction]:
        query = InteractionQuery.of(filters, page_size, page_token, checks.check_words(words))
        await self._all_settled()
        return query.page(await self._interactions.search(query), 0)

    async def similar_interactions(
        self, embedding: Sequence[float], limit: int = 0
    ) -> Sequence[tuple[Interaction, float]]:
        checks.check_embedding(embedding)
        if limit < 0:
            raise InvalidArgument("is negative", field="limit")
        await self._all_settled()
        await self._embeddings.check_size(embedding)
        return await self._embeddings.nearest(embedding, min(limit or DEFAULT_SIMILAR, MAX_SIMILAR))

    async def calibration(self, filters: InteractionFilter, *, bins: int = 0, right_rating: int = 0) -> Calibration:
        bins, right_rating = calibration.checked(filters, bins, right_rating)
        await self._all_settled()
        return await calibration.report(self._own_database, filters, bins, right_rating)

    async def erase_session(self, session_id: str) -> Erased:
        checks.check_session(session_id)
        size, last, is_known = 0, None, False
        waiting, kept_us = await self._facts.read(
            lambda journal: (
                erasing.unwritten(journal.db, interactions.KIND, session_id),
                erasing.last_us(journal.db, interactions.KIND, session_id),
            )
        )
        with suppress(Unavailable):
            size, last = await self._interactions.size_of_session(session_id, waiting, within_s=KNOWN_WITHIN_S)
            is_known = True
        # Whatever the clock did since: later than all of it.
        self._last_us = max(self._next_us(), kept_us + 1, 0 if last is None else microseconds_of(last) + 1)
        erased_us = self._last_us
        erased = await self._facts.erase(
            interactions.PERSONAL, session_id, lambda ids: interactions.erasure_fact(session_id, erased_us, ids)
        )
        if await self._facts.settled(interactions.ERASURE, CAUGHT_UP_WITHIN_S) and is_known:
            return Erased(interactions=size + len(waiting), pending=False)
        return Erased(interactions=erased, pending=True)

    async def forget_interactions(self, older_than_s: float) -> int:
        """Deletes what was recorded longer ago, and what was said of it; returns how many interactions that were."""
        before_us = self._clock.now_ms() * 1_000 - int(older_than_s * 1e6)
        await self._facts.forget(interactions.PERSONAL, before_us)
        return await self._interactions.forget(instant_of(before_us))

    async def _some_wait(self) -> bool:
        return await self._facts.read(lambda journal: journal.first_waiting(interactions.KIND)) is not None

    async def _all_settled(self) -> None:
        """For what only PostgreSQL answers: it must have what was recorded before, and not what was erased."""
        for kind in (*interactions.PERSONAL, interactions.ERASURE):
            if not await self._facts.settled(kind, CAUGHT_UP_WITHIN_S):
                raise Unavailable(
                    "what was recorded is not in the metadata database yet", reason="CATCHING_UP", retry_after_s=1.0
                )

    async def _list_local_interactions(self, query: InteractionQuery) -> Page[Interaction]:
        local, total, _ = await self._local(query, unwritten=False)
        if not local:
            raise Unavailable(
                "older interactions are in the metadata database only, which does not answer",
                reason="OLDER_UNAVAILABLE",
                retry_after_s=1.0,
            )
        return query.page(local, total, stale_since=self._stale_since())

    async def _local(self, query: InteractionQuery, *, unwritten: bool) -> tuple[list[Interaction], int, list[str]]:
        """A page of the journal's, how many there are in all, and the ids of those first in line."""
        wanted = interactions.newest(query, unwritten=unwritten)

        def read(journal: Journal) -> tuple[list[Interaction], int, list[str]]:
            total = journal.count(wanted)
            if not total:
                return [], 0, []
            found = []
            for fact in journal.newest(wanted, query.before_us, query.limit + 1):
                said = journal.beginning(interactions.FEEDBACK, f"{fact.id}/", unwritten=False)
                found.append(interactions.with_feedback(interactions.of_fact(fact), said))
            return found, total, journal.first_ids(wanted, IN_FLIGHT_FACTS)

        return await self._facts.read(read)


def _shown(found: Sequence[Interaction], said: Sequence[Fact]) -> list[Interaction]:
    """Interactions with what was said of each."""
    if not said:
        return list(found)
    about: dict[str, list[Fact]] = {}
    for fact in said:
        about.setdefault(fact.id.partition("/")[0], []).append(fact)
    return [interactions.with_feedback(one, about.get(one.id, ())) for one in found]
