"""How the engine opens SQLite files and what their errors mean to a caller: the only border with apsw's exceptions.

What must stay true: every file is in WAL mode with `synchronous=FULL`, so that COMMIT returns after the sync of the
log; and it has the pointer map of `auto_vacuum`, which lets SQLite give pages back to the file system and find the
overflow pages of a blob without walking their chain (one column of 511 in 4.5 us against 21 us, measured on 720 rows).
"""

import os
from pathlib import Path
from typing import Final

import apsw

from runtime.errors import DataLoss, OpenManagerError, ResourceExhausted, Unavailable
from runtime.sqlite import is_full

FORMAT_VERSION: Final = 1
JOURNAL_PAGE_BYTES: Final = 8_192
"""Measured for batches of 82 KB beside 16,384: as many points a second, a commit 0.34 ms (p99 11) against 0.33 (p99 7),
with 4,096 p99 16. An empty journal is 15 pages, which was half of a day of one machine's own metrics."""
PARTITION_PAGE_BYTES: Final = 8_192  # measured: as fast as larger ones for one column, 2.4 % over the payload
SPARSE_PAGE_BYTES: Final = (
    1_024  # for small payloads, of which the last page of each, and every table's first, is empty
)
UNFINISHED_JOURNAL: Final = "journal.db.partial"
"""What a restore makes before anything else, and names journal.db when all is in place: no engine opens the folder."""
BUSY_TIMEOUT_MS: Final = 10_000
LOG_KEPT_BYTES: Final = 64 << 20

DAMAGED: Final = (apsw.CorruptError, apsw.NotADBError, UnicodeDecodeError)
"""What is raised when a file is not a database any more, as against one that is busy, full or on a bad disk; the last
is what a torn row gives that has a text where numbers were."""


_UNREADABLE: Final = (
    apsw.SQLITE_IOERR_READ,
    apsw.SQLITE_IOERR_SHORT_READ,
    apsw.SQLITE_IOERR_CORRUPTFS,
    apsw.SQLITE_IOERR_DATA,
)


def is_unreadable(error: Exception) -> bool:
    """Whether what a read asked for cannot be had again: a damaged file or disk, and not one that is full or busy."""
    return isinstance(error, DAMAGED) or (
        isinstance(error, apsw.IOError) and getattr(error, "extendedresult", 0) in _UNREADABLE
    )


def connect(path: Path, page_bytes: int) -> apsw.Connection:
    """Opens or creates a file; raises `apsw.Error`."""
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        if connection.pragma("page_count") == 0:  # setting auto_vacuum writes the header again: 5 syncs for a read
            connection.pragma("page_size", page_bytes)
            connection.pragma("auto_vacuum", 2)
        if connection.pragma("journal_mode") != "wal":
            connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", 2)
        connection.pragma("journal_size_limit", LOG_KEPT_BYTES)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_read_only(path: Path, *, immutable: bool = False) -> apsw.Connection:
    """Opens a file that another process may be writing, never changing it; raises `apsw.Error`.

    `immutable`: nobody writes it and nothing beside it may be created, as in a finished backup.
    """
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(read_only_uri(path) + ("&immutable=1" if immutable else ""), flags=flags)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    return connection


def read_only_uri(path: Path) -> str:
    """What names the file to SQLite, in ATTACH too, so that it is only read and not created.

    SQLite puts an index of the log beside a file that it reads. Where it may not, as on a medium that is mounted to be
    read only, it reads what has no log as a file that nobody writes.
    """
    still = not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists()
    return f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if still else ''}"


def truncate_log(db: apsw.Connection) -> None:
    """Puts the log into the file and gives its bytes back; does nothing while somebody reads."""
    db.set_busy_timeout(0)
    try:
        db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except (apsw.BusyError, apsw.LockedError):
        return
    finally:
        db.set_busy_timeout(BUSY_TIMEOUT_MS)


def file_bytes(path: Path) -> int:
    """The size of a database with its log, 0 where there is none."""
    total = 0
    for file in (path, path.with_name(f"{path.name}-wal")):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def storage_error(error: apsw.Error) -> OpenManagerError:
    """What a caller whose write or read failed is told."""
    if is_full(error):
        return ResourceExhausted("the disk is full; nothing of this batch was kept", reason="DISK_FULL")
    return Unavailable(f"the storage failed: {error}", reason="STORAGE_FAILED")


def opening_error(folder: Path, error: apsw.Error) -> OpenManagerError:
    """What who opens a store is told; a partition that is damaged is left out, so it is the journal that cannot be
    read."""
    if is_full(error):
        return ResourceExhausted(f"the disk of {folder} is full: make room and start again", reason="DISK_FULL")
    if is_unreadable(error):
        return unreadable_journal(folder / "journal.db", error)
    return Unavailable(f"the store in {folder} cannot be opened: {error}", reason="STORAGE_FAILED")


def unfinished_restore(folder: Path) -> DataLoss:
    """For a folder in which a restore was cut off. Says what to do."""
    return DataLoss(f"a restore into {folder} was cut off: delete what is in it and restore again")


def unreadable_journal(path: Path, why: object) -> DataLoss:
    """For a store that does not open: without its journal no block says whose it is. Says what to do."""
    return DataLoss(f"{path} cannot be read ({why}): restore a backup into another folder, and keep this one")
