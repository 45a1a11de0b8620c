"""The metadata service as a real process: started, called over gRPC, killed, started again."""

import asyncio
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import pytest

from openmanager.gateway.v1 import ai_pb2
from openmanager.metadata.v1 import interaction_pb2
from openmanager.metadata.v1 import metadata_pb2 as pb
from runtime.channel import calling
from runtime.errors import AlreadyExists, InvalidArgument, NotFound
from services.metadata.store_migrate import load_migrations
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.service import DOWN, ENVIRONMENT, ROOT, UP, Service, postmasters, running, server


async def test_killed_with_9_it_serves_the_same_data_within_10_s(data_dir: Path) -> None:
    began = time.monotonic()
    async with running(data_dir) as first:
        first_start_s = time.monotonic() - began
        async with calling("metadata"):
            await first.servers.RegisterServers(pb.RegisterServersRequest(servers=[server("a"), server("b")]))
        (orphan,) = postmasters(data_dir)
        first.stop(signal.SIGKILL)
        assert orphan.is_running()
    started = time.monotonic()
    async with running(data_dir) as second:
        assert await second.size() == 2
        again_s = time.monotonic() - started
        print(f"serves {again_s:.1f} s after the kill; the first start took {first_start_s:.1f} s")
        assert again_s < 2 * first_start_s  # it takes less; of a first start, with its initdb, 3 s are usual
        (adopted,) = postmasters(data_dir)
        assert adopted.pid != orphan.pid

        async def up() -> bool:
            return (await second.status()).state == UP

        await eventually(up)
        status = await second.status()
        assert (status.name, status.role, status.service) == ("postgresql", "embedded", "metadata")
        assert status.server_version.startswith("PostgreSQL 18")
        assert status.disk_free_bytes > 0
        # A killed postmaster is down for callers and the status, and comes back by itself.
        adopted.kill()

        async def back() -> bool:
            return await second.size() == 2

        await eventually(back)
        assert second.stop() == 0
    assert postmasters(data_dir) == []


async def test_every_method_over_the_wire(data_dir: Path, made_cluster: Path) -> None:
    (data_dir / "metadata").mkdir(mode=0o700)
    subprocess.run(["cp", "-a", str(made_cluster), str(data_dir / "metadata")], check=True)
    async with running(data_dir) as service:
        calls = service.servers
        descriptor = server("web-1", hostname="web-1.example", environment="prod", role="web", location="eu")
        descriptor.report_interval.FromSeconds(30)
        created = (await calls.CreateServerRecord(pb.CreateServerRecordRequest(descriptor=descriptor))).server
        assert created.descriptor == descriptor
        assert created.create_time.ToMilliseconds() / 1000 == pytest.approx(time.time(), abs=60)
        assert not created.HasField("delete_time")
        got = await calls.GetServerRecord(pb.GetServerRecordRequest(server_id="web-1"))
        assert got.server == created
        update = pb.UpdateServerRecordRequest(descriptor=server("web-1", role="db"))
        update.update_mask.paths.append("role")
        updated = (await calls.UpdateServerRecord(update)).server.descriptor
        assert (updated.role, updated.environment, updated.report_interval.seconds) == ("db", "prod", 30)
        deleted = await calls.DeleteServerRecord(pb.DeleteServerRecordRequest(server_id="web-1"))
        assert deleted.server.HasField("delete_time")
        assert await service.size() == 0
        shown = await calls.ListServerRecords(pb.ListServerRecordsRequest(show_deleted=True, role="db", page_size=1))
        assert [record.descriptor.server_id for record in shown.servers] == ["web-1"]
        await calls.UndeleteServerRecord(pb.UndeleteServerRecordRequest(server_id="web-1"))
        registered = await calls.RegisterServers(pb.RegisterServersRequest(servers=[descriptor, server("new")]))
        assert registered.changed == 2
        said = interaction_pb2.Interaction(session_id="s", query="why?", response="so", confidence=0.0, user_rating=5)
        stored = (
            await service.interactions.RecordInteraction(ai_pb2.RecordInteractionRequest(interaction=said))
        ).interaction
        assert (stored.query, stored.confidence, stored.user_rating) == ("why?", 0.0, 5)
        assert stored.HasField("confidence")
        loaded = await service.interactions.GetInteraction(ai_pb2.GetInteractionRequest(id=stored.id))
        assert loaded.interaction == stored
        bare = await service.interactions.RecordInteraction(ai_pb2.RecordInteractionRequest())
        assert not bare.interaction.HasField("confidence")
        assert not bare.interaction.HasField("user_rating")
        found = await service.interactions.ListInteractions(
            ai_pb2.ListInteractionsRequest(session_id="s", min_rating=5)
        )
        assert list(found.interactions) == [stored]
        for call, kind, field in (
            (calls.GetServerRecord(pb.GetServerRecordRequest(server_id="no")), NotFound, "server_id"),
            (calls.CreateServerRecord(pb.CreateServerRecordRequest(descriptor=descriptor)), AlreadyExists, "server_id"),
            (calls.ListServerRecords(pb.ListServerRecordsRequest(page_token="x")), InvalidArgument, "page_token"),
            (service.interactions.GetInteraction(ai_pb2.GetInteractionRequest(id="x")), InvalidArgument, "id"),
        ):
            with pytest.raises(kind) as refused:
                async with calling("metadata"):
                    await call
            assert refused.value.field == field


async def test_it_answers_health_before_its_database_is_there(data_dir: Path, own_server: PostgresServer) -> None:
    postgres = own_server
    name = (await postgres.fresh_database()).address.rpartition("/")[2]
    postgres.stop()
    async with running(data_dir, DATABASE_URL=postgres.url(name)) as service:
        assert await service.size() == -1

        async def state_is(state: int) -> bool:
            return (await service.status()).state == state

        await eventually(lambda: state_is(DOWN))
        down = await service.status()
        assert down.role == "primary"
        assert down.last_error
        assert postgres.password not in str(down)
        postgres.start()

        async def found() -> bool:
            return await service.size() == 0

        await eventually(found)
        await eventually(lambda: state_is(UP))
        up = await service.status()
        assert up.address == f"127.0.0.1:{postgres.admin['port']}/{name}"
        assert up.server_version.startswith("PostgreSQL 15")
        admin = await asyncpg.connect(**(postgres.admin | {"database": name}))
        await admin.execute("INSERT INTO schema_version (version, name, checksum) VALUES (99, 'future', 'x')")
        await admin.close()
        assert service.stop() == 0
        assert not (data_dir / "metadata" / "postgresql").exists()
    # A schema from the future: one line, no traceback, nothing served.
    newer = Service(data_dir, DATABASE_URL=postgres.url(name))
    assert await asyncio.to_thread(newer.process.wait, 60.0) == 1
    await newer.channel.close()
    text = newer.log.read_text()
    assert "schema is version 99" in text
    assert "Traceback" not in text
    assert postgres.password not in text


def test_settings_that_make_no_sense_stop_it_with_one_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.metadata"],
        cwd=ROOT,
        env=ENVIRONMENT
        | {"DATA_DIR": str(tmp_path), "DATABASE_URL": "mysql://u:hidden-word@db/x", "METADATA_ADDRESS": "x"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "DATABASE_URL: must begin with postgresql://" in done.stderr
    assert "METADATA_ADDRESS: 'x' is not host:port" in done.stderr
    assert "hidden-word" not in done.stderr
    assert "Traceback" not in done.stderr


async def test_two_services_that_start_at_once_share_one_new_database(
    data_dir: Path, tmp_path: Path, debian_server: PostgresServer
) -> None:
    name = (await debian_server.fresh_database()).address.rpartition("/")[2]
    url = debian_server.url(name)
    async with AsyncExitStack() as stack:
        starting = [running(folder, DATABASE_URL=url) for folder in (data_dir, tmp_path)]
        first, second = await asyncio.gather(*(stack.enter_async_context(each) for each in starting))
        for service, server_id in ((first, "a"), (second, "b")):
            async with calling("metadata"):
                await service.servers.CreateServerRecord(pb.CreateServerRecordRequest(descriptor=server(server_id)))
        assert await first.size() == await second.size() == 2
        connection = await asyncpg.connect(url)
        versions = [row["version"] for row in await connection.fetch("SELECT version FROM schema_version")]
        await connection.close()
    assert sorted(versions) == list(range(1, len(load_migrations()) + 1))
    logs = (data_dir / "service.log").read_text() + (tmp_path / "service.log").read_text()
    assert logs.count("applying migration 1 ") == 1
