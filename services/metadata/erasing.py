"""Taking facts out of the journal that somebody has a right to have forgotten.

What must stay true: of what is erased nothing is left in the file, whatever its state was, and what tells PostgreSQL to
erase it is stored in the same transaction; what is only old goes when PostgreSQL has it, and not before.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

import apsw

from runtime.sqlite import Transaction, fetch
from services.metadata.journal import INSERT, Fact
from services.metadata.journal_query import UNWRITTEN


def erase(db: apsw.Connection, kinds: Sequence[str], subject: str, instead: Callable[[list[str]], Fact]) -> list[str]:
    """Deletes all facts about a subject and stores `instead`, in one transaction; their bytes are overwritten.

    `instead` is made of the ids of those of the first kind that PostgreSQL does not have, which are returned.
    """
    which = ", ".join("?" * len(kinds))
    with Transaction(db):
        ids = unwritten(db, kinds[0], subject)
        db.execute(f"DELETE FROM facts WHERE kind IN ({which}) AND subject = ?", (*kinds, subject))  # noqa: S608
        db.execute("DELETE FROM dead_letters WHERE sequence NOT IN (SELECT sequence FROM facts)")
        fact = instead(ids)
        db.execute(INSERT, (fact.kind, fact.id, fact.subject, fact.created_us, fact.payload))
    with suppress(apsw.Error):  # the log has them, too, until it begins anew; a reader may be in the way of that
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    return ids


def unwritten(db: apsw.Connection, kind: str, subject: str) -> list[str]:
    """The ids of the facts about a subject that PostgreSQL does not have."""
    statement = f"SELECT id FROM {UNWRITTEN} WHERE kind = ? AND subject = ? AND state <> 1"  # noqa: S608
    return [str(text) for (text,) in fetch(db, statement, (kind, subject))]


def last_us(db: apsw.Connection, kind: str, subject: str) -> int:
    """When the last of the facts about a subject happened, also of those that PostgreSQL has; 0: there is none."""
    ((found,),) = fetch(db, "SELECT max(created_us) FROM facts WHERE kind = ? AND subject = ?", (kind, subject))
    return 0 if found is None else int(str(found))


def forget(db: apsw.Connection, kinds: Sequence[str], before_us: int) -> None:
    """Deletes what PostgreSQL has and what happened before a time."""
    which = ", ".join("?" * len(kinds))
    with Transaction(db):
        db.execute(
            f"DELETE FROM facts WHERE kind IN ({which}) AND created_us < ? AND state = 1",  # noqa: S608
            (*kinds, before_us),
        )
