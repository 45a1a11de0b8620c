"""What of the rows of an import was not taken, and why: counted by kind, with the first places of each.

What must stay true: rows = taken + not taken + without a value + repeated; every kind is named with its column. Rows
are blamed by the thread that reads and by the event loop that sends.
"""

import bisect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

MAX_PLACES: Final = 3
"""Places listed of each kind of fault."""
MAX_KINDS: Final = 50
"""Kinds listed; what comes then is counted as one."""
OTHERS: Final = ("any", "other faults")


@dataclass(slots=True)
class Fault:
    """One kind of fault: how many rows have it and the first of them."""

    rows: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Book:
    """What became of the rows of some files; a row's place is its number over all files, in their order."""

    files: list[Path]
    starts: list[int]
    rows: int = 0
    taken: int = 0
    without_value: int = 0
    damaged: list[str] = field(default_factory=list)
    faults: dict[tuple[str, str], Fault] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def blame(self, column: str, what: str, rows: int, places: Iterator[int]) -> None:
        """Counts rows that are not taken."""
        kind = (column, what)
        with self._lock:
            if kind not in self.faults and len(self.faults) >= MAX_KINDS:
                kind = OTHERS
            fault = self.faults.setdefault(kind, Fault())
            fault.rows += rows
            for place in islice(places, MAX_PLACES - len(fault.places)):
                fault.places.append(self.place(place))

    def place(self, row: int) -> str:
        """`file row 17`, counted from 1."""
        number = bisect.bisect_right(self.starts, row) - 1
        return f"{self.files[number]} row {row - self.starts[number] + 1}"

    @property
    def not_taken(self) -> int:
        with self._lock:
            return sum(fault.rows for fault in self.faults.values())

    @property
    def repeated(self) -> int:
        """Rows whose server, metric and time another one of the same buffer has; the last of them is taken."""
        return self.rows - self.taken - self.not_taken - self.without_value

    def lines(self) -> Iterator[str]:
        """One for each kind, those with most rows first."""
        for (column, what), fault in sorted(self.faults.items(), key=lambda item: -item[1].rows):
            more = ", ..." if fault.rows > len(fault.places) else ""
            yield f"{fault.rows:,} rows not taken, column {column}: {what}: {', '.join(fault.places)}{more}"
