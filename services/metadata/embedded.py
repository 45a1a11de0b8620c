"""The life of the embedded PostgreSQL: started with the service, started again when it dies, stopped with the service.

``postmaster`` knows the process and its files; this is the guard around it. What must stay true:

* while the service runs there is a postmaster, or an attempt to start one (with a back-off of at most 5 s);
* a service that was killed leaves its postmaster behind; the next one stops it cleanly before it starts its own, so
  that a postmaster is always a child with today's settings;
* when ``__aexit__`` has returned, no process of the cluster is left.

Measured: 1.1 s for the first start, 0.3 s for a later one, 0.1 s for a stop.
"""

import asyncio
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import asyncpg

from runtime.clock import Clock
from runtime.errors import FailedPrecondition, Unavailable
from runtime.tasks import Backoff, run_forever
from services.metadata import postmaster
from services.metadata.target import DatabaseTarget

USER = "openmanager"
DATABASE = "openmanager"
PREPARE_WAIT_S = 90.0
"""How long making the cluster and stopping an orphan may take: 1 s where disks are fast."""
FIRST_WAIT_S = 8.0
"""How long the service waits for its prepared database before it serves without it (and says so)."""
RECOVERY_TIMEOUT_S = 120.0
"""How long a start may take: replaying 256 MB of write-ahead log takes seconds, on a slow disk a minute."""
POLL_S = 0.05
LOG_CHECK_S = 5.0
MAX_LOG_BYTES = 4 << 20
"""The log is cut when it is larger; the part before it is kept once, as postgresql.log.1."""
BACKOFF = Backoff(initial_s=0.2, max_s=5.0, healthy_after_s=30.0)

T = TypeVar("T")
log = logging.getLogger(__name__)


class EmbeddedPostgres:
    """A PostgreSQL cluster under ``folder`` that runs for as long as this is entered."""

    def __init__(self, folder: Path, *, clock: Clock) -> None:
        self._folder = folder
        self._log_file = folder / "postgresql.log"
        self._clock = clock
        self._ready = asyncio.Event()
        self._refusal: FailedPrecondition | None = None
        self._cluster: postmaster.Cluster | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """PID of the postmaster while it takes calls."""
        return self._process.pid if self._process is not None and self._ready.is_set() else None

    @property
    def socket_folder(self) -> Path:
        """The 0700 folder of the database's socket."""
        if self._cluster is None:
            raise Unavailable("the embedded PostgreSQL has not started yet")
        return self._cluster.socket_folder

    async def ready(self) -> None:
        """Returns when the database takes calls."""
        await self._ready.wait()

    def target(self) -> DatabaseTarget:
        """How to connect; raises Unavailable until the socket's folder is known."""
        folder = str(self.socket_folder)
        return DatabaseTarget(
            role="embedded",
            hosts=((folder, postmaster.SOCKET_PORT),),
            # All said here, so that no PG* variable of the environment has a say.
            options={"user": USER, "password": "", "database": DATABASE, "target_session_attrs": "any", "ssl": False},
            address=f"unix:{folder}",
            disk=self._folder,
        )

    async def __aenter__(self) -> Self:
        """Starts it.

        Raises:
            FailedPrecondition: a person has to change something first. Any other failure is tried again.
        """
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        self._guard = asyncio.create_task(run_forever("embedded-postgresql", self._live, BACKOFF, clock=self._clock))
        self._guard.set_name("embedded-postgresql")
        try:
            await self._wait(lambda: self._cluster is not None, PREPARE_WAIT_S)
            await self._wait(self._ready.is_set, FIRST_WAIT_S)
            if self._cluster is None:
                raise Unavailable(
                    f"the embedded PostgreSQL was not prepared within {PREPARE_WAIT_S:.0f} s; see the log"
                )
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _wait(self, condition: Callable[[], bool], bound_s: float) -> None:
        """Waits until ``condition`` holds or the time is up; raises what makes waiting useless."""
        ends = self._clock.monotonic() + bound_s
        while not condition() and self._clock.monotonic() < ends:
            if self._refusal is not None:
                raise self._refusal
            await self._clock.sleep(POLL_S)

    async def _end(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.wait([self._guard])

    async def _live(self) -> None:
        """One life of the postmaster: from stopping what was left behind to its end, which is always an error."""
        try:
            self._cluster = await _to_the_end(lambda: postmaster.prepare(self._folder))
            await _to_the_end(self._start)
            assert self._process is not None
            await self._until_it_answers(self._process)
            self._ready.set()
            log.info("the embedded PostgreSQL is ready", extra={"pid": self._process.pid})
            await self._until_it_ends(self._process)
        except FailedPrecondition as error:
            self._refusal = error
            raise
        finally:
            self._ready.clear()
            if self._process is not None and self._process.poll() is None:
                process = self._process
                await _to_the_end(lambda: postmaster.stop(process))

    def _start(self) -> None:
        assert self._cluster is not None
        _bound_log(self._log_file)
        self._process = self._cluster.start(self._log_file)

    async def _until_it_answers(self, process: "subprocess.Popen[bytes]") -> None:
        ends = self._clock.monotonic() + RECOVERY_TIMEOUT_S
        while True:
            if process.poll() is not None:
                raise Unavailable(f"PostgreSQL ended while starting: {await asyncio.to_thread(self._last_words)}")
            try:
                await self._make_database()
            except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError) as error:
                if self._clock.monotonic() >= ends:
                    raise Unavailable(
                        f"PostgreSQL does not answer {RECOVERY_TIMEOUT_S:.0f} s after its start"
                    ) from error
                await self._clock.sleep(POLL_S)
            else:
                return

    async def _make_database(self) -> None:
        """Makes our role and database when they are not there. The role is no superuser: it runs no programs.

        So the extension that finds similar interactions is made here, too.
        """
        connection = await self._connect("postgres")
        try:
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", USER):
                await connection.execute(f"CREATE ROLE {USER} LOGIN")
            if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE} OWNER {USER}")
        finally:
            await connection.close(timeout=2.0)
        connection = await self._connect(DATABASE)
        try:
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        finally:
            await connection.close(timeout=2.0)

    async def _connect(self, database: str) -> Any:
        """A connection as superuser."""
        return await asyncpg.connect(
            host=str(self.socket_folder),
            port=postmaster.SOCKET_PORT,
            user=postmaster.SUPERUSER,
            password="",
            database=database,
            ssl=False,
            target_session_attrs="any",
            timeout=2.0,
            command_timeout=10.0,
        )

    async def _until_it_ends(self, process: "subprocess.Popen[bytes]") -> None:
        next_check = self._clock.monotonic()
        while (status := process.poll()) is None:
            if self._clock.monotonic() >= next_check:
                await asyncio.to_thread(_bound_log, self._log_file)
                next_check = self._clock.monotonic() + LOG_CHECK_S
            await self._clock.sleep(POLL_S)
        raise Unavailable(f"PostgreSQL ended with status {status}")

    def _last_words(self) -> str:
        """The end of the log, for the error of a start that failed."""
        with suppress(OSError):
            return self._log_file.read_text(errors="replace")[-300:].strip()
        return "no log"


async def _to_the_end(work: Callable[[], T]) -> T:
    """Runs blocking ``work`` in a thread; when cancelled, waits for its end first, so that nothing is half done."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _bound_log(file: Path) -> None:
    """Cuts the log in place: the postmaster holds it open for appending, so it goes on at the new end."""
    if file.exists() and file.stat().st_size > MAX_LOG_BYTES:
        shutil.copyfile(file, file.with_name(file.name + ".1"))
        os.truncate(file, 0)
