"""What a follower ships, in what portions, and what a store must do with it. Knows no store.

What must stay true: a portion is bounded in rows, points and bytes, however large the batches are that it is made of.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Protocol

from fleet.model import MetricSet, Rows, ServerDescriptor
from runtime.errors import Unavailable

MAX_SHIP_POINTS: Final = 50_000
"""Points shipped at once, absent ones counted. A batch of the journal with more is split between rows, never within
one; the cursor moves when all of it is shipped."""
MAX_SHIP_BYTES: Final = 4 << 20
"""Bytes of the arrays shipped at once; the tail holds as much again."""
MAX_SHIP_ROWS: Final = 5_000
"""Rows shipped at once; also what it costs at worst to find refused ones: two requests for each."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaggedRows:
    """Rows of one set; `descriptors[i]` is what was valid of row i's server, None when it was never told."""

    metric_set: MetricSet
    rows: Rows
    descriptors: tuple[ServerDescriptor | None, ...]

    def __len__(self) -> int:
        return len(self.descriptors)

    @property
    def cells(self) -> int:
        """Points, absent ones counted."""
        return int(self.rows.values.size)

    @property
    def bytes(self) -> int:
        """Of the arrays."""
        return int(self.rows.values.nbytes + self.rows.times_ms.nbytes)

    def part(self, start: int, stop: int) -> "TaggedRows":
        """The rows `[start, stop)`; arrays are views."""
        rows = Rows(
            metric_set_id=self.rows.metric_set_id,
            server_ids=self.rows.server_ids[start:stop],
            times_ms=self.rows.times_ms[start:stop],
            values=self.rows.values[start:stop],
        )
        return TaggedRows(metric_set=self.metric_set, rows=rows, descriptors=self.descriptors[start:stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a store did with a batch: points it has, and points that can never be there, by reason (UPPER_SNAKE)."""

    shipped: int
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """What a store says it is, and what else an operator should know."""

    version: str
    note: str = ""


class Backend(Protocol):
    """An external store. Every call ends within a bound of its own and never blocks the event loop."""

    @property
    def name(self) -> str:
        """The follower's name in the engine and in the status."""

    @property
    def address(self) -> str:
        """Where the store is, without secrets; known also while it does not answer."""

    @property
    def syncs(self) -> bool:
        """Whether what it acknowledges is on its disk, and not only in its memory."""

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        """Returns once the store has taken the rows; of equal rows the later one wins, a repeated one is a
        no-op. Called again only after it ended.

        Raises:
            Unavailable: not now; nothing is known of what arrived. `retry_after_s` may say when.
            InvalidArgument: some row is refused for good; others may or may not have arrived. Ship them apart.
        """

    async def probe(self) -> BackendInfo:
        """Raises Unavailable, in words for an operator, when rows could not be shipped now."""

    async def close(self) -> None:
        """Ends what runs."""


def is_silence(error: Unavailable) -> bool:
    """Whether the store may have died, with what it had in memory; else it only asks for a pause, however long."""
    return error.retry_after_s is None and error.reason != "STORE_THROTTLES"


class Portion:
    """Rows collected for one batch, and up to which sequence nothing is missing in it or before it."""

    def __init__(self) -> None:
        self.rows: list[TaggedRows] = []
        self.through = 0
        self._cells = self._bytes = self._count = 0

    def fits(self, rows: TaggedRows) -> bool:
        return (
            self._cells + rows.cells <= MAX_SHIP_POINTS
            and self._bytes + rows.bytes <= MAX_SHIP_BYTES
            and self._count + len(rows) <= MAX_SHIP_ROWS
        )

    def add(self, rows: TaggedRows) -> None:
        self.rows.append(rows)
        self._cells += rows.cells
        self._bytes += rows.bytes
        self._count += len(rows)

    def clear(self) -> None:
        self.rows = []
        self._cells = self._bytes = self._count = 0


def parts(rows: TaggedRows) -> Iterator[TaggedRows]:
    """The rows in parts that keep the bounds."""
    a_row = max(1, len(rows.metric_set))
    step = max(1, min(MAX_SHIP_ROWS, MAX_SHIP_POINTS // a_row, MAX_SHIP_BYTES // (8 * a_row + 8)))
    for start, stop in pairwise([*range(0, len(rows), step), len(rows)]):
        yield rows.part(start, stop)


def halves(part: Sequence[TaggedRows]) -> tuple[list[TaggedRows], list[TaggedRows]] | None:
    """The two halves of a batch, in order; None for a single row."""
    middle = sum(map(len, part)) // 2
    if not middle:
        return None
    first: list[TaggedRows] = []
    second: list[TaggedRows] = []
    for rows in part:
        cut = max(0, min(len(rows), middle))
        middle -= cut
        if cut:
            first.append(rows.part(0, cut))
        if cut < len(rows):
            second.append(rows.part(cut, len(rows)))
    return first, second
