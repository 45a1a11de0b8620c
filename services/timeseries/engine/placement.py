"""Which days lie together in a file: of a folder's partitions, and of the next one that is made.

A file has a fixed number of days, or a power of two times as many where few points come, so that a fleet of little does
not make a thousand files.

What must stay true: a day belongs to one file only, and goes on doing so for as long as that file is there, whatever is
expected later; a new file is as long as its neighbours leave room, one in the place of another as long as that was.
"""

import math
from collections.abc import Mapping
from itertools import chain


class Placement:
    """The files that there are, by their first days. Not thread-safe: whoever has it has a lock."""

    def __init__(
        self, spans: Mapping[int, int], *, span_days: int, sparse_days: int | None, sparse_points: int
    ) -> None:
        """See `Partitions`; `spans` are the files that there are."""
        self.spans = dict(spans)
        """First day -> days."""
        self.points: dict[int, int] = {}
        """First day -> points in readable blocks."""
        self._vacant: dict[int, int] = {}
        """First day -> days, of files that are set aside: rows that are about to be stored in them go to new ones."""
        self.span_days = span_days
        self.expected = math.inf
        """Points a day that are to come, for the first file: a later one is made like the newest."""
        self._sparse_days = sparse_days or span_days  # times a power of two
        self._sparse_points = sparse_points

    def place(self, day: int) -> tuple[int, int]:
        """The first day and the number of days of the file that a day belongs to, or would belong to if it were made
        now."""
        days = self._sparse_days
        while days >= self.span_days:
            start = day // days * days
            span = self.spans.get(start) or self._vacant.get(start, 0)
            if day < start + span:
                return start, span
            days //= 2
        days = self._sparse_days if self.is_sparse() else self.span_days
        while days > self.span_days and any(day // days == other // days for other in chain(self.spans, self._vacant)):
            days //= 2
        return day // days * days, days

    def is_sparse(self) -> bool:
        """Whether few points a day are to be expected: as few as the newest file has."""
        newest = max(self.spans, default=None)
        expected = self.expected if newest is None else self.points.get(newest, 0) / self.spans[newest]
        return expected < self._sparse_points

    def within(self, first: int, last: int) -> list[int]:
        """The first days of files that have a day in `[first, last]`, ascending."""
        return sorted(day for day, span in self.spans.items() if day <= last and first < day + span)

    def made(self, day: int, days: int) -> None:
        """There is a file now; one that was known stays as it was."""
        self.spans.setdefault(day, days)
        self.points.setdefault(day, 0)
        self._vacant.pop(day, None)

    def forget(self, day: int, *, made_again: bool = False) -> None:
        """The file is gone; `made_again`: there will be another one for its days."""
        days = self.spans.pop(day, None)
        self.points.pop(day, None)
        if made_again and days is not None:
            self._vacant[day] = days
