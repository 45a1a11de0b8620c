"""The schema's history: once, whole or not at all, on both servers."""

import asyncio
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, Unavailable
from services.metadata.queries import ServerQuery
from services.metadata.store import ServerFilter
from services.metadata.store_connection import Database
from services.metadata.store_migrate import Migration, load_migrations, migrate
from services.metadata.store_postgres import PostgresStore
from services.metadata.target import DatabaseTarget
from tests.harness import eventually
from tests.harness.postgres import PostgresServer

KNOWN = load_migrations()
NEXT = len(KNOWN) + 1
CONTRACT = {
    "servers": {
        "id": ("character varying", 255, "NO"),
        "hostname": ("character varying", 255, "NO"),
        "environment": ("character varying", 50, "YES"),
        "role": ("character varying", 50, "YES"),
        "location": ("character varying", 100, "YES"),
        "created_at": ("timestamp with time zone", None, "NO"),
        "updated_at": ("timestamp with time zone", None, "NO"),
    },
    "ai_interactions": {
        "id": ("uuid", None, "NO"),
        "session_id": ("character varying", 255, "YES"),
        "query": ("text", None, "YES"),
        "response": ("text", None, "YES"),
        "confidence": ("double precision", None, "YES"),
        "user_rating": ("integer", None, "YES"),
        "created_at": ("timestamp with time zone", None, "NO"),
    },
}


async def connect(target: DatabaseTarget) -> Any:
    (host, port), *_ = target.hosts
    return await asyncpg.connect(host=host, port=port, **target.options)


@pytest.fixture
async def connection(target: DatabaseTarget) -> Any:
    made = await connect(target)
    yield made
    await made.close()


async def versions(connection: Any) -> list[int]:
    return [row["version"] for row in await connection.fetch("SELECT version FROM schema_version ORDER BY applied_at")]


def step(version: int, sql: str) -> Migration:
    return Migration(version=version, name="test", sql=sql)


async def test_an_empty_database_gets_the_tables_of_the_contract(connection: Any) -> None:
    assert await migrate(connection, KNOWN) == len(KNOWN)
    assert await versions(connection) == list(range(1, len(KNOWN) + 1))
    for table, columns in CONTRACT.items():
        rows = await connection.fetch(
            "SELECT column_name, data_type, character_maximum_length, is_nullable FROM information_schema.columns "
            "WHERE table_name = $1",
            table,
        )
        found = {row[0]: tuple(row)[1:] for row in rows}
        assert {name: found[name] for name in columns} == columns
    # Plain SQL as the contract has it: ids and times come by themselves.
    await connection.execute("INSERT INTO servers (id, hostname) VALUES ('a', 'a')")
    row = await connection.fetchrow("INSERT INTO ai_interactions (query) VALUES ('q') RETURNING *")
    assert row["id"] is not None
    assert row["created_at"] is not None


async def test_migrating_again_changes_nothing(connection: Any) -> None:
    await migrate(connection, KNOWN)
    before = await connection.fetch("SELECT * FROM schema_version")
    assert await migrate(connection, KNOWN) == len(KNOWN)
    assert await connection.fetch("SELECT * FROM schema_version") == before


@pytest.mark.parametrize(
    "made",
    ["CREATE FUNCTION access_changed() RETURNS int RETURN 1", "DROP TABLE servers CASCADE; DELETE FROM schema_version"],
)
async def test_a_database_that_is_being_restored_is_left_alone(connection: Any, made: str) -> None:
    """A dump makes tables before it fills them, that of the versions among the last; none of it may be in its way."""
    if made.startswith("DROP"):
        await migrate(connection, KNOWN)
    await connection.execute(made)
    listed = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    before = await connection.fetch(listed)
    with pytest.raises(FailedPrecondition, match="a dump is being restored") as refused:
        await migrate(connection, KNOWN)
    assert refused.value.reason == "SCHEMA_INCOMPLETE"
    assert await connection.fetch(listed) == before


async def test_services_that_start_at_once_migrate_once(target: DatabaseTarget) -> None:
    slow = (
        *KNOWN,
        step(len(KNOWN) + 1, "SELECT pg_sleep(0.2); CREATE TABLE once (n integer); INSERT INTO once VALUES (1)"),
    )
    connections = [await connect(target) for _ in range(4)]
    assert await asyncio.gather(*(migrate(each, slow) for each in connections)) == [len(slow)] * 4
    assert await connections[0].fetchval("SELECT count(*) FROM once") == 1
    assert await versions(connections[0]) == list(range(1, len(slow) + 1))
    for each in connections:
        await each.close()


@pytest.mark.parametrize(
    "last_words",
    ["SELECT 1 / 0", f"INSERT INTO schema_version VALUES ({NEXT}, 'before its row is written', now(), '')"],
    ids=["in its SQL", "in its own row"],
)
async def test_a_failed_migration_leaves_the_old_schema_whole(
    connection: Any, target: DatabaseTarget, last_words: str
) -> None:
    await migrate(connection, KNOWN)
    await connection.execute("INSERT INTO servers (id, hostname) VALUES ('a', 'kept')")
    bad = f"CREATE TABLE half (n integer); ALTER TABLE servers DROP COLUMN hostname; {last_words}"
    with pytest.raises(FailedPrecondition, match=rf"migration {NEXT} \(test\) failed and was rolled back") as failed:
        await migrate(connection, (*KNOWN, step(NEXT, bad)))
    assert failed.value.reason == "MIGRATION_FAILED"
    fresh = await connect(target)
    assert await versions(fresh) == list(range(1, NEXT))
    assert await fresh.fetchval("SELECT to_regclass('half')") is None
    assert await fresh.fetchval("SELECT hostname FROM servers") == "kept"
    await fresh.close()
    await connection.close()  # as the service does; its lock goes with it
    again = await connect(target)
    assert await migrate(again, (*KNOWN, step(NEXT, "CREATE TABLE half (n integer)"))) == NEXT
    await again.close()


@pytest.mark.parametrize("version", range(1, len(KNOWN)))
async def test_every_earlier_version_is_brought_up_with_its_data(
    connection: Any, target: DatabaseTarget, version: int
) -> None:
    assert await migrate(connection, KNOWN[:version]) == version
    await connection.execute(
        "INSERT INTO servers (id, hostname, role, deleted_at, report_interval_ms) SELECT 's' || n, 'h' || n, 'web', "
        "CASE WHEN n = 7 THEN now() END, 5000 FROM generate_series(1, 2000) AS n"
    )
    kept = "id, hostname, environment, role, location, created_at, updated_at, deleted_at, report_interval_ms"
    before = await connection.fetch(f"SELECT {kept} FROM servers ORDER BY id")
    if version >= 2:
        await connection.execute(
            "INSERT INTO ai_interactions (session_id, query, response, confidence, user_rating) "
            "SELECT 's', 'q' || n, 'r', 0.5, 3 FROM generate_series(1, 500) AS n"
        )
    assert await migrate(connection, KNOWN) == len(KNOWN)
    assert await connection.fetch(f"SELECT {kept} FROM servers ORDER BY id") == before
    if version >= 2:
        assert await connection.fetchval("SELECT count(*) FROM ai_interactions WHERE response = 'r'") == 500
    async with Database(target, clock=SystemClock()) as database:
        store = PostgresStore(database)
        records, total = await store.list_servers(ServerQuery.of(ServerFilter(show_deleted=True), 5, ""))
        assert (total, records[0].details.revision, records[0].details.labels) == (2_000, 1, ())
        changed = await store.update_server(records[0].descriptor, ["role"], etag="r1")
        assert changed.details.revision == 2


async def test_a_schema_newer_than_the_program_is_left_alone(connection: Any, target: DatabaseTarget) -> None:
    await migrate(connection, (*KNOWN, step(NEXT, "CREATE TABLE later (n integer)")))
    said = f"schema is version {NEXT}, this program knows {NEXT - 1}: start a newer"
    with pytest.raises(FailedPrecondition, match=said) as refused:
        async with Database(target, clock=SystemClock()):
            pass
    assert refused.value.reason == "SCHEMA_TOO_NEW"


async def test_a_schema_that_is_newer_in_the_database_that_answers_now_is_left_alone(database: Database) -> None:
    """As where one of a later version is restored in its place while the service runs."""
    async with database.connection() as connection:
        await database.probe()
        await connection.execute(
            "ALTER TABLE ai_feedback RENAME TO earlier; CREATE TABLE ai_feedback (LIKE earlier INCLUDING ALL);"
            f"INSERT INTO schema_version (version, name, checksum) VALUES ({NEXT}, 'later', '')"
        )

    async def why_not() -> str:
        try:
            await database.probe()
        except Unavailable as error:
            return error.message
        return ""

    assert f"schema is version {NEXT}" in str(await eventually(why_not))
    with pytest.raises(Unavailable):
        async with database.connection():
            pass


async def test_a_migration_altered_after_its_release_is_noticed(connection: Any) -> None:
    await migrate(connection, KNOWN)
    altered = (KNOWN[0], replace(KNOWN[1], sql=KNOWN[1].sql + "\n-- changed"), *KNOWN[2:])
    with pytest.raises(FailedPrecondition, match="migration 2") as refused:
        await migrate(connection, altered)
    assert refused.value.reason == "SCHEMA_MISMATCH"


async def test_tables_of_the_contract_are_taken_over_with_their_rows(connection: Any, target: DatabaseTarget) -> None:
    await connection.execute(
        "CREATE TABLE servers (id varchar(255) PRIMARY KEY, hostname varchar(255) NOT NULL, environment varchar(50), "
        "role varchar(50), location varchar(100), created_at timestamptz DEFAULT now(), "
        "updated_at timestamptz DEFAULT now()); INSERT INTO servers VALUES ('old', 'old.example')"
    )
    async with Database(target, clock=SystemClock()) as database, database.connection() as lent:
        row = await lent.fetchrow("SELECT hostname, deleted_at FROM servers")
    assert tuple(row) == ("old.example", None)


async def test_a_role_that_may_not_create_tables_can_use_a_migrated_schema(
    connection: Any, server: PostgresServer, target: DatabaseTarget
) -> None:
    await migrate(connection, KNOWN)
    admin = await asyncpg.connect(
        **(server.admin | {"database": target.options.get("database") or target.address.rpartition("/")[2]})
    )
    await admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC, pg_database_owner")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.execute("CREATE TABLE forbidden (n integer)")
    assert await migrate(connection, KNOWN) == len(KNOWN)
    await admin.close()


@pytest.mark.parametrize(
    "setup",
    [
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC, pg_database_owner",  # of a role that owns nothing, since 15
        "REVOKE ALL ON SCHEMA public FROM PUBLIC, pg_database_owner",
        "DROP SCHEMA public",
        "CREATE TABLE schema_version (version integer, name text, checksum text)",
    ],
)
async def test_a_role_without_rights_is_told_what_it_lacks(embedded_server: PostgresServer, setup: str) -> None:
    target = await embedded_server.fresh_database()
    await embedded_server.execute(setup, database=target.options["database"])
    with pytest.raises(FailedPrecondition, match=r"the role in DATABASE_URL .*(permission denied|no schema)") as failed:
        async with Database(target, clock=SystemClock()):
            pass
    assert failed.value.reason == "MIGRATION_FAILED"


async def test_pgvector_beside_us_changes_nothing(embedded_server: PostgresServer) -> None:
    target = await embedded_server.fresh_database()
    admin = await asyncpg.connect(**(embedded_server.admin | {"database": target.options["database"]}))
    await admin.execute("CREATE EXTENSION vector")
    await admin.close()
    async with Database(target, clock=SystemClock()) as database:
        assert (await database.probe()).server_version.startswith("PostgreSQL 18")


def test_the_packaged_migrations_are_numbered_from_one() -> None:
    assert [migration.version for migration in KNOWN] == list(range(1, len(KNOWN) + 1))
    assert [migration.name for migration in KNOWN[:2]] == ["servers", "ai_interactions"]
