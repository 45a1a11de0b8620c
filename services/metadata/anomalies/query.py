"""Which findings are asked for, checked once, and said twice: to PostgreSQL, and of a finding in memory.

What must stay true: both say the same; every value is a bound parameter and every piece of SQL a constant text; all
pages of a listing are of the window that its first page had.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Final, Self

from fleet.validation import MAX_SERVER_ID_CHARACTERS
from runtime import paging
from runtime.errors import InvalidArgument, ResourceExhausted
from services.metadata import checks
from services.metadata.anomalies.model import Recorded
from services.metadata.anomalies.telling import MAX_DETECTOR_CHARACTERS, MAX_METRIC_BYTES, check_id
from services.metadata.queries import instant_of

MAX_SERVERS: Final = 20_000
LISTING: Final = "anomalies"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalyFilter:
    """Which findings: all conditions hold together; an empty one, or None, does not restrict.

    Attributes:
        start_us, end_us: only those with a part in `[start, end)`.
        metric: that had a part in it.
        open: whether it goes on.
        acknowledged: whether somebody takes care of it.
        verdict: whether it was said to be real; "none": nobody said anything.
        server_ids: only of these.
    """

    server_id: str = ""
    start_us: int | None = None
    end_us: int | None = None
    detector: str = ""
    metric: str = ""
    min_score: float = 0.0
    open: bool | None = None
    acknowledged: bool | None = None
    verdict: str = ""
    server_ids: tuple[str, ...] | None = None

    def checked(self) -> Self:
        """Itself; raises InvalidArgument naming the field, ResourceExhausted (MAX_SERVERS)."""
        checks.check_text(self.server_id, "server_id", max_characters=MAX_SERVER_ID_CHARACTERS)
        checks.check_text(self.detector, "detector", max_characters=MAX_DETECTOR_CHARACTERS)
        checks.check_text(self.metric, "metric", max_bytes=MAX_METRIC_BYTES)
        if not 0.0 <= self.min_score <= 1.0:
            raise InvalidArgument("lies outside of 0 to 1", field="min_score")
        if self.server_ids is not None and len(self.server_ids) > MAX_SERVERS:
            raise ResourceExhausted(  # it is the gateway that says which servers those of a role are
                f"more than {MAX_SERVERS} servers (MAX_SERVERS): name an environment or a role", reason="MAX_SERVERS"
            )
        if self.start_us is not None and self.end_us is not None and self.end_us < self.start_us:
            raise InvalidArgument("the end lies before the start", field="end_time")
        for field, edge_us in (("start_time", self.start_us), ("end_time", self.end_us)):
            _check_time(edge_us, field)
        return self

    def takes(self, known: Recorded) -> bool:
        """Whether a finding is wanted."""
        anomaly = known.anomaly
        if anomaly is None:
            return False
        start_us, end_us = anomaly.start_ms * 1_000, None if anomaly.end_ms is None else anomaly.end_ms * 1_000
        verdict = _VERDICTS[None if known.verdict is None else known.verdict.is_real]
        metrics = [part.metric for part in anomaly.contributions]
        return (
            self.server_id in {"", anomaly.server_id}
            and (self.server_ids is None or anomaly.server_id in self.server_ids)
            and (self.start_us is None or end_us is None or end_us >= self.start_us)
            and (self.end_us is None or start_us < self.end_us)
            and self.detector in {"", anomaly.detector}
            and (not self.metric or self.metric in metrics)
            and anomaly.score >= self.min_score
            and self.open in {None, end_us is None}
            and self.acknowledged in {None, known.acknowledged is not None}
            and self.verdict in {"", verdict}
        )

    def in_postgres(self, values: list[Any]) -> str:
        """The condition for a WHERE on `anomalies AS one`; its parameters are added to those that are there."""
        pieces = [_ACKNOWLEDGED[self.acknowledged], _SAID[self.verdict]]
        asked: tuple[tuple[str, Any, bool], ...] = (
            ("server_id = ${}", self.server_id, bool(self.server_id)),
            ("server_id = ANY (${}::text[])", self.server_ids, self.server_ids is not None),
            ("(ended_at IS NULL OR ended_at >= ${})", _instant(self.start_us), self.start_us is not None),
            ("started_at < ${}", _instant(self.end_us), self.end_us is not None),
            ("detector = ${}", self.detector, bool(self.detector)),
            (_HAS_METRIC, self.metric, bool(self.metric)),
            ("score >= ${}", self.min_score, self.min_score > 0),
            ("(ended_at IS NULL) = ${}", self.open, self.open is not None),
        )
        for piece, value, restricts in asked:
            if restricts:
                values.append(value)
                pieces.append(piece.format(len(values)))
        return " AND ".join(pieces)


_HAS_METRIC: Final = "contributions @> jsonb_build_array(jsonb_build_object('metric', ${}::text))"
_REMARKS: Final = "SELECT FROM anomaly_remarks AS said WHERE said.anomaly_id = one.id AND said.is_real"
_LAST_SAID: Final = """one.id IN (SELECT anomaly_id FROM (SELECT DISTINCT ON (anomaly_id) anomaly_id, is_real
    FROM anomaly_remarks WHERE is_real IS NOT NULL ORDER BY anomaly_id, said_at DESC) AS last WHERE {} is_real)"""
# Told apart here and not by a parameter, so that PostgreSQL joins the remarks once: of 200,000 findings of which 60,000
# have some, counting took 0.7 to 1.3 s when each was looked up.
_ACKNOWLEDGED: Final = {
    None: "true",
    True: f"EXISTS ({_REMARKS} IS NULL)",
    False: f"NOT EXISTS ({_REMARKS} IS NULL)",
}
_SAID: Final = {
    "": "true",
    "none": f"NOT EXISTS ({_REMARKS} IS NOT NULL)",
    "real": _LAST_SAID.format(""),
    "false": _LAST_SAID.format("NOT"),
}
_VERDICTS: Final = {None: "none", True: "real", False: "false"}


def _instant(edge_us: int | None) -> Any:
    return None if edge_us is None else instant_of(edge_us)


def _check_time(edge_us: int | None, field: str) -> None:
    try:
        _instant(edge_us)
    except OverflowError:
        raise InvalidArgument("the time is outside of the years 1 to 9999", field=field) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalyQuery:
    """A page of findings: those that match, before the place `before`, `limit` at most.

    The times of `filters` are those of the listing's first page, whatever a later page is asked with.
    """

    filters: AnomalyFilter
    limit: int
    before: tuple[int, str] | None

    @classmethod
    def of(cls, filters: AnomalyFilter, page_size: int, page_token: str) -> Self:
        """Raises InvalidArgument naming the field."""
        limit = paging.page_size(page_size)
        asked = paging.Window(filters.start_us, filters.end_us)
        window, last = paging.continued(LISTING, _bound(filters), asked, page_token, (int, str))
        filters = replace(filters, start_us=window.start, end_us=window.end).checked()
        before = None if last is None else (int(last[0]), check_id(str(last[1]), "page_token"))
        _check_time(None if before is None else before[0], "page_token")
        return cls(filters=filters, limit=limit, before=before)

    def is_on_page(self, known: Recorded) -> bool:
        """Whether a finding that matches is on this page or a later one."""
        return self.before is None or known.place < self.before

    def next_token(self, shown: Sequence[Recorded], *, more: bool) -> str:
        """Of the page after the one that shows these; empty: there is none."""
        if not more or not shown:
            return ""
        window = paging.Window(self.filters.start_us, self.filters.end_us)
        return paging.page_token(LISTING, _bound(self.filters), shown[-1].place, window)


def _bound(filters: AnomalyFilter) -> list[object]:
    """What a token is bound to, beside the edges of the window; not the servers, which may come and go meanwhile."""
    return list(astuple(replace(filters, start_us=None, end_us=None, server_ids=None)))
