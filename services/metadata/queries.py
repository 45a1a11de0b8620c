"""What a listing asks, checked, and the page that answers it: the same whether PostgreSQL or a local copy has the rows.

What must stay true: a token that PostgreSQL's page carries goes on in the copy, and the other way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final, Self
from uuid import UUID

from fleet.validation import MAX_SERVER_ID_CHARACTERS
from runtime import paging
from runtime.errors import InvalidArgument
from services.metadata import checks
from services.metadata.store import Page, ServerFilter, ServerRecord

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def microseconds_of(instant: datetime) -> int:
    """Since the Unix epoch."""
    return (instant - _EPOCH) // _MICROSECOND


def instant_of(microseconds: int) -> datetime:
    """The inverse; raises OverflowError for what is no time of this calendar."""
    return _EPOCH + timedelta(microseconds=microseconds)


def place_in(last: Sequence[str | int] | None) -> tuple[datetime, UUID] | None:
    """The (time, id) that a token's sort key of microseconds and id names; raises InvalidArgument where it is none."""
    if last is None:
        return None
    microseconds, row_id = last
    try:
        return instant_of(int(microseconds)), UUID(str(row_id))
    except (ValueError, OverflowError):
        raise paging.bad_token() from None


def window_of(start: datetime | None, end: datetime | None) -> paging.Window:
    """In microseconds."""
    return paging.Window(*(None if edge is None else microseconds_of(edge) for edge in (start, end)))


def times_of(window: paging.Window) -> tuple[datetime | None, datetime | None]:
    """The inverse; raises InvalidArgument for a token's window that is no time of this calendar."""
    try:
        start, end = (None if edge is None else instant_of(edge) for edge in window)
    except OverflowError:
        raise paging.bad_token() from None
    return start, end


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerQuery:
    """A page of servers: those that match, with ids after `after`, `limit` at most."""

    environment: str
    role: str
    ids: list[str] | None
    show_deleted: bool
    only_deleted: bool
    labels: tuple[tuple[str, str], ...]
    limit: int
    after: str

    @classmethod
    def of(cls, filters: ServerFilter, page_size: int, page_token: str) -> Self:
        """Raises InvalidArgument as ``MetadataStore.list_servers`` says."""
        checks.check_text(filters.environment, "environment", max_characters=checks.MAX_ENVIRONMENT_CHARACTERS)
        checks.check_text(filters.role, "role", max_characters=checks.MAX_ROLE_CHARACTERS)
        if len(filters.ids) > checks.MAX_FILTER_IDS:
            raise InvalidArgument(f"more than {checks.MAX_FILTER_IDS} ids", field="ids")
        ids = [checks.check_server_id(server_id, f"ids[{i}]") for i, server_id in enumerate(filters.ids)] or None
        query = cls(
            environment=filters.environment,
            role=filters.role,
            ids=ids,
            show_deleted=filters.show_deleted,
            only_deleted=filters.only_deleted,
            labels=_checked_labels(filters.labels),
            limit=paging.page_size(page_size),
            after=checks.check_text(filters.after_id, "after_id", max_characters=MAX_SERVER_ID_CHARACTERS),
        )
        last = paging.position("servers", query.filters, page_token, (str,))
        return query if last is None else query._going_on(str(last[0]))

    def _going_on(self, after: str) -> Self:
        try:
            checks.check_server_id(after)
        except InvalidArgument:
            raise paging.bad_token() from None
        return replace(self, after=after)

    @property
    def filters(self) -> list[object]:
        """What a token is bound to."""
        more = [self.only_deleted, self.labels]
        return [self.environment, self.role, self.ids, self.show_deleted, *(more if any(more) else ())]

    def page(
        self, found: Sequence[ServerRecord], total: int, *, stale_since: datetime | None = None
    ) -> Page[ServerRecord]:
        """The page of what was found with one row more than `limit`."""
        token = ""
        if len(found) > self.limit:
            token = paging.page_token("servers", self.filters, [found[self.limit - 1].descriptor.server_id])
        return Page(items=tuple(found[: self.limit]), next_page_token=token, total_size=total, stale_since=stale_since)


def _checked_labels(labels: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    if len(labels) > checks.MAX_FILTER_LABELS:
        raise InvalidArgument(f"more than {checks.MAX_FILTER_LABELS} labels (MAX_FILTER_LABELS)", field="labels")
    for key, value in labels:
        checks.check_label(key, value, "labels")
    return tuple(sorted(labels))
