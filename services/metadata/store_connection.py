"""The only border to the driver: connections, the pool, and what the driver's exceptions mean to callers.

What must stay true:

* no call waits for a database that is away: a connection is had within `Bounds.acquire_s` or the call is Unavailable,
  and an answer within `Bounds.command_s`;
* no exception of the driver or of the operating system passes `Database.connection`;
* the service starts without its database: opening and migrating it is tried again until it works, and the pool finds
  the database by itself when it is back, be it on another of its hosts.
"""

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import asyncpg
from opentelemetry import trace

from fleet.status import StoreProbe
from runtime import telemetry
from runtime.clock import Clock
from runtime.errors import Aborted, FailedPrecondition, OpenManagerError, Unavailable, clip, mask
from runtime.redaction import redact, remember_secret
from runtime.tasks import Backoff
from services.metadata.store_migrate import Migration, load_migrations, migrate
from services.metadata.target import DatabaseTarget

MAX_CONNECTIONS = 10
IDLE_CONNECTION_S = 60.0
STATEMENT_SHARE = 0.9
"""The server gives up on a statement before we do, so that the connection stays usable."""
MAX_ERROR_TEXT_BYTES = 300
OPEN_BACKOFF = Backoff(initial_s=0.25, max_s=5.0)

_UNAVAILABLE = (
    OSError,  # refused, reset, no such socket, TLS; TimeoutError is one too
    EOFError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shut down, killed, starting, statement timeout
    asyncpg.InsufficientResourcesError,  # too many connections, disk full, out of memory
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.LockNotAvailableError,
    # No host takes writes; also what the driver says of a connection that is used between the server's last words
    # ("terminating connection ...") and the end of the stream.
    asyncpg.InternalClientError,
    asyncpg.UndefinedTableError,
    asyncpg.InterfaceError,
)
_ABORTED = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long things may take, in seconds.

    Attributes:
        acquire_s: waiting in the pool and connecting together; each of several hosts gets its share. Giving a broken
            connection back is bounded by it, too.
        command_s: one statement.
        probe_s: the status probe; below the 1.5 s after which its caller gives up without knowing why.
    """

    acquire_s: float = 3.0
    command_s: float = 5.0
    probe_s: float = 1.2


DEFAULT_BOUNDS = Bounds()


class Database:
    """A pool of connections to a migrated database, entered for as long as the service runs."""

    def __init__(
        self,
        target: DatabaseTarget,
        *,
        clock: Clock,
        migrations: Sequence[Migration] | None = None,
        bounds: Bounds = DEFAULT_BOUNDS,
    ) -> None:
        self._bounds = bounds
        self.target = target
        self._clock = clock
        self._migrations = load_migrations() if migrations is None else migrations
        self._first_host = 0
        self._pool: Any = None
        self._migrated = asyncio.Event()
        self._schema_lost = asyncio.Event()
        self._last_fault = "it has not answered yet"
        self._keeper: asyncio.Task[None] | None = None
        for secret in target.secrets:
            remember_secret(secret)

    async def __aenter__(self) -> Self:
        """Opens the pool and makes one attempt to migrate; when the database is away, further ones follow.

        Raises:
            FailedPrecondition: the schema cannot be used by this program; a person has to decide.
        """
        _trace_queries()
        self._pool = asyncpg.create_pool(
            min_size=0,
            max_size=MAX_CONNECTIONS,
            max_inactive_connection_lifetime=IDLE_CONNECTION_S,
            connect=self._connect,
        )
        await self._pool
        try:
            await self._migrate()
        except FailedPrecondition:
            self._pool.terminate()
            raise
        except OpenManagerError as error:
            log.warning("serving without the database for now: %s", error.message)
        self._keeper = asyncio.create_task(self._keep_migrated(), name="metadata-schema")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        try:
            async with asyncio.timeout(self._bounds.acquire_s):
                await self._pool.close()
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self._pool.terminate()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """Lends an asyncpg connection; every failure inside comes out as one of ``runtime.errors``.

        Raises:
            Unavailable: the database is away, too slow, read-only or not migrated yet.
            Aborted: the call lost a race against another; it may be repeated.
            Internal: anything else; the log has the text.
        """
        if not self._migrated.is_set():
            raise Unavailable("the metadata database is not ready", retry_after_s=1.0)
        async with self._border():
            connection = await self._pool.acquire(timeout=self._bounds.acquire_s)
            try:
                yield connection
            except (asyncpg.ReadOnlySQLTransactionError, asyncpg.InternalClientError):
                connection.terminate()  # its server was demoted or ended; the next one looks for a server that serves
                raise
            finally:
                await self._give_back(connection)

    async def _give_back(self, connection: Any) -> None:
        """A connection that cannot be reset is closed by the pool; what was done over it stands all the same."""
        try:
            await self._pool.release(connection, timeout=self._bounds.acquire_s)
        except _UNAVAILABLE as error:
            log.warning("dropped a connection to the metadata database: %s", _describe(error))

    async def probe(self) -> StoreProbe:
        """Asks the database a trivial question.

        Raises:
            Unavailable: it does not answer or cannot be used; the message says why, without secrets.
        """
        started = self._clock.monotonic()
        async with self._border(detailed=True), asyncio.timeout(self._bounds.probe_s):
            with _untraced():
                version = await self._ask_version()
            latency_ms = (self._clock.monotonic() - started) * 1000
            disk = self.target.disk
            free = (await asyncio.to_thread(shutil.disk_usage, disk)).free if disk is not None else 0
        if not self._migrated.is_set():
            raise Unavailable(f"its schema is not ready: {self._last_fault}")
        self._last_fault = ""
        return StoreProbe(
            address=self.target.address,
            server_version=f"PostgreSQL {version}",
            latency_ms=latency_ms,
            disk_free_bytes=free,
        )

    async def _ask_version(self) -> str:
        async with self._pool.acquire() as connection:
            return str(await connection.fetchval("SELECT current_setting('server_version')"))

    @asynccontextmanager
    async def _border(self, *, detailed: bool = False) -> AsyncIterator[None]:
        try:
            yield
        except OpenManagerError:
            raise
        except _ABORTED as error:
            raise Aborted("another change came first; repeat the call") from error
        except Exception as error:
            if isinstance(error, _UNAVAILABLE):
                raise self._unavailable(error, detailed=detailed) from error
            masked = mask(error)
            log.exception("unexpected failure of the metadata database", extra=masked.metadata)
            raise masked from error

    def _unavailable(self, error: Exception, *, detailed: bool) -> Unavailable:
        """Notes the fault, in the log only when it is another than the last; callers learn no details."""
        fault = _describe(error)
        if isinstance(error, asyncpg.UndefinedTableError):
            self._migrated.clear()
            self._schema_lost.set()
        if fault != self._last_fault:
            log.warning("the metadata database failed: %s", fault)
        self._last_fault = fault
        return Unavailable(fault if detailed else "the metadata database does not answer", retry_after_s=1.0)

    async def _connect(self, _dsn: None = None, **pool_options: Any) -> Any:
        """Connects to the first host that serves, beginning with the one that did last time; the pool calls it too.

        The driver would try them too, but under one time-out for all: a first host that swallows packets would eat it.
        """
        hosts = self.target.hosts
        share_s = self._bounds.acquire_s * 0.9 / len(hosts)
        last: Exception | None = None
        for step in range(len(hosts)):
            index = (self._first_host + step) % len(hosts)
            host, port = hosts[index]
            try:
                connection = await asyncpg.connect(
                    host=host,
                    port=port,
                    timeout=share_s,
                    command_timeout=self._bounds.command_s,
                    server_settings={
                        "application_name": "openmanager-metadata",
                        "statement_timeout": str(int(self._bounds.command_s * STATEMENT_SHARE * 1000)),
                        "idle_in_transaction_session_timeout": "30000",
                        "timezone": "UTC",
                    },
                    **self.target.options,
                    **pool_options,
                )
            except _UNAVAILABLE as error:
                last = error
            else:
                self._first_host = index
                return connection
        assert last is not None
        raise last

    async def _migrate(self) -> None:
        """One attempt, over a connection of its own: it changes settings and may take minutes."""
        async with self._border(detailed=True):
            connection = await self._connect()
            try:
                version = await migrate(connection, self._migrations)
            finally:
                await connection.close(timeout=self._bounds.acquire_s)
            log.info("the schema is version %d", version)
            self._migrated.set()

    async def _keep_migrated(self) -> None:
        """Migrates until it worked, and again when the tables are gone (a database that was set up anew)."""
        failures = 0
        while True:
            if self._migrated.is_set():
                failures = 0
                self._schema_lost.clear()
                await self._schema_lost.wait()
            await self._clock.sleep(min(OPEN_BACKOFF.max_s, OPEN_BACKOFF.initial_s * 2**failures))
            failures = min(failures + 1, 10)
            try:
                await self._migrate()
            except OpenManagerError as error:
                self._last_fault = error.message
                log.warning("the metadata database is not ready: %s", error.message)


def _describe(error: BaseException) -> str:
    """The fault for the status call and the log: kind and text, no secrets, no user."""
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return f"{type(error).__name__}: the database refuses the user or the password"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return clip(redact(f"{type(error).__name__}: {error}"), MAX_ERROR_TEXT_BYTES)


def _untraced() -> AbstractContextManager[trace.Span]:
    """Makes spans of nothing inside: a parent that is not sampled. A probe every 2 s would bury the traces of calls."""
    unsampled = trace.SpanContext(trace_id=1, span_id=1, is_remote=False, trace_flags=trace.TraceFlags(0))
    return trace.use_span(trace.NonRecordingSpan(unsampled))


def _trace_queries() -> None:
    """Makes a span of every query when spans go anywhere; parameters are never recorded."""
    if telemetry.tracing_enabled():
        from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor  # noqa: PLC0415 - 150 ms to import

        instrumentor = AsyncPGInstrumentor()  # type: ignore[no-untyped-call]
        if not instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.instrument()
