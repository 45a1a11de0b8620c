"""The record as docs/operations.md says that it is backed up and put back: in its place, and on a new machine."""

import asyncio
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from runtime.errors import Unavailable
from services.metadata.audit.checkpoint import CHECKPOINTS_FILE, KEY_FILE
from tests.harness import eventually
from tests.harness.postgres import OWNER, PostgresServer
from tests.metadata.audit_parts import Audit, Writer, auditing


async def run(server: PostgresServer, program: str, *arguments: str) -> None:
    """A program of the embedded PostgreSQL, as its superuser."""
    place = {"PGHOST": str(server.admin["host"]), "PGPORT": str(server.admin["port"]), "PGUSER": server.admin["user"]}
    command = [str(Path(server.command[0]).with_name(program)), *arguments]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, env={**os.environ, **place})


async def put_back(server: PostgresServer, dump: Path, name: str) -> None:
    await run(server, "createdb", "-O", OWNER, f"{name}_restored")
    await run(server, "pg_restore", "-d", f"{name}_restored", str(dump))
    swap = (
        f"ALTER DATABASE {name} ALLOW_CONNECTIONS false",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
        f"ALTER DATABASE {name} RENAME TO {name}_before",
        f"ALTER DATABASE {name}_restored RENAME TO {name}",
    )
    await run(
        server, "psql", "-v", "ON_ERROR_STOP=1", "-d", "postgres", *(text for one in swap for text in ("-c", one))
    )


async def has(audit: Audit, number: int) -> None:
    async def all_there() -> bool:
        with suppress(Unavailable):
            await audit.parts.store.probe()  # as the status does every 2 s
        return bool(await audit.sql("SELECT count(*) FROM audit_events") == number)

    await eventually(all_there, within_s=60)
    await audit.parts.all_inserted(60.0)


async def test_a_dump_is_put_back_beside_the_running_service_and_on_a_new_machine(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    first, second, dump, writer = tmp_path / "first", tmp_path / "second", tmp_path / "record.dump", Writer()
    for folder in (first, second):
        folder.mkdir()
    target = await embedded_server.fresh_database()
    async with auditing(target, embedded_server, first) as audit:
        await audit.filled(writer, 10)
        await run(embedded_server, "pg_dump", "-Fc", "-f", str(dump), audit.database)
        for name in (KEY_FILE, CHECKPOINTS_FILE):
            shutil.copy(first / name, second / name)
        await audit.filled(writer, 5)
        await put_back(embedded_server, dump, audit.database)
        await has(audit, 15)  # the last day's are sent again
        proof = await audit.keeper.verify()
        assert (proof.findings, proof.events) == ([], 15)
    target = await embedded_server.fresh_database()
    async with auditing(target, embedded_server, second) as audit:
        assert {kind for kind, _, _ in await audit.found()} == {"REMOVED", "PARTITION_REMOVED"}
        await put_back(embedded_server, dump, audit.database)
        await has(audit, 10)
        proof = await audit.keeper.verify()
        assert (proof.findings, proof.events) == ([], 10)
        await audit.ship(Writer("gateway-2").make(3))
        assert await audit.keeper.sign()
        await has(audit, 13)
        assert (await audit.keeper.verify()).findings == []
