"""Which servers are watched, and the place of each in a detector's arrays.

What must stay true: there are never more than the limit; a server that is watched is forgotten only when the limit is
reached and it has been silent for FORGET_AFTER_MS, so that a fleet over the limit does not learn and forget in turns.
"""

import logging
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from services.analytics.cells import Flags, Integers

FORGET_AFTER_MS: Final = 7 * 86_400_000
_FIRST_CAPACITY: Final = 64

_log = logging.getLogger(__name__)


class Servers:
    """The watched servers in the order in which they came."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ids: list[str] = []
        self.heard_ms: Integers = np.zeros(0, np.int64)
        """When the last row of each was journaled; `capacity` places."""
        self.refused_rows = 0
        self._index: dict[str, int] = {}

    @classmethod
    def restored(cls, limit: int, ids: Sequence[str], heard_ms: NDArray[Any] | None) -> Self:
        """The servers as they were saved.

        Raises:
            ValueError: the parts do not fit together.
        """
        if heard_ms is None or heard_ms.dtype != np.int64 or heard_ms.shape != (len(ids),):
            raise ValueError(f"the array heard_ms is not {len(ids)} values of int64")
        servers = cls(limit)
        servers.ids = list(ids)
        servers._index = {server_id: index for index, server_id in enumerate(ids)}
        if len(servers._index) != len(ids):
            raise ValueError("a server is there twice")
        servers.heard_ms = np.ascontiguousarray(heard_ms)
        return servers

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def capacity(self) -> int:
        """For how many servers arrays must have room."""
        return len(self.heard_ms)

    @property
    def is_full(self) -> bool:
        return len(self.ids) >= self.limit

    def lacks_any(self, server_ids: Sequence[str]) -> bool:
        """Whether one of the servers is not watched."""
        return not all(server_id in self._index for server_id in server_ids)

    def indices(self, server_ids: Sequence[str], received_ms: int) -> Integers:
        """The place of each server, new ones at the end; -1 for one beyond the limit."""
        known = self._index
        places = [known.get(server_id, -1) for server_id in server_ids]
        if -1 in places:
            places = [self._place(server_id) for server_id in server_ids]
        indices = np.array(places, np.int64)
        heard = indices[indices >= 0]
        self.heard_ms[heard] = received_ms
        return indices

    def _place(self, server_id: str) -> int:
        index = self._index.get(server_id)
        if index is not None:
            return index
        if self.is_full:
            if not self.refused_rows:
                _log.error("%d servers are watched (MAX_SERVERS): further ones are not judged", self.limit)
            self.refused_rows += 1
            return -1
        index = self._index[server_id] = len(self.ids)
        self.ids.append(server_id)
        if index >= self.capacity:
            more = np.zeros(max(_FIRST_CAPACITY, self.capacity), np.int64)
            self.heard_ms = np.concatenate((self.heard_ms, more))
        return index

    def forget_silent(self, now_ms: int) -> Flags | None:
        """Forgets who has been silent for FORGET_AFTER_MS; which places stay (`capacity` of them), None for all.

        Takes 0.1 ms for a full table of 50,000, so that it may be asked with every batch.
        """
        keep: Flags = self.heard_ms >= now_ms - FORGET_AFTER_MS
        keep[len(self.ids) :] = False
        if int(np.count_nonzero(keep)) == len(self.ids):
            return None
        _log.info("%d servers silent for 7 days are forgotten", len(self.ids) - int(np.count_nonzero(keep)))
        self.ids = [server_id for server_id, stays in zip(self.ids, keep.tolist(), strict=False) if stays]
        self._index = {server_id: index for index, server_id in enumerate(self.ids)}
        self.heard_ms = self.heard_ms[keep]
        return keep
