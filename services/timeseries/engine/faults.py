"""What went wrong, for the status: damaged blocks are counted once each, and the last error keeps its time."""

import logging
import threading
from dataclasses import dataclass

from runtime.clock import Clock

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastError:
    """The newest failure: text for people and when it was, UTC epoch milliseconds."""

    message: str
    time_ms: int


class Faults:
    """Thread-safe."""

    def __init__(self, clock: Clock, remembered: int) -> None:
        self._clock = clock
        self._remembered = remembered
        self._lock = threading.Lock()
        self._damaged: set[tuple[str, int]] = set()
        self.last: LastError | None = None

    @property
    def damaged(self) -> int:
        """How many distinct blocks, partitions and journal rows could not be read back, up to the bound."""
        with self._lock:
            return len(self._damaged)

    def damage(self, where: str, number: int, message: str) -> None:
        """Counts something unreadable; what was known before is not logged again."""
        with self._lock:
            known = (where, number) in self._damaged
            if not known and len(self._damaged) < self._remembered:
                self._damaged.add((where, number))
        if not known:
            _log.error("%s, number %d, cannot be read and is left out: %s", where, number, message)
        self.note(f"{where}, number {number}: {message}")

    def note(self, message: str) -> None:
        """Remembers a failure."""
        self.last = LastError(message=message, time_ms=self._clock.now_ms())
