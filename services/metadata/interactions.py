"""An AI interaction as a fact and back."""

from typing import Any, Final
from uuid import UUID, uuid4

import orjson

from services.metadata import checks
from services.metadata.journal import Fact, Newest
from services.metadata.kinds import AI_INTERACTION
from services.metadata.queries import InteractionQuery, instant_of
from services.metadata.store import Interaction, NewInteraction

KIND: Final = AI_INTERACTION.name


def checked_fact(new: NewInteraction, created_us: int) -> Fact:
    """The fact that an interaction was recorded at a time, with an id where it has none.

    Raises:
        InvalidArgument: naming the field.
    """
    fact_id = str(checks.check_interaction_id(new.id) if new.id else uuid4())
    checks.check_text(new.session_id, "session_id", max_characters=checks.MAX_SESSION_ID_CHARACTERS)
    checks.check_text(new.query, "query", max_bytes=checks.MAX_TEXT_BYTES)
    checks.check_text(new.response, "response", max_bytes=checks.MAX_TEXT_BYTES)
    row: dict[str, Any] = {
        "id": fact_id,
        "session_id": new.session_id,
        "confidence": checks.check_confidence(new.confidence, "confidence"),
        "user_rating": checks.check_rating(new.user_rating, "user_rating"),
        "created_at": instant_of(created_us).isoformat(),
        "query": new.query,
        "response": new.response,
    }
    payload = orjson.dumps(row).decode()
    return Fact(kind=KIND, id=fact_id, subject=new.session_id, created_us=created_us, payload=payload)


def of_fact(fact: Fact) -> Interaction:
    """The interaction that a fact tells of."""
    row = orjson.loads(fact.payload)
    return Interaction(
        id=fact.id,
        session_id=row["session_id"],
        query=row["query"],
        response=row["response"],
        confidence=row["confidence"],
        user_rating=row["user_rating"],
        create_time=instant_of(fact.created_us),
    )


def newest(query: InteractionQuery, *, unwritten: bool) -> Newest:
    """The question for the journal that a listing makes."""
    at_least = ("user_rating", query.min_rating) if query.min_rating else None
    return Newest(KIND, subject=query.session_id, at_least=at_least, unwritten=unwritten)


def order(interaction: Interaction) -> tuple[Any, UUID]:
    """By what listings are sorted, descending."""
    return interaction.create_time, UUID(interaction.id)
