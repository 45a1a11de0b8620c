"""What a server said of itself in the course of time: the descriptor that was valid when a row was written.

A follower tags a row with the descriptor valid at its sequence. The rows of a block have their sequences too, so that
whoever ships them later, from blocks, can give them the same tags. What must stay true: where the answer is not certain
that is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import apsw
import numpy as np
from numpy.typing import NDArray

from fleet.model import ServerDescriptor
from runtime.sqlite import fetch
from services.timeseries.engine.catalog import decode_descriptor

_DESCRIPTORS_CUT: Final = "CREATE TABLE descriptors_cut (server INTEGER PRIMARY KEY) STRICT"
_MARK_CUT: Final = """
INSERT INTO descriptors_cut SELECT server FROM descriptors GROUP BY server
    HAVING min(sequence) <= (SELECT value + 1 FROM meta WHERE key = 'swept_through')
    AND (SELECT value FROM meta WHERE key = 'swept_through') > 0
"""

KEPT_DESCRIPTORS: Final = 100
"""So many changes of a server are remembered, so that its rows in blocks can be tagged; some 250 bytes each."""

_MANY_DESCRIPTORS: Final = """
SELECT server FROM descriptors WHERE server IN (SELECT server FROM descriptors WHERE sequence BETWEEN ?1 AND ?2)
    GROUP BY server HAVING count(*) > ?3
"""
_FORGET_DESCRIPTORS: Final = """
DELETE FROM descriptors WHERE server = ?1
    AND sequence < (SELECT max(sequence) FROM descriptors WHERE server = ?1 AND sequence <= ?2)
    AND sequence NOT IN (SELECT sequence FROM descriptors WHERE server = ?1 ORDER BY sequence DESC LIMIT ?3)
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Told:
    """The descriptors of one server, at least one; `sequences[i]` (int64, ascending) is where `descriptors[i]` came.

    `is_cut`: there were more before the first, which are forgotten.
    """

    sequences: NDArray[np.int64]
    descriptors: tuple[ServerDescriptor, ...]
    is_cut: bool

    @classmethod
    def of(cls, listed: Sequence[tuple[int, ServerDescriptor]], is_cut: bool) -> "Told":
        sequences = np.array([sequence for sequence, _ in listed], np.int64)
        return cls(sequences=sequences, descriptors=tuple(descriptor for _, descriptor in listed), is_cut=is_cut)

    def at(self, sequences: NDArray[np.int64]) -> tuple[tuple[ServerDescriptor | None, ...], NDArray[np.bool_]]:
        """For each row's sequence what was valid (None: nothing had been told), and whether that is only likely: what
        was said before the first descriptor that is kept is taken to be the same."""
        places = self.sequences.searchsorted(sequences, side="right") - 1
        early = places < 0
        if self.is_cut:
            return tuple(map(self.descriptors.__getitem__, np.maximum(places, 0).tolist())), early
        known = (*self.descriptors, None)  # so that -1 is None
        return tuple(map(known.__getitem__, places.tolist())), np.zeros(len(sequences), np.bool_)


def add_cut_table(db: apsw.Connection) -> None:
    """Adds what a journal from before descriptors were kept does not have, and marks whose were forgotten in it."""
    if not db.table_exists("main", "descriptors_cut"):
        db.execute(_DESCRIPTORS_CUT)
        db.execute(_MARK_CUT)


def forget(db: apsw.Connection, first: int, last: int) -> None:
    """Forgets what was said too many changes ago, of servers that said something in `[first, last]`; but never what is
    valid for the batch `last` and those after it. In the caller's transaction."""
    for (server,) in fetch(db, _MANY_DESCRIPTORS, (first, last, KEPT_DESCRIPTORS)):
        db.execute(_FORGET_DESCRIPTORS, (server, last, KEPT_DESCRIPTORS))
        if db.changes():
            db.execute("INSERT OR IGNORE INTO descriptors_cut VALUES (?)", (server,))


def read_told(db: apsw.Connection, server_id: str | None) -> dict[str, Told]:
    """What each server, or one, said of itself, as far as it is kept."""
    rows = fetch(
        db,
        "SELECT server_id, sequence, descriptor, descriptors_cut.server IS NOT NULL FROM descriptors"
        " JOIN servers ON servers.id = descriptors.server LEFT JOIN descriptors_cut USING (server)"
        " WHERE ?1 IN ('', server_id) ORDER BY descriptors.server, sequence",
        (server_id or "",),
    )
    found = {}
    for (name, is_cut), of_server in groupby(rows, key=lambda row: (row[0], bool(row[3]))):
        listed = [(sequence, decode_descriptor(text)) for _, sequence, text, _ in of_server]
        found[name] = Told.of(listed, is_cut)
    return found
