"""A run through blocks: which batches it ships, where it is, and from where on its store may lack what it took.

What must stay true: the cursor stands still until a run has ended, which may take hours; a store that dies meanwhile is
sent again what it acknowledged in the last minute before, and not all of it, so that one that comes and goes gets on.
"""

from collections import deque
from typing import Final

from services.timeseries.engine.cursors import SETTLED_AFTER_S
from services.timeseries.engine.unsent import START, Place

MAX_NOTED: Final = 10_000
"""Places of the last minute that are kept; further ones are not, so that more than that minute is sent again."""


class Run:
    """Of the batches `(after, through]`, from a place on."""

    def __init__(self, after: int, through: int, begin: Place = START) -> None:
        self.after = after
        self.through = through
        self.begin = begin
        self._settled = begin
        self._lately: deque[tuple[float, Place]] = deque()  # (monotonic seconds, place), of a minute
        self._lacking: Place | None = None

    def reached(self, place: Place, now_s: float) -> None:
        """The store has just acknowledged everything before a place."""
        if len(self._lately) < MAX_NOTED:
            self._lately.append((now_s, place))
        self._settle(now_s)

    def _settle(self, now_s: float) -> None:
        while self._lately and self._lately[0][0] <= now_s - SETTLED_AFTER_S:
            self._settled = self._lately.popleft()[1]

    def lost(self, now_s: float) -> None:
        """The store may have lost what it acknowledged in the last minute."""
        self._settle(now_s)
        self._lately.clear()
        self._lacking = self._settled if self._lacking is None else min(self._settled, self._lacking)

    def again(self) -> "Run":
        """The same from where the store may lack something; all of it if nothing is known of that."""
        return Run(self.after, self.through, START if self._lacking is None else self._lacking)
