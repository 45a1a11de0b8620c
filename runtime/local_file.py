"""SQLite files of a service: how they are opened, which thread uses them, and what their errors mean to a caller.

What must stay true: COMMIT returns after the sync (WAL, `synchronous=FULL`) unless the file is only a copy; a
connection is used by one thread; no exception of apsw passes `FileThread.run`.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import apsw

from runtime.errors import DataLoss, OpenManagerError, ResourceExhausted, Unavailable
from runtime.sqlite import is_full, sync_folder

BUSY_TIMEOUT_MS: Final = 10_000
LOG_KEPT_BYTES: Final = 16 << 20
DAMAGED: Final = (apsw.CorruptError, apsw.NotADBError)

P = ParamSpec("P")
T = TypeVar("T")


def connect(path: Path, *, durable: bool = True) -> apsw.Connection:
    """Opens or creates a file; one that is not `durable` may lose its last commits with the power, never its order."""
    new = not path.exists()
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        if new:
            connection.pragma("auto_vacuum", 2)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", 2 if durable else 1)
        connection.pragma("journal_size_limit", LOG_KEPT_BYTES)
        if new:
            path.chmod(0o600)
            sync_folder(path.parent)
    except BaseException:
        connection.close()
        raise
    return connection


def storage_error(error: apsw.Error) -> OpenManagerError:
    """What a caller whose write or read failed is told."""
    if is_full(error):
        return ResourceExhausted("the disk of DATA_DIR is full; nothing of this was kept", reason="DISK_FULL")
    if isinstance(error, DAMAGED):
        return DataLoss(f"a file in DATA_DIR is damaged: {error}", reason="STORAGE_FAILED")
    return Unavailable(f"the disk of DATA_DIR failed: {error}", reason="STORAGE_FAILED")


class FileThread:
    """The one thread that uses a connection; calls run in order."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Runs `work` in the thread; what has begun runs to its end also when the caller goes away.

        Raises:
            ResourceExhausted: DISK_FULL.
            Unavailable, DataLoss: STORAGE_FAILED.
        """
        future = self._executor.submit(work, *args, **options)
        try:
            return await asyncio.wrap_future(future)
        except apsw.Error as error:
            raise storage_error(error) from error

    def close(self) -> None:
        """Waits for what runs and ends the thread."""
        self._executor.shutdown(wait=True)
