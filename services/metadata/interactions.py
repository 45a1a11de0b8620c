"""An AI interaction as a fact and back, and what people said of one: ratings and corrections are facts, too.

The id of what was said is `<interaction>/<uuid>`, so that the journal finds all that was said of an interaction. What
must stay true: what is said later has a later time, whatever the clock does meanwhile, for the latest counts.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import orjson

from services.metadata import checks
from services.metadata.interaction_query import InteractionQuery, in_journal
from services.metadata.journal import Fact, Journal
from services.metadata.journal_query import Newest
from services.metadata.kinds import AI_ERASURE, AI_FEEDBACK, AI_INTERACTION
from services.metadata.queries import instant_of, microseconds_of
from services.metadata.store import Interaction, NewInteraction

KIND: Final = AI_INTERACTION.name
FEEDBACK: Final = AI_FEEDBACK.name
ERASURE: Final = AI_ERASURE.name
PERSONAL: Final = (KIND, FEEDBACK)
"""The kinds that have what people said, the interactions first."""
_MICROSECOND: Final = timedelta(microseconds=1)


def checked_fact(new: NewInteraction, created_us: int) -> Fact:
    """The fact that an interaction was recorded at a time, with an id where it has none.

    Raises:
        InvalidArgument: naming the field.
    """
    fact_id = str(checks.check_interaction_id(new.id) if new.id else uuid4())
    checks.check_new_interaction(new)
    row: dict[str, Any] = {
        "id": fact_id,
        "session_id": new.session_id,
        "confidence": new.confidence,
        "user_rating": new.user_rating,
        "created_at": instant_of(created_us).isoformat(),
        "query": new.query,
        "response": new.response,
    }
    ours = {
        "model": new.model,
        "prompt_hash": new.prompt_hash,
        "prompt_tokens": new.prompt_tokens,
        "response_tokens": new.response_tokens,
        "latency_ms": new.latency_ms,
        "server_ids": new.server_ids,
        "anomaly_ids": new.anomaly_ids,
        "tags": new.tags,
        "correction": new.correction,
        "rating_comment": new.rating_comment,
        "embedding": new.embedding,
    }
    row |= {name: value for name, value in ours.items() if value not in ("", None, ())}
    payload = orjson.dumps(row).decode()
    return Fact(kind=KIND, id=fact_id, subject=new.session_id, created_us=created_us, payload=payload)


def of_fact(fact: Fact) -> Interaction:
    """The interaction that a fact tells of."""
    row = orjson.loads(fact.payload)
    created = instant_of(fact.created_us)
    return Interaction(
        id=fact.id,
        session_id=row["session_id"],
        query=row["query"],
        response=row["response"],
        confidence=row["confidence"],
        user_rating=row["user_rating"],
        create_time=created,
        model=row.get("model", ""),
        prompt_hash=row.get("prompt_hash", ""),
        prompt_tokens=row.get("prompt_tokens"),
        response_tokens=row.get("response_tokens"),
        latency_ms=row.get("latency_ms"),
        server_ids=tuple(row.get("server_ids", ())),
        anomaly_ids=tuple(row.get("anomaly_ids", ())),
        tags=tuple(row.get("tags", ())),
        correction=row.get("correction", ""),
        rating_comment=row.get("rating_comment", ""),
        rate_time=None if row["user_rating"] is None else created,
        correct_time=created if row.get("correction") else None,
    )


def rating_fact(rated: Interaction, rating: int, comment: str, now_us: int) -> Fact:
    """The fact that an interaction was rated, with what `checks.check_feedback` lets through."""
    return _feedback(rated, {"rating": rating, "comment": comment}, now_us)


def correction_fact(corrected: Interaction, correction: str, now_us: int) -> Fact:
    """The fact that an interaction was corrected, with what `checks.check_correction` lets through."""
    return _feedback(corrected, {"correction": correction}, now_us)


def _feedback(about: Interaction, said: dict[str, Any], now_us: int) -> Fact:
    last = max(filter(None, (about.create_time, about.rate_time, about.correct_time)))
    created_us = max(now_us, microseconds_of(last + _MICROSECOND))
    own = str(uuid4())
    row = {"id": own, "interaction_id": about.id, "created_at": instant_of(created_us).isoformat(), **said}
    return Fact(
        kind=FEEDBACK,
        id=f"{about.id}/{own}",
        subject=about.session_id,
        created_us=created_us,
        payload=orjson.dumps(row).decode(),
    )


def erasure_fact(session_id: str, created_us: int, ids: list[str]) -> Fact:
    """The fact that a session was erased, with the ids of its interactions that PostgreSQL did not have."""
    own = str(uuid4())
    row = {"session_id": session_id, "created_at": instant_of(created_us).isoformat(), "ids": ids}
    payload = orjson.dumps(row).decode()
    return Fact(kind=ERASURE, id=own, subject="", created_us=created_us, payload=payload)


class Erasures(NamedTuple):
    """What PostgreSQL has not been told to erase yet: sessions, and of each the time up to which it goes."""

    sessions: tuple[str, ...] = ()
    until: tuple[datetime, ...] = ()

    def take(self, interaction: Interaction) -> bool:
        """Whether an interaction that PostgreSQL still has is erased."""
        return any(
            session == interaction.session_id and interaction.create_time <= until
            for session, until in zip(*self, strict=True)
        )


def erasures(journal: Journal) -> Erasures:
    """Those that wait."""
    waiting = journal.unwritten(ERASURE)
    if not waiting:
        return Erasures()
    sessions = (orjson.loads(fact.payload)["session_id"] for fact in waiting)
    return Erasures(tuple(sessions), tuple(instant_of(fact.created_us) for fact in waiting))


def with_feedback(interaction: Interaction, said: Iterable[Fact]) -> Interaction:
    """The interaction with the latest of what was said of it, which it may have already."""
    for fact in sorted(said, key=lambda fact: fact.created_us):
        row, at = orjson.loads(fact.payload), instant_of(fact.created_us)
        if "rating" in row and (interaction.rate_time is None or interaction.rate_time <= at):
            interaction = replace(interaction, user_rating=row["rating"], rating_comment=row["comment"], rate_time=at)
        if "correction" in row and (interaction.correct_time is None or interaction.correct_time <= at):
            interaction = replace(interaction, correction=row["correction"], correct_time=at)
    return interaction


def newest(query: InteractionQuery, *, unwritten: bool) -> Newest:
    """The question for the journal that a listing makes."""
    return Newest(KIND, conditions=in_journal(query.filters), unwritten=unwritten)


def order(interaction: Interaction) -> tuple[Any, UUID]:
    """By what listings are sorted, descending."""
    return interaction.create_time, UUID(interaction.id)
