"""Findings: stretches of time in which a series was not as usual, kept in memory and listed newest first.

What must stay true: a finding has the same id whenever and wherever it is found; there are never more than the bound,
and what goes first is the oldest that is over; a listing is a function of the store and the token, so that paging goes
on where it was although findings come and go in between.
"""

import base64
import binascii
import hashlib
from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from runtime.errors import InvalidArgument

MAX_FINDINGS: Final = 10_000
DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000
MAX_TOKEN_CHARACTERS: Final = 1_024
_DIGEST_BYTES: Final = 8

Key = tuple[int, str]
"""(-start_ms, id): ascending, it is newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """A finding; times are milliseconds since the Unix epoch.

    Attributes:
        metric: the metric that departed furthest.
        start_ms, end_ms: first and last abnormal point; end_ms is None while it goes on.
        peak_ms: when it was furthest from normal.
        score: how far that was, 0 to 1.
        value: what was measured then, in the metric's unit.
        expected_low, expected_high: the range that was expected then.
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

    @property
    def key(self) -> Key:
        """Its place in listings."""
        return -self.start_ms, self.id


def finding_id(server_id: str, detector: str, metric: str, start_ms: int) -> str:
    """32 hexadecimal digits made from what a finding is about; no text of the four can hold a NUL."""
    about = "\0".join((server_id, detector, metric, str(start_ms)))
    return hashlib.sha256(about.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which findings: of one server, and with a part in `[start_ms, end_ms)`; None does not ask."""

    server_id: str = ""
    start_ms: int | None = None
    end_ms: int | None = None

    def __post_init__(self) -> None:
        if self.start_ms is not None and self.end_ms is not None and self.end_ms < self.start_ms:
            raise InvalidArgument("the end lies before the start", field="end_time")

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
            wanted: which findings.
            page_size: 0 for DEFAULT_PAGE_SIZE; more than MAX_PAGE_SIZE is taken as that.
            page_token: of the page before, empty for the first.

        Raises:
            InvalidArgument: a negative size, or a token that is not of a listing with these filters.
        """
        if page_size < 0:
            raise InvalidArgument("the page size is negative", field="page_size")
        size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        matches = [finding for finding in self.all() if wanted.takes(finding)]
        start = bisect_right(matches, _key_of(page_token, wanted), key=lambda one: one.key) if page_token else 0
        shown = matches[start : start + size]
        more = start + size < len(matches)
        token = _token(shown[-1].key, wanted) if more else ""
        return Page(findings=shown, next_page_token=token, total_size=len(matches))


def _token(last: Key, wanted: Filter) -> str:
    """A place and a digest that binds it to the filters; it grants nothing, so it needs no secret."""
    body = orjson.dumps(last)
    return base64.urlsafe_b64encode(_digest(body, wanted) + body).rstrip(b"=").decode()


def _key_of(token: str, wanted: Filter) -> Key:
    try:
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise ValueError
        raw = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        digest, body = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        if digest != _digest(body, wanted):
            raise ValueError
        place, finding_id = orjson.loads(body)
        return int(place), str(finding_id)
    except (ValueError, binascii.Error):
        raise InvalidArgument(
            "is not a token of this listing with these filters; ask for the first page again", field="page_token"
        ) from None


def _digest(body: bytes, wanted: Filter) -> bytes:
    filters = orjson.dumps(["anomalies", wanted.server_id, wanted.start_ms, wanted.end_ms])
    return hashlib.blake2b(filters + body, digest_size=_DIGEST_BYTES).digest()
