"""The only border to the driver: connections, the pool, and what the driver's exceptions mean to callers.

What must stay true:

* no call waits for a database that is away: a connection is had within `Bounds.acquire_s` or the call is Unavailable,
  and an answer within `Bounds.command_s`; once two in a row had none, the circuit is open and nobody waits at all until
  the keeper, which asks in the background with a back-off, had an answer;
* no exception of the driver or of the operating system passes `Database.connection`;
* the service starts without its database: opening and migrating it is tried again until it works, and the pool finds
  the database by itself when it is back, be it on another of its hosts;
* connections from before an outage or a fail-over are never used after it: they may be half-open, or lead to a server
  that was demoted.
"""

import asyncio
import logging
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import asyncpg

from fleet.status import StoreProbe
from runtime import tasks
from runtime.circuit import Circuit, CircuitState
from runtime.clock import Clock
from runtime.errors import Aborted, FailedPrecondition, OpenManagerError, Unavailable, mask
from runtime.redaction import remember_secret
from runtime.tasks import Backoff, run_forever
from services.metadata.connector import Connector, DurableConnection
from services.metadata.driver_errors import ABORTED, ANSWERED, UNAVAILABLE, describe, in_short
from services.metadata.line import Answer, Line, Lineage, question
from services.metadata.query_spans import trace_queries
from services.metadata.store_migrate import Migration, load_migrations, migrate
from services.metadata.target import DatabaseTarget

MAX_CONNECTIONS = 10
IDLE_CONNECTION_S = 60.0
SHARED_FOR_S = 900.0
KEEPER_BACKOFF = Backoff(initial_s=0.2, max_s=2.0)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How long things may take, in seconds.

    Attributes:
        acquire_s: waiting for one of MAX_CONNECTIONS, and as long again for connecting, whatever the number of hosts.
            Giving a broken connection back is bounded by it, too.
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
        rng: random.Random | None = None,
    ) -> None:
        self._bounds = bounds
        self.target = target
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311  jitter, no secret
        self._migrations = load_migrations() if migrations is None else migrations
        self.circuit = Circuit("the metadata database", clock, rng=self._rng)
        self.circuit.on_change(self._circuit_changed)
        self.identity: str | None = None
        """Which database answered last; None: not known."""
        self.lineage = Lineage()
        self._connector = Connector(target, bounds.command_s)
        self._pool: Any = None
        self._retired: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._line = Line(self._connector.connect, bounds.probe_s)
        self._said_nothing = False
        self._shared_at: float | None = None
        self._migrated = asyncio.Event()
        self._wanted_migration = True
        self._trouble = asyncio.Event()
        self._last_fault = "it has not answered yet"
        self._returned: list[Callable[[], None]] = []
        self._keeper: asyncio.Task[None] | None = None
        for secret in target.secrets:
            remember_secret(secret)

    @property
    def usable(self) -> bool:
        """Whether calls go to the database; `on_return` tells when they do again."""
        return self._migrated.is_set() and self.circuit.state is CircuitState.CLOSED

    @property
    def shared(self) -> str:
        """That another metadata service works with this database, if one was seen to lately; empty: none was."""
        if self._shared_at is None or self._clock.monotonic() - self._shared_at > SHARED_FOR_S:
            return ""
        return (
            "another metadata service has given facts to this database within the last quarter of an hour: stop one, or"
            " give it a database of its own; neither can prove its audit log so"
        )

    def on_return(self, returned: Callable[[], None]) -> None:
        """Has it told whenever the database may be used again, or is another one than before."""
        self._returned.append(returned)

    async def __aenter__(self) -> Self:
        """Opens the pool and makes one attempt to migrate; when the database is away, further ones follow.

        Raises:
            FailedPrecondition: the schema cannot be used by this program; a person has to decide.
        """
        trace_queries()
        self._pool = self._new_pool()
        try:
            await self._migrate()
        except FailedPrecondition:
            raise
        except OpenManagerError as error:
            self._trouble.set()
            log.warning("serving without the database for now: %s", error.message)
        self._keeper = tasks.start("metadata-database", run_forever("metadata-database", self._keep, clock=self._clock))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keeper is not None:
            await tasks.cancel(self._keeper)
        self._line.drop()
        self._retire(self._pool, self._bounds.acquire_s)
        await asyncio.wait(self._retired)

    @asynccontextmanager
    async def connection(self, *, within_s: float | None = None, detailed: bool = False) -> AsyncIterator[Any]:
        """Lends an asyncpg connection; every failure inside comes out as one of ``runtime.errors``.

        `within_s` bounds connecting and the whole block, for who has something else to answer from; `detailed`: it is
        told what failed, which no caller learns.

        Raises:
            Unavailable: the database is away, too slow, read-only or not migrated yet.
            Aborted: the call lost a race against another; it may be repeated.
            Internal: anything else; the log has the text.
        """
        self._check_usable()
        async with self._slot():
            self._check_usable()
            answered: Unavailable | None = None
            with self.circuit.attempt():
                try:
                    async with self._border(detailed=detailed), self._lent(within_s) as connection:
                        yield connection
                except Unavailable as error:
                    if not self._answered(error.__cause__):
                        raise
                    answered = error
            if answered is not None:
                raise answered

    def _answered(self, fault: BaseException | None) -> bool:
        """Whether a fault says nothing of the database as a whole. That it has no connection left for one caller is no
        outage while others have some: leaving these behind, as after one, would leave us with none."""
        if isinstance(fault, asyncpg.TooManyConnectionsError):
            return bool(self._pool.get_size())
        return isinstance(fault, ANSWERED)

    def _check_usable(self) -> None:
        if not self._migrated.is_set():
            raise Unavailable("the metadata database is not ready", retry_after_s=1.0)
        if self.circuit.state is not CircuitState.CLOSED:  # only the keeper tries: no caller pays for a trial
            raise Unavailable("the metadata database does not answer", reason="CIRCUIT_OPEN", retry_after_s=1.0)

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """Waits for one of the connections, outside of the circuit: that all are busy is no outage."""
        slots = self._slots
        try:
            async with asyncio.timeout(self._bounds.acquire_s):
                await slots.acquire()
        except TimeoutError:
            raise Unavailable("all connections to the metadata database are busy", retry_after_s=1.0) from None
        try:
            yield
        finally:
            slots.release()

    @asynccontextmanager
    async def _lent(self, within_s: float | None) -> AsyncIterator[Any]:
        limit = asyncio.timeout(within_s)
        async with limit:
            pool = await self._pool
            connection = await pool.acquire(timeout=self._bounds.acquire_s)
            try:
                yield connection
            except (asyncpg.ReadOnlySQLTransactionError, asyncpg.InternalClientError, TimeoutError):
                connection.terminate()  # its server was demoted, ended or is silent; the next one looks for another
                raise
            except asyncio.CancelledError:
                if limit.expired():
                    connection.terminate()
                raise
            finally:
                await self._give_back(pool, connection)

    async def _give_back(self, pool: Any, connection: Any) -> None:
        """A connection that cannot be reset is closed by the pool; what was done over it stands all the same."""
        try:
            await pool.release(connection, timeout=self._bounds.acquire_s)
        except UNAVAILABLE as error:
            log.warning("dropped a connection to the metadata database: %s", describe(error))

    async def probe(self) -> StoreProbe:
        """Asks the database a trivial question, or says at once why the last answer was none.

        Raises:
            Unavailable: it does not answer or cannot be used; the message says why, without secrets.
        """
        if self.circuit.state is not CircuitState.CLOSED:
            raise Unavailable(self._last_fault)
        started = self._clock.monotonic()
        answer = await self._ask()
        latency_ms = (self._clock.monotonic() - started) * 1000
        disk = self.target.disk
        free = (await asyncio.to_thread(shutil.disk_usage, disk)).free if disk is not None else 0
        if not self._migrated.is_set():
            raise Unavailable(f"its schema is not ready: {self._last_fault}")
        self._last_fault = ""
        return StoreProbe(
            address=self.target.address,
            server_version=f"PostgreSQL {answer.version}",
            latency_ms=latency_ms,
            disk_free_bytes=free,
        )

    async def identity_of(self, connection: Any) -> str | None:
        """Which database a lent connection leads to.

        Raises:
            Unavailable: to one that takes no writes.
        """
        answer = await self._told(question(connection, self.lineage.journal))
        if self.identity is None:
            self.identity = answer.identity
        return answer.identity

    async def _ask(self) -> Answer:
        """Asks over a connection of its own, so that a busy pool is not taken for a database that is away.

        Its answer closes the circuit, and it notices when another server answers than before.
        """
        closed = self.circuit.state is CircuitState.CLOSED
        with self.circuit.attempt() if closed else nullcontext():
            async with self._border(detailed=True):
                answer = await self._told(self._line.ask(self.lineage.journal))
        known, self.identity = self.identity, answer.identity
        if answer.identity is None and not self._said_nothing:
            self._said_nothing = True
            log.warning("the database does not tell which one it is, so facts are not sent again after a fail-over")
        if answer.identity not in {None, known} and known is not None:
            log.warning("another database answers than before: %s was %s", answer.identity, known)
            self._renew_pool()
            self._wanted_migration = True
            self._trouble.set()
        self.circuit.reset()
        if answer.identity != known:
            self._tell_return()
        return answer

    async def _told(self, asked: Awaitable[Answer]) -> Answer:
        before, came = self.lineage.before(), self.lineage.others_came
        try:
            answer = await asked
        except asyncpg.ReadOnlySQLTransactionError:
            self._connector.leave_host()
            raise
        named = self.lineage.named(answer, before)
        if self.lineage.others_came > came:
            self._shared_at = self._clock.monotonic()
        return named

    @asynccontextmanager
    async def _border(self, *, detailed: bool = False) -> AsyncIterator[None]:
        try:
            yield
        except OpenManagerError:
            raise
        except ABORTED as error:
            raise Aborted("another change came first; repeat the call") from error
        except Exception as error:
            if isinstance(error, UNAVAILABLE):
                raise self._unavailable(error, detailed=detailed) from error
            masked = mask(error)
            log.exception("unexpected failure of the metadata database", extra=masked.metadata)
            raise masked from error

    def _unavailable(self, error: Exception, *, detailed: bool) -> Unavailable:
        """Notes the fault, in the log only when it is another than the last; callers learn no details."""
        fault = describe(error)
        if isinstance(error, asyncpg.UndefinedTableError):
            self._migrated.clear()
            self._wanted_migration = True
            self._trouble.set()
        if fault != self._last_fault:
            log.warning("the metadata database failed: %s", fault)
        self._last_fault = fault
        return Unavailable(fault if detailed else in_short(error), retry_after_s=1.0)

    def _new_pool(self) -> Any:
        """A pool without connections; awaiting it, as often as one likes, never waits."""
        return asyncpg.create_pool(
            min_size=0,
            max_size=MAX_CONNECTIONS,
            max_inactive_connection_lifetime=IDLE_CONNECTION_S,
            connect=self._connect_for_pool,
            connection_class=DurableConnection,
        )

    def _renew_pool(self) -> None:
        """Leaves all connections behind: who uses one goes on to his own time-out, nobody else gets one."""
        old, self._pool = self._pool, self._new_pool()
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._retire(old, self._bounds.acquire_s + self._bounds.command_s)

    def _retire(self, pool: Any, within_s: float) -> None:
        async def close() -> None:
            try:
                async with asyncio.timeout(within_s):
                    await (await pool).close()
            except (*UNAVAILABLE, asyncpg.PostgresError):
                pool.terminate()

        task = tasks.start("metadata-old-connections", close())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)

    async def _connect_for_pool(self, _dsn: None = None, **pool_options: Any) -> Any:
        return await self._connector.connect(self._bounds.acquire_s * 0.9, **pool_options)

    async def _migrate(self) -> None:
        """One attempt, over a connection of its own: it changes settings and may take minutes."""
        async with self._border(detailed=True):
            connection = await self._connector.connect(self._bounds.acquire_s * 0.9)
            try:
                version = await migrate(connection, self._migrations)
            finally:
                await connection.close(timeout=self._bounds.acquire_s)
        log.info("the schema is version %d", version)
        self._wanted_migration = False
        self._migrated.set()
        self._tell_return()

    async def _keep(self) -> None:
        """Asks while the circuit is open, and migrates until that worked: at first, when the tables are gone (a
        database that was set up anew) and when another server answers (it may lack the last migration)."""
        failures = 0
        while True:
            await self._trouble.wait()
            await self._clock.sleep(KEEPER_BACKOFF.delay_s(failures, self._rng))
            try:
                if self.circuit.state is not CircuitState.CLOSED:
                    await self._ask()
                if self._wanted_migration:
                    await self._migrate()
            except OpenManagerError as error:
                failures += 1
                self._last_fault = error.message
                if isinstance(error, FailedPrecondition):  # what answers now is not what this program knows
                    self._migrated.clear()
                if failures & (failures - 1) == 0:  # said ever more rarely
                    log.warning("the metadata database is not ready: %s", error.message)
            else:
                failures = 0
                if self.circuit.state is CircuitState.CLOSED and not self._wanted_migration:
                    self._trouble.clear()

    def _circuit_changed(self, state: CircuitState) -> None:
        if state is CircuitState.OPEN:
            log.warning("no answer twice: callers no longer wait for the metadata database")
            self._renew_pool()
            self._trouble.set()
        else:
            log.info("the metadata database answers again")
            self._tell_return()

    def _tell_return(self) -> None:
        for returned in self._returned:
            returned()
