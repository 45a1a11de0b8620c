"""How much left the journal before a follower had it: what its lag is made of beside the batches that are kept.

What must stay true: it is noted in the transaction that deletes the batches, and forgotten in the one in which the
cursor passes them.
"""

from collections.abc import Mapping

import apsw

from runtime.sqlite import fetch

_LEFT = """
CREATE TABLE IF NOT EXISTS left_unshipped (name TEXT PRIMARY KEY, points INTEGER NOT NULL, oldest_ms INTEGER NOT NULL)
    STRICT, WITHOUT ROWID
"""


def add_left_table(db: apsw.Connection) -> None:
    """Adds it to a journal that does not have it."""
    db.execute(_LEFT)


def note_left(db: apsw.Connection, cursors: Mapping[str, int], last: int) -> None:
    """Notes what of the batches up to a sequence, which are about to go, each follower lacks."""
    for name, cursor in cursors.items():
        if cursor < last:
            db.execute(
                """INSERT INTO left_unshipped
                    SELECT ?, CAST(total(points) AS INTEGER), min(received_ms) FROM batches
                    WHERE sequence > ? AND sequence <= ? HAVING count(*)
                ON CONFLICT (name) DO UPDATE SET points = points + excluded.points,
                    oldest_ms = min(oldest_ms, excluded.oldest_ms)""",
                (name, cursor, last),
            )


def forget_left(db: apsw.Connection, name: str) -> None:
    """Forgets it: the follower has it, or is gone."""
    db.execute("DELETE FROM left_unshipped WHERE name = ?", (name,))


def left(db: apsw.Connection) -> dict[str, tuple[int, int]]:
    """By follower: points, and when the oldest of them was received."""
    found = fetch(db, "SELECT name, points, oldest_ms FROM left_unshipped")
    return {name: (points, oldest_ms) for name, points, oldest_ms in found}
