"""How many watch at once in one process: so many in all, and half of them for one caller.

A watcher costs little and ends when he likes, so who has a token could take all places and blind everybody else. That
half is for who has one of `AccessService`; others are administrators, and all of them one caller.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from fleet import access
from runtime.errors import ResourceExhausted


class Watchers:
    """The watchers of one kind."""

    def __init__(self, most: int, what: str) -> None:
        """`what` they watch, for who is refused."""
        self._most = most
        self._what = what
        self._count = 0
        self._of: Counter[str] = Counter()  # by name, as somebody may have several tokens and sessions

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def counted(self) -> Iterator[None]:
        """The running call's caller watches for as long as the block runs.

        Raises:
            ResourceExhausted: MAX_WATCHERS.
        """
        found = access.caller()
        name = found.name if found is not None and found.token_id else ""
        if self._count >= self._most:
            raise self._too_many(f"{self._most} clients")
        if name and self._of[name] >= self._most // 2:
            raise self._too_many(f"{self._most // 2} clients of {name}")
        self._count += 1
        self._of[name] += 1
        try:
            yield
        finally:
            self._count -= 1
            self._of[name] -= 1
            if not self._of[name]:
                del self._of[name]

    def _too_many(self, who: str) -> ResourceExhausted:
        return ResourceExhausted(f"{who} watch {self._what} already (MAX_WATCHERS)", metadata={"limit": "MAX_WATCHERS"})
