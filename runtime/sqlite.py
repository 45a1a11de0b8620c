"""What every SQLite file of ours needs: transactions, small answers, names that survive a loss of power."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apsw


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


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable: a new file is lost with its directory entry."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
