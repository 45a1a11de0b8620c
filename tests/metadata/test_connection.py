"""The border to the database: away, hanging, full, read-only, wrong; a typed error in bounded time, then recovery."""

import asyncio
import gc
import logging
import signal
import socket
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any

import asyncpg
import psutil
import pytest
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fleet.model import ServerDescriptor
from runtime import telemetry
from runtime.clock import SystemClock
from runtime.errors import Aborted, FailedPrecondition, Internal, Unavailable
from services.metadata import connector
from services.metadata.store import ServerFilter
from services.metadata.store_connection import MAX_CONNECTIONS, Bounds, Database
from services.metadata.store_migrate import Migration
from services.metadata.store_postgres import PostgresStore
from services.metadata.target import DatabaseTarget, target_of_url
from tests.harness import eventually, free_port
from tests.harness.postgres import OWNER, PostgresServer
from tests.metadata.parts import EVERYTHING, PATIENT, Parts

QUICK = Bounds(acquire_s=0.6, command_s=0.8, probe_s=0.5)
"""For what hangs; what does not is given time (PATIENT)."""
HANGS_S = 15.0
"""Longer than QUICK takes on a machine that stalls, shorter than any of PATIENT."""


def open_database(target: DatabaseTarget, bounds: Bounds = PATIENT) -> Database:
    return Database(target, clock=SystemClock(), bounds=bounds)


async def answers(store: PostgresStore) -> bool:
    try:
        await store.list_servers(EVERYTHING)
    except Unavailable:
        return False
    return True


@pytest.fixture
async def own_target(own_server: PostgresServer) -> DatabaseTarget:
    return await own_server.fresh_database()


async def test_the_service_starts_without_its_database_and_finds_it_later(
    own_server: PostgresServer, own_target: DatabaseTarget
) -> None:
    own_server.stop()
    started = time.monotonic()
    async with open_database(own_target) as database:
        assert time.monotonic() - started < HANGS_S
        store = PostgresStore(database)
        for call in (store.list_servers(EVERYTHING), database.probe()):
            with pytest.raises(Unavailable):
                await call
        own_server.start()
        await eventually(lambda: answers(store))
        assert (await database.probe()).server_version.startswith("PostgreSQL 15")


async def test_a_restarted_server_is_found_again_by_the_pool(
    own_server: PostgresServer, own_target: DatabaseTarget
) -> None:
    async with open_database(own_target) as database:
        store = PostgresStore(database)
        await asyncio.gather(*(store.list_servers(EVERYTHING) for _ in range(MAX_CONNECTIONS)))
        own_server.stop(signal.SIGQUIT)
        started = time.monotonic()
        with pytest.raises(Unavailable, match="does not answer") as away:
            await store.create_server(ServerDescriptor(server_id="a", hostname="a"))
        assert time.monotonic() - started < HANGS_S
        assert away.value.retry_after_s
        with pytest.raises(Unavailable, match="ConnectionRefusedError"):
            await database.probe()
        own_server.start()
        await eventually(lambda: answers(store))
        await store.create_server(ServerDescriptor(server_id="a", hostname="a"))


async def test_a_hanging_server_costs_each_call_a_bounded_time(
    own_server: PostgresServer, own_target: DatabaseTarget
) -> None:
    probing = open_database(own_target, replace(PATIENT, probe_s=QUICK.probe_s))
    async with open_database(own_target, QUICK) as database, probing:

        async def is_probed() -> bool:
            with suppress(Unavailable):
                return bool(await probing.probe())
            return False

        store = PostgresStore(database)
        await eventually(lambda: answers(store))
        await eventually(is_probed)
        assert own_server.process is not None
        postmaster = psutil.Process(own_server.process.pid)
        stopped = [postmaster, *postmaster.children()]
        for process in stopped:
            process.suspend()
        try:
            started = time.monotonic()
            results = await asyncio.gather(*(answers(store) for _ in range(3)))
            assert results == [False] * 3
            assert time.monotonic() - started < HANGS_S
            started = time.monotonic()
            with pytest.raises(Unavailable, match="no answer in time"):
                await probing.probe()
            assert time.monotonic() - started < HANGS_S
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):  # a worker of its own, which the others that go on had end
                    process.resume()
        await eventually(lambda: answers(store))


async def test_a_first_host_that_swallows_packets_does_not_hide_the_second(
    debian_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_that_serves, asked_first = connector.first_that_serves, set()

    async def noted(count: int, first: int, *more: Any) -> Any:
        asked_first.add(first)
        return await first_that_serves(count, first, *more)

    monkeypatch.setattr(connector, "first_that_serves", noted)
    real = await debian_server.fresh_database()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = (silent.getsockname(), ("127.0.0.1", free_port()), *real.hosts)
        started = time.monotonic()
        async with open_database(replace(real, hosts=hosts)) as database:
            store = PostgresStore(database)
            assert time.monotonic() - started < HANGS_S
            assert await answers(store)
            asked_first.clear()  # the host that served is asked first from now on
            await asyncio.gather(*(store.list_servers(EVERYTHING) for _ in range(MAX_CONNECTIONS)))
            assert asked_first == {2}


async def test_a_server_that_became_read_only_is_left_until_it_takes_writes(
    own_server: PostgresServer, own_target: DatabaseTarget
) -> None:
    async def set_read_only(value: str) -> None:
        connection = await asyncpg.connect(**own_server.admin)
        await connection.execute("SET default_transaction_read_only = off")
        await connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()

    async def refused() -> bool:
        try:
            await store.register_servers([ServerDescriptor(server_id="a", hostname="a", role=str(time.monotonic()))])
        except Unavailable:
            return True
        return False

    async def accepted() -> bool:
        return not await refused()

    async with open_database(own_target) as database:
        store = PostgresStore(database)
        assert await accepted()
        await set_read_only("on")
        try:
            await eventually(refused)
            with pytest.raises(Unavailable):  # the demoted connection is gone and no other host takes writes
                await store.list_servers(EVERYTHING)
        finally:
            await set_read_only("off")
        await eventually(accepted)


@pytest.mark.parametrize(("set_up", "used"), [("off", "local"), ("remote_write", "remote_write")])
async def test_a_commit_is_synced_where_the_server_does_not_ask_for_it(
    own_server: PostgresServer, set_up: str, used: str
) -> None:
    target = await own_server.fresh_database()
    name = target.address.rpartition("/")[2]
    await own_server.execute(f"ALTER DATABASE {name} SET synchronous_commit = {set_up}")
    async with Database(target, clock=SystemClock()) as database:
        for when in ("new", "used again"):
            async with database.connection() as connection:
                assert await connection.fetchval("SHOW synchronous_commit") == used, when


async def test_a_full_pool_is_told_in_time(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [database.connection() for _ in range(MAX_CONNECTIONS)]
    for each in held:
        await each.__aenter__()
    with monkeypatch.context() as quick:
        quick.setattr(database, "_bounds", QUICK)
        started = time.monotonic()
        with pytest.raises(Unavailable):
            async with database.connection():
                pass
        assert time.monotonic() - started < HANGS_S
    for each in held:
        await each.__aexit__(None, None, None)
    assert await answers(PostgresStore(database))


async def test_a_slow_statement_ends_and_its_connection_stays_usable(
    target: DatabaseTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connector.STATEMENT_SHARE < 1
    monkeypatch.setattr(connector, "STATEMENT_SHARE", QUICK.command_s / PATIENT.command_s)  # the server is far ahead
    async with open_database(target) as database:
        async with database.connection() as connection:
            before = connection.get_server_pid()
        started = time.monotonic()
        with pytest.raises(Unavailable):
            async with database.connection() as connection:
                await connection.execute("SELECT pg_sleep(60)")
        assert time.monotonic() - started < HANGS_S
        async with database.connection() as connection:
            assert connection.get_server_pid() == before


async def test_statements_that_wait_for_a_lock_in_vain_are_no_outage(database: Database) -> None:
    async with database.connection() as other, other.transaction():
        await other.execute("LOCK TABLE ai_interactions")  # as VACUUM FULL does
        for bound in ("statement_timeout", "statement_timeout", "lock_timeout", "lock_timeout"):
            with pytest.raises(Unavailable, match="could not do this in time"):
                async with database.connection() as connection, connection.transaction():
                    await connection.execute(f"SET LOCAL {bound} = '100ms'")
                    await connection.execute("SELECT FROM ai_interactions")
        assert database.usable
        assert await answers(PostgresStore(database))


async def test_a_full_disk_of_the_database_is_no_outage_for_who_reads(parts: Parts) -> None:
    store = parts.store
    await store.create_server(ServerDescriptor(server_id="a", hostname="a"))
    await eventually(lambda: parts.copy.as_of is not None)
    async with parts.database.connection() as connection:
        await connection.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION"
            " 'could not extend file: No space left on device' USING ERRCODE = '53100'; END $$;"
            "CREATE TRIGGER full_disk BEFORE INSERT ON servers FOR EACH ROW EXECUTE FUNCTION full_disk()"
        )
    for name in ("b", "c", "d"):
        with pytest.raises(Unavailable, match="disk of the metadata database is full"):
            await store.create_server(ServerDescriptor(server_id=name, hostname=name))
    assert parts.database.usable
    assert (await store.list_servers(ServerFilter())).stale_since is None
    assert not (await store.probe()).down


async def test_that_there_is_no_connection_more_is_no_outage_for_those_that_there_are(
    embedded_server: PostgresServer,
) -> None:
    target = await embedded_server.fresh_database()
    async with open_database(target) as database, AsyncExitStack() as held:
        await database.probe()
        limit = f"ALTER DATABASE {target.options['database']} CONNECTION LIMIT 3"  # one of them is the probe's
        await embedded_server.execute(limit)
        both = [await held.enter_async_context(database.connection()) for _ in range(2)]
        for _ in range(3):
            with pytest.raises(Unavailable):
                async with database.connection():
                    pass
        assert database.usable
        assert [await one.fetchval("SELECT 1") for one in both] == [1, 1]
        await held.aclose()
        assert await answers(PostgresStore(database))


async def test_unknown_failures_are_logged_and_hidden_from_callers(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    for statement, argument in (("SELECT 1 / 0", ()), ("SELECT $1::integer", ("no number",)), ("nonsense", ())):
        caplog.clear()
        with pytest.raises(Internal, match=r"^internal error, id [0-9a-f]{12}$") as hidden:
            async with database.connection() as connection:
                await connection.fetch(statement, *argument)
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert record.exc_info is not None
        assert record.error_id == hidden.value.metadata["error_id"]


@pytest.mark.parametrize("failure", [asyncpg.InternalClientError, asyncpg.ReadOnlySQLTransactionError])
async def test_a_connection_whose_server_has_said_goodbye_is_not_used_again(
    database: Database, failure: type[Exception]
) -> None:
    async with database.connection() as connection:
        before = connection.get_server_pid()
    with pytest.raises(Unavailable):
        async with database.connection() as connection:
            raise failure("cannot switch to state 12; another operation (2) is in progress")
    async with database.connection() as connection:
        assert connection.get_server_pid() != before


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_lost_races_may_be_repeated(database: Database, code: str) -> None:
    with pytest.raises(Aborted):
        async with database.connection() as connection:
            await connection.execute(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{code}'; END $$")


async def test_cancelling_a_call_gives_its_connection_back(database: Database) -> None:
    async def call() -> None:
        async with database.connection() as connection:
            await connection.execute("SELECT pg_sleep(4)")

    calls = [asyncio.create_task(call()) for _ in range(MAX_CONNECTIONS)]
    await asyncio.sleep(0.1)
    for task in calls:
        task.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert all(await asyncio.gather(*(answers(PostgresStore(database)) for _ in range(MAX_CONNECTIONS))))


async def test_a_database_that_was_set_up_anew_is_migrated_anew(target: DatabaseTarget) -> None:
    async with open_database(target) as database:
        store = PostgresStore(database)
        async with database.connection() as connection:
            await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        with pytest.raises(Unavailable):
            await store.list_servers(EVERYTHING)
        await eventually(lambda: answers(store))


async def test_the_probe_says_that_the_schema_cannot_be_used(target: DatabaseTarget) -> None:
    async with open_database(target) as database:
        known = database._migrations
        database._migrations = (Migration(version=1, name="broken", sql="SELECT 1 / 0"),)
        async with database.connection() as connection:
            await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        assert not await answers(PostgresStore(database))

        async def told() -> bool:
            with pytest.raises(Unavailable, match="schema is not ready") as down:
                await database.probe()
            return "migration 1 (broken) failed" in down.value.message

        await eventually(told)
        database._migrations = known
        await eventually(lambda: answers(PostgresStore(database)))
        assert (await database.probe()).degraded == ""


async def test_a_connection_that_is_closed_in_use_is_unavailable(database: Database) -> None:
    with pytest.raises(Unavailable):
        async with database.connection() as connection:
            await connection.close()
            await connection.fetch("SELECT 1")
    assert await answers(PostgresStore(database))


async def test_a_refused_password_is_told_without_it_and_without_the_user(
    debian_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "wr0ng-s3cret-w0rd"
    port = debian_server.admin["port"]
    target = target_of_url(f"postgresql://{OWNER}:{wrong}@127.0.0.1:{port}/postgres")
    async with open_database(target) as database:
        with pytest.raises(Unavailable) as seen:
            await database.probe()
        with pytest.raises(Unavailable) as called:
            await PostgresStore(database).get_server("a")
    assert "refuses the user or the password" in seen.value.message
    assert target.address == f"127.0.0.1:{port}/postgres"
    written = [record.getMessage() + str(record.exc_text) for record in caplog.records]
    for text in (str(seen.value), str(called.value), repr(database.target), *written):
        assert wrong not in text
        assert OWNER not in text


async def test_the_probe_tells_what_the_status_call_shows(
    database: Database, server: PostgresServer, target: DatabaseTarget
) -> None:
    started = time.monotonic()
    probe = await database.probe()
    took_ms = (time.monotonic() - started) * 1_000
    assert probe.server_version.startswith("PostgreSQL 18" if server.kind == "embedded" else "PostgreSQL 15")
    assert probe.address == target.address
    assert 0 < probe.latency_ms <= took_ms
    assert (probe.disk_free_bytes > 0) == (server.kind == "embedded")
    assert probe.degraded == ""


async def test_a_server_that_is_too_old_is_refused(target: DatabaseTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.metadata.store_migrate.MIN_SERVER_VERSION", 99)
    with pytest.raises(FailedPrecondition, match="is too old"):
        async with open_database(target):
            pass


def test_the_tests_bounds_are_not_those_of_the_product() -> None:
    assert Bounds() == Bounds(acquire_s=3.0, command_s=5.0, probe_s=1.2)


async def test_calls_are_traced_when_tracing_is_on_and_probes_never(target: DatabaseTarget) -> None:
    exporter = InMemorySpanExporter()
    telemetry.configure("test", exporter=exporter)
    try:
        async with open_database(target) as database:
            exporter.clear()
            await database.probe()
            assert exporter.get_finished_spans() == ()
            with telemetry.tracer("test").start_as_current_span("caller") as caller:
                await PostgresStore(database).list_servers(replace(EVERYTHING, environment="in-a-parameter"))
            spans = [span for span in exporter.get_finished_spans() if span.name != "caller"]
        assert spans
        assert all(span.parent and span.parent.span_id == caller.get_span_context().span_id for span in spans)
        assert any("FROM servers" in str(span.attributes) for span in spans)
        assert "in-a-parameter" not in str([span.attributes for span in spans])
    finally:
        AsyncPGInstrumentor().uninstrument()
        telemetry.shutdown()


@pytest.mark.parametrize("version", [b"", b"S\x00\x00\x00\x1aserver_version\x00banana\x00"], ids=["none", "banana"])
async def test_what_answers_like_something_else_is_away_and_keeps_no_connection(version: bytes) -> None:
    """Callers are answered from the copy; a fault of ours would be all they get, with a traceback twice a second."""
    left: list[asyncio.StreamWriter] = []

    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left.append(writer)
        await stream.readexactly(8)
        writer.write(b"N")  # no TLS
        await stream.read(1_000)
        writer.write(b"R\x00\x00\x00\x08\x00\x00\x00\x00" + version + b"Z\x00\x00\x00\x05I")
        await stream.read()
        left.remove(writer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_database(target_of_url(f"postgresql://ann:secret@127.0.0.1:{port}/fleet")) as database:
            for _ in range(2):
                with pytest.raises(Unavailable, match="does not answer as PostgreSQL does"):
                    await database.probe()

        def all_closed() -> bool:
            gc.collect()
            return not left

        await eventually(all_closed)
