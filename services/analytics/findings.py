"""Findings: stretches of time in which a server was not as usual, kept in memory and listed newest first.

What must stay true: a finding has the same id whenever and wherever it is found; there are never more than the bound,
and what goes first is the oldest that is over; a listing is a function of the store and the token, so that paging goes
on where it was although findings come and go in between.
"""

import hashlib
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from runtime import paging
from runtime.errors import InvalidArgument

MAX_FINDINGS: Final = 10_000

Key = tuple[int, str]
"""(-start_ms, id): ascending, it is newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """How one metric had a part in a finding.

    Attributes:
        value: its mean over the minute of the peak, in the metric's unit; of a counter, its rate a second.
        expected_low, expected_high: the range that was expected then.
        score: how far from normal that was, 0 to 1.
    """

    metric: str
    value: float
    expected_low: float
    expected_high: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """A finding; times are milliseconds since the Unix epoch.

    Attributes:
        metric: the metric that departed furthest; empty where the server fell silent.
        start_ms, end_ms: when it was abnormal; end_ms is None while it goes on.
        peak_ms: when it was furthest from normal.
        score: how far that was, 0 to 1.
        value: what was measured then, in the metric's unit; where the server fell silent, for how many seconds.
        expected_low, expected_high: the range that was expected then.
        contributions: the metrics that were most abnormal then, most abnormal first.
    """

    id: str
    server_id: str
    metric: str
    start_ms: int
    end_ms: int | None
    peak_ms: int
    score: float
    value: float
    expected_low: float
    expected_high: float
    detector: str
    contributions: tuple[Contribution, ...] = ()

    @property
    def key(self) -> Key:
        """Its place in listings."""
        return -self.start_ms, self.id


def finding_id(server_id: str, detector: str, start_ms: int) -> str:
    """32 hexadecimal digits made from what a finding is about; neither text can hold a NUL."""
    about = "\0".join((server_id, detector, str(start_ms)))
    return hashlib.sha256(about.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which findings: of one server, and with a part in `[start_ms, end_ms)`; None does not ask."""

    server_id: str = ""
    start_ms: int | None = None
    end_ms: int | None = None

    def checked(self) -> Self:
        """Itself; raises InvalidArgument where the end lies before the start."""
        if self.start_ms is not None and self.end_ms is not None and self.end_ms < self.start_ms:
            raise InvalidArgument("the end lies before the start", field="end_time")
        return self

    def takes(self, finding: Anomaly) -> bool:
        """Whether a finding is wanted; one that goes on has no end yet."""
        if self.server_id and finding.server_id != self.server_id:
            return False
        if self.start_ms is not None and finding.end_ms is not None and finding.end_ms < self.start_ms:
            return False
        return self.end_ms is None or finding.start_ms < self.end_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page of a listing."""

    findings: Sequence[Anomaly]
    next_page_token: str
    total_size: int


class FindingStore:
    """The findings, newest first, at most `limit` of them."""

    def __init__(self, limit: int = MAX_FINDINGS) -> None:
        self._limit = limit
        self._by_id: dict[str, Anomaly] = {}
        self._keys: list[Key] = []  # of all findings, sorted: sorting 10,000 at each listing would take 8 ms

    def __len__(self) -> int:
        return len(self._by_id)

    def all(self) -> tuple[Anomaly, ...]:
        """All findings, newest first."""
        return tuple(self._by_id[finding_id] for _, finding_id in self._keys)

    def put(self, findings: Iterable[Anomaly]) -> None:
        """Keeps findings as they are now; the same id is the same finding."""
        for finding in findings:
            if finding.id not in self._by_id:
                if len(self._by_id) >= self._limit:
                    self._drop_oldest()
                insort(self._keys, finding.key)
            self._by_id[finding.id] = finding

    def _drop_oldest(self) -> None:
        """Drops the oldest that is over; where all go on, the oldest."""
        last = len(self._keys) - 1
        over = (place for place in range(last, -1, -1) if self._by_id[self._keys[place][1]].end_ms is not None)
        _, finding_id = self._keys.pop(next(over, last))
        del self._by_id[finding_id]

    def list(self, wanted: Filter, *, page_size: int, page_token: str) -> Page:
        """One page; takes 2 ms with 10,000 findings.

        Args:
            wanted: which findings; the times of a page that is not the first are those that the first was asked with.
            page_size: as `runtime.paging.page_size` takes it.
            page_token: of the page before, empty for the first.

        Raises:
            InvalidArgument: a negative size, a token that is not of a listing with these filters, an end before the
                start.
        """
        filters = (wanted.server_id,)
        asked = paging.Window(wanted.start_ms, wanted.end_ms)
        window, _ = paging.continued("anomalies", filters, asked, page_token, (int, str))
        wanted = replace(wanted, start_ms=window.start, end_ms=window.end).checked()
        matches = [finding for finding in self.all() if wanted.takes(finding)]
        shown, token = paging.page_of(
            matches,
            lambda finding: finding.key,
            listing="anomalies",
            filters=filters,
            size=paging.page_size(page_size),
            token=page_token,
            window=window,
        )
        return Page(findings=shown, next_page_token=token, total_size=len(matches))
