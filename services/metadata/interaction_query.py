"""Which interactions are asked for, checked once, and said twice: to PostgreSQL and to SQLite, where the journal is.

What must stay true: both say the same; every value is a bound parameter and every piece of SQL a constant text; a token
that PostgreSQL's page carries goes on in the journal, and the other way round; all pages of a listing are of the window
that its first page had.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from typing import Any, Final, Self
from uuid import UUID

from runtime import paging
from runtime.errors import InvalidArgument
from services.metadata import checks
from services.metadata.journal_query import Condition
from services.metadata.kinds import AI_FEEDBACK
from services.metadata.queries import microseconds_of, place_in, times_of, window_of
from services.metadata.store import Interaction, InteractionFilter, Page

_IN_POSTGRES: Final = {
    "session_id": "session_id = ${}",
    "min_rating": "user_rating >= ${}",
    "max_rating": "user_rating <= ${}",
    "min_confidence": "confidence >= ${}",
    "max_confidence": "confidence <= ${}",
    "model": "model = ${}",
    "tag": "tags @> ARRAY[${}::text]",
    "server_id": "server_ids @> ARRAY[${}::text]",
    "start_time": "created_at >= ${}",
    "end_time": "created_at < ${}",
}
# The latest rating is in a fact of its own, which the journal may have beside the interaction's.
_RATING: Final = f"""coalesce((SELECT said.payload ->> 'rating' FROM facts AS said
    WHERE said.kind = '{AI_FEEDBACK.name}' AND said.id >= facts.id || '/' AND said.id < facts.id || '0'
    AND said.payload ->> 'rating' IS NOT NULL
    ORDER BY said.created_us DESC LIMIT 1), facts.payload ->> 'user_rating')"""  # noqa: S608  a constant
_IN_JOURNAL: Final = {
    "session_id": "subject = ?",
    "min_rating": f"{_RATING} >= ?",
    "max_rating": f"{_RATING} <= ?",
    "min_confidence": "payload ->> 'confidence' >= ?",
    "max_confidence": "payload ->> 'confidence' <= ?",
    "model": "payload ->> 'model' = ?",
    "tag": "EXISTS (SELECT 1 FROM json_each(payload, '$.tags') WHERE value = ?)",
    "server_id": "EXISTS (SELECT 1 FROM json_each(payload, '$.server_ids') WHERE value = ?)",
    "start_time": "created_us >= ?",
    "end_time": "created_us < ?",
}


def check_filters(filters: InteractionFilter) -> InteractionFilter:
    """Returns what may be asked for; raises InvalidArgument naming the field."""
    checks.check_text(filters.session_id, "session_id", max_characters=checks.MAX_SESSION_ID_CHARACTERS)
    checks.check_text(filters.model, "model", max_characters=checks.MAX_MODEL_CHARACTERS)
    checks.check_text(filters.tag, "tag", max_characters=checks.MAX_TAG_CHARACTERS)
    if filters.server_id:
        checks.check_server_id(filters.server_id)
    for name in ("min_rating", "max_rating"):
        checks.check_rating(getattr(filters, name) or None, name)
    for name in ("min_confidence", "max_confidence"):
        checks.check_confidence(getattr(filters, name), name)
    for low, high, wide in (
        ("min_rating", "max_rating", 0),
        ("min_confidence", "max_confidence", None),
        ("start_time", "end_time", None),
    ):
        first, last = getattr(filters, low), getattr(filters, high)
        if wide not in {first, last} and first > last:
            raise InvalidArgument(f"is less than {low}", field=high)
    return filters


def _wanted(filters: InteractionFilter) -> list[tuple[str, Any]]:
    """The (name, value) of what restricts."""
    named = ((name, getattr(filters, name)) for name in _IN_POSTGRES)
    return [
        (name, value)
        for name, value in named
        if value not in {"", None} and not (value == 0 and name.endswith("rating"))
    ]


def in_postgres(filters: InteractionFilter, values: list[Any]) -> str:
    """The condition for a WHERE; its parameters are added to those that are there."""
    pieces = []
    for name, value in _wanted(filters):
        values.append(value)
        pieces.append(_IN_POSTGRES[name].format(len(values)))
    return " AND ".join(pieces) or "true"


def in_journal(filters: InteractionFilter) -> tuple[Condition, ...]:
    """The same for a journal of facts."""
    return tuple(
        Condition(_IN_JOURNAL[name], microseconds_of(value) if isinstance(value, datetime) else value)
        for name, value in _wanted(filters)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InteractionQuery:
    """A page of interactions: those that match, before the (time, id) `before`, `limit` at most.

    The times of `filters` are those of the listing's first page, whatever a later page is asked with.
    """

    filters: InteractionFilter
    limit: int
    before: tuple[datetime, UUID] | None
    words: str = ""
    """That must be in it; the journal knows no such condition."""

    @classmethod
    def of(cls, filters: InteractionFilter, page_size: int, page_token: str, words: str = "") -> Self:
        """Raises InvalidArgument as ``MetadataStore.list_interactions`` says."""
        limit = paging.page_size(page_size)
        asked = window_of(filters.start_time, filters.end_time)
        window, last = paging.continued("interactions", bound(filters, words), asked, page_token, (int, str))
        start, end = times_of(window)
        filters = check_filters(replace(filters, start_time=start, end_time=end))
        return cls(filters=filters, limit=limit, before=place_in(last), words=words)

    @property
    def before_us(self) -> tuple[int, str] | None:
        """`before` as the journal has it."""
        return None if self.before is None else (microseconds_of(self.before[0]), str(self.before[1]))

    def page(
        self, found: Sequence[Interaction], total: int, *, stale_since: datetime | None = None
    ) -> Page[Interaction]:
        """The page of what was found with one row more than `limit`; a stale one always goes on."""
        token = ""
        if found and (len(found) > self.limit or stale_since is not None):
            last = found[: self.limit][-1]
            key: list[str | int] = [microseconds_of(last.create_time), last.id]
            window = window_of(self.filters.start_time, self.filters.end_time)
            token = paging.page_token("interactions", bound(self.filters, self.words), key, window)
        return Page(items=tuple(found[: self.limit]), next_page_token=token, total_size=total, stale_since=stale_since)


def bound(filters: InteractionFilter, words: str = "") -> list[object]:
    """What a token is bound to, beside the edges of the window."""
    return [*astuple(replace(filters, start_time=None, end_time=None)), words]
