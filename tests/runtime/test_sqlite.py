"""Free pages of a SQLite file go back to the file system, without being written once more."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from runtime.sqlite import fetch, give_back

ROW = 100_000
ROWS = 100


@pytest.fixture
def db(tmp_path: Path) -> Iterator[apsw.Connection]:
    """Of 100 rows, 10 MB, the first 80 are gone, and the log is empty."""
    with closing(apsw.Connection(str(tmp_path / "some.db"))) as connection:
        connection.pragma("page_size", 8_192)
        connection.pragma("auto_vacuum", 2)
        connection.pragma("journal_mode", "wal")
        connection.wal_autocheckpoint(0)
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, payload BLOB)")
        with connection:
            connection.executemany("INSERT INTO rows VALUES (?, zeroblob(?))", [(n, ROW) for n in range(ROWS)])
            connection.execute("DELETE FROM rows WHERE id < 80")
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        yield connection


def test_all_of_them_are_given_back_and_nothing_else(db: apsw.Connection, tmp_path: Path) -> None:
    kept = db.pragma("page_count") - db.pragma("freelist_count")
    give_back(db)
    assert (db.pragma("page_count"), db.pragma("freelist_count")) == (kept, 0)
    assert (tmp_path / "some.db").stat().st_size == kept * 8_192
    assert fetch(db, "SELECT count(*), min(id), total(length(payload)) FROM rows") == [(20, 80, 20 * ROW)]
    give_back(db)


def test_no_more_than_wanted(db: apsw.Connection) -> None:
    pages, free = db.pragma("page_count"), db.pragma("freelist_count")
    give_back(db, 300)
    assert free > 600 and free - db.pragma("freelist_count") == 300 == pages - db.pragma("page_count")


def test_what_is_cut_off_is_not_written(db: apsw.Connection, tmp_path: Path) -> None:
    """What is kept, 2 MB, lies at the end and is moved; the 8 MB that were free are not written."""
    give_back(db)
    assert (tmp_path / "some.db-wal").stat().st_size < 2 * 20 * ROW
