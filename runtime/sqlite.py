"""What every SQLite file of ours needs: transactions, small answers, names that survive a loss of power."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import apsw

_STEP_BYTES: Final = 1 << 20


class Transaction:
    """BEGIN IMMEDIATE to COMMIT; a failed COMMIT is rolled back, so that the connection can go on."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def fetch(db: apsw.Connection, query: str, bindings: Sequence[int | str | float | None] = ()) -> list[Any]:
    """All rows of a small answer; the statement is finished when it returns, so that it holds no snapshot."""
    return db.execute(query, bindings).fetchall()


def give_back(db: apsw.Connection, pages: int = sys.maxsize) -> None:
    """Gives free pages back to the file system, at most so many; for files with `auto_vacuum=INCREMENTAL` and a log.

    Where somebody reads what was before, the file is cut when the log is next copied into it.

    In small transactions: a page that is cut off is written all the same where the changed ones do not fit into the
    page cache (2 MB). 8,200 pages of 8 KiB took 63 MB of the log and 0.15 s at 4,096 a transaction, 1.1 MB and 0.03 s
    so.
    """
    step = _STEP_BYTES // int(db.pragma("page_size"))
    left = min(pages, int(db.pragma("freelist_count")))
    for at in range(0, left, step):
        fetch(db, f"PRAGMA incremental_vacuum({min(step, left - at)})")
    if left:
        with suppress(apsw.BusyError):  # somebody copies it just now
            db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)


def is_full(error: BaseException) -> bool:
    """Whether a disk has no room: SQLite calls it an I/O error where it is the index of a log that finds none (32 KB,
    made when a file is opened)."""
    return isinstance(error, apsw.FullError) or getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_SHMSIZE


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: a new file is lost with its directory entry."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
