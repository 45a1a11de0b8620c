"""What is read of a journal beside who writes it: batches in their order, what servers said, how far followers are.

What must stay true: a connection of its own reads what is committed; a journal that was opened by who writes it has
every table that is read here.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import apsw

from fleet.model import ServerDescriptor
from runtime.sqlite import fetch
from services.timeseries.engine import catalog as catalog_codec
from services.timeseries.engine.database import JOURNAL_PAGE_BYTES, connect
from services.timeseries.engine.left import left
from services.timeseries.engine.told import Told, read_told

SELECT: Final = "SELECT sequence, received_ms, metric_set, row_count, points, payload FROM batches"
"""What `rows_of` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRow:
    """A batch as it is stored; `metric_set` is the set's number, None for a batch that only carries descriptors."""

    sequence: int
    received_ms: int
    metric_set: int | None
    row_count: int
    points: int
    payload: bytes


class JournalReader:
    """A reading connection for tails, status and verification. One thread at a time."""

    def __init__(self, path: Path, db: apsw.Connection | None = None) -> None:
        """`db`: a connection to use, and to close, instead of a new one."""
        self._db = db or connect(path, JOURNAL_PAGE_BYTES)
        self._db.pragma("query_only", 1)

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """Has all that is read inside be of the same moment, whatever is written meanwhile."""
        with self._db:
            yield

    def first_sequence(self) -> int:
        """The oldest sequence still kept; one past the end when none is."""
        ((swept,),) = fetch(self._db, "SELECT value FROM meta WHERE key = 'swept_through'")
        return int(swept) + 1

    def read(self, from_sequence: int, through: int, bytes_limit: int) -> list[JournalRow]:
        """Batches of `[from_sequence, through]` in order, at least one if there is any, else within the limit."""
        found: list[JournalRow] = []
        query = f"{SELECT} WHERE sequence BETWEEN ? AND ? ORDER BY sequence"
        with closing(self._db.execute(query, (from_sequence, through))) as cursor:
            for row in rows_of(cursor):
                found.append(row)
                bytes_limit -= len(row.payload)
                if bytes_limit <= 0:
                    break
        return found

    def descriptors(self, first: int, last: int) -> list[tuple[int, ServerDescriptor]]:
        """The descriptors journaled with the sequences `[first, last]`, in order."""
        rows = self._db.execute(
            "SELECT sequence, descriptor FROM descriptors WHERE sequence BETWEEN ? AND ? ORDER BY sequence",
            (first, last),
        )
        return [(sequence, catalog_codec.decode_descriptor(text)) for sequence, text in rows]

    def descriptors_at(self, sequence: int) -> list[ServerDescriptor]:
        """For every server the descriptor valid just before `sequence`."""
        rows = self._db.execute(
            "SELECT descriptor, max(sequence) FROM descriptors WHERE sequence < ? GROUP BY server", (sequence,)
        )
        return [catalog_codec.decode_descriptor(text) for text, _ in rows]

    def told(self, server_id: str | None = None) -> dict[str, Told]:
        """What each server, or one, said of itself in the course of time, as far as it is kept."""
        return read_told(self._db, server_id)

    def followers(self) -> dict[str, int]:
        """The followers' names and the last sequence each has shipped."""
        return dict(fetch(self._db, "SELECT name, cursor FROM followers"))

    def counted(self, after: int, through: int, group: int) -> list[tuple[int, int]]:
        """The points of the batches in `(after, through]`, by so many sequences: the last one that is there, and how
        many points."""
        return [
            (last, int(points))
            for last, points in fetch(
                self._db,
                "SELECT max(sequence), total(points) FROM batches WHERE sequence > ? AND sequence <= ?"
                " GROUP BY sequence / ? ORDER BY 1",
                (after, through, group),
            )
        ]

    def points_between(self, after: int, through: int) -> int:
        """The points of the batches in `(after, through]`."""
        ((points,),) = fetch(
            self._db, "SELECT total(points) FROM batches WHERE sequence > ? AND sequence <= ?", (after, through)
        )
        return int(points)

    def received_after(self, sequence: int) -> int | None:
        """When the first batch after a sequence was received; None: there is none."""
        found = fetch(
            self._db, "SELECT received_ms FROM batches WHERE sequence > ? ORDER BY sequence LIMIT 1", (sequence,)
        )
        return int(found[0][0]) if found else None

    def left_of(self, name: str) -> tuple[int, int] | None:
        """What left the journal before a follower had it: points, and when the oldest was received."""
        return left(self._db).get(name)

    def close(self) -> None:
        self._db.close()


def rows_of(cursor: apsw.Cursor) -> Iterator[JournalRow]:
    """The batches that a statement beginning with `SELECT` finds."""
    for sequence, received_ms, metric_set, row_count, points, payload in cursor:
        yield JournalRow(
            sequence=sequence,
            received_ms=received_ms,
            metric_set=metric_set,
            row_count=row_count,
            points=points,
            payload=payload if isinstance(payload, bytes) else b"",  # of a torn row SQLite may make NULL
        )
