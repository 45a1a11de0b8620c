"""How much of the journal a follower lacks, without reading it each time that somebody asks.

The status asks every two seconds, and what a follower lacks after an hour's outage may be gigabytes: to add it up took
2 s for 60,000 batches of 4 KB, in which nobody else could read the journal, and the engine was shown as down. So each
batch is counted once, in groups, and groups are let go as the cursor passes them.

What must stay true: the number is exact as soon as all that waits was counted; until then, which takes a few questions
after a start, what is not counted is taken to be like what is.
"""

from collections import deque
from typing import Final, NamedTuple

from services.timeseries.engine.journal_reader import JournalReader

GROUP_BATCHES: Final = 1_000
"""So many are added up again for each question, where the cursor is in the midst of them."""
MOST_AT_ONCE: Final = 10_000
"""Batches that are counted for one question."""


class Behind(NamedTuple):
    """What a follower has not shipped (batches: of those that are kept), and when the oldest of it was received (None:
    nothing is left)."""

    batches: int
    points: int
    oldest_ms: int | None


class Backlog:
    """Of one follower. One thread at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._groups: deque[tuple[int, int]] = deque()  # (last sequence, points), of the batches in between
        self._after = self._through = self._points = 0

    def behind(self, reader: JournalReader, cursor: int, last: int) -> Behind:
        """What a follower lacks at its cursor, also of what the journal, which ends with `last`, does not have any
        more."""
        cursor_kept = max(cursor, reader.first_sequence() - 1)
        points = self._points_after(reader, cursor_kept, last)
        gone_points, oldest_ms = reader.left_of(self._name) or (0, reader.received_after(cursor_kept))
        return Behind(max(0, last - cursor_kept), points + gone_points, oldest_ms)

    def _points_after(self, reader: JournalReader, cursor: int, last: int) -> int:
        if not self._after <= cursor < self._through:  # it went back, or past all that was counted
            self._groups.clear()
            self._after, self._through, self._points = cursor, cursor, 0
        while self._groups and self._groups[0][0] <= cursor:
            self._after, points = self._groups.popleft()
            self._points -= points
        for through, points in reader.counted(self._through, min(last, self._through + MOST_AT_ONCE), GROUP_BATCHES):
            if self._groups and self._groups[-1][0] // GROUP_BATCHES == through // GROUP_BATCHES:
                points_before = self._groups.pop()[1]
                self._groups.append((through, points_before + points))
            else:
                self._groups.append((through, points))
            self._points += points
            self._through = through
        if not self._groups:
            return 0
        first, points = self._groups[0]
        waiting = self._points
        if cursor > self._after:
            waiting += reader.points_between(cursor, first) - points
        uncounted = max(0, last - self._through)
        return waiting + uncounted * self._points // (self._through - self._after)
