"""The audit log with the real processes: who did what is listed, proved, exported, and outlives the death of each."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest

from openmanager.gateway.v1 import audit_pb2, audit_pb2_grpc, simulator_pb2, simulator_pb2_grpc
from tests.harness import eventually
from tests.harness.postgres import PostgresServer, debian_postgres
from tests.harness.product import ROOT, Product

TOKEN = "an-administrator's-token"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
METADATA = (("authorization", f"Bearer {TOKEN}"),)
FLEET = "openmanager.gateway.v1.FleetService"


@pytest.fixture(scope="module")
def database_server() -> Iterator[PostgresServer]:
    with debian_postgres() as server:
        yield server


class Audited:
    """A product on a database of Debian's, with a token."""

    def __init__(self, product: Product, server: PostgresServer, database: str) -> None:
        self.product = product
        self.server = server
        self.database = database

    async def call(self, path: str, **options: Any) -> Any:
        return await self.product.http(path, headers=options.pop("headers", HEADERS), **options)

    async def reaches_metadata(self) -> bool:
        """It can be asked, and the gateway has heard from it whose tokens there are."""
        known = (await self.call("/v1/servers", headers={"authorization": "Bearer not-a-token"})).status == 401
        return bool(known and (await self.call("/v1/audit")).status == 200)

    async def events(self, query: str = "") -> list[dict[str, Any]]:
        answer = await self.call(f"/v1/audit?page_size=1000{query}")
        assert answer.status == 200, answer.body
        found: list[dict[str, Any]] = answer.json.get("events", [])
        return found

    async def proof(self) -> dict[str, Any]:
        answer = await self.call("/v1/audit:verify")
        assert answer.status == 200, answer.body
        (line,) = answer.body.splitlines()
        proof: dict[str, Any] = json.loads(line)["proof"]
        return proof

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """`openmanager` as a user runs it."""
        environ = os.environ | {"OPENMANAGER_TOKEN": TOKEN, "OPENMANAGER_ADDRESS": self.product.addresses["gateway"]}
        return subprocess.run(
            [sys.executable, "-m", "client", *words],
            check=False,
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )

    async def tamper(self, statement: str) -> None:
        connection = await asyncpg.connect(**(self.server.admin | {"database": self.database}))
        try:
            await connection.execute("SET session_replication_role = replica")
            await connection.execute(statement)
        finally:
            await connection.close()


@pytest.fixture(scope="module")
async def audited(tmp_path_factory: pytest.TempPathFactory, database_server: PostgresServer) -> AsyncIterator[Audited]:
    target = await database_server.fresh_database()
    database = target.address.rpartition("/")[2]
    settings = {"DATABASE_URL": database_server.url(database), "GATEWAY_TOKEN": TOKEN}
    async with Product(tmp_path_factory.mktemp("audit"), **settings) as product:
        await product.start("metadata", "timeseries", "cache", "gateway")
        made = Audited(product, database_server, database)
        await eventually(made.reaches_metadata, 30.0)
        yield made


async def test_changes_are_listed_with_who_what_and_whence(audited: Audited) -> None:
    body = {"id": "audited-1", "hostname": "one", "role": "web"}
    assert (await audited.call("/v1/servers", body=body)).status == 200
    changed = await audited.call("/v1/servers/audited-1", body={"role": "db"}, method="PATCH")
    assert changed.status == 200, changed.body
    assert (await audited.call("/v1/servers/audited-1", method="DELETE")).status == 200

    async def all_there() -> list[dict[str, Any]]:
        found = await audited.events("&target=audited-1")
        return found if len(found) == 3 else []

    deleted, updated, created = await eventually(all_there, 30.0)
    assert [event["action"] for event in (created, updated, deleted)] == [
        f"{FLEET}.{name}" for name in ("CreateServer", "UpdateServer", "DeleteServer")
    ]
    assert {event["actor"] for event in (created, updated, deleted)} == {"token-holder"}
    assert (updated["code"], updated["address"], updated["authentication"]) == ("OK", "127.0.0.1", "token")
    assert json.loads(created["after"])["role"] == "web" and "before" not in created
    assert (json.loads(updated["before"])["role"], json.loads(updated["after"])["role"]) == ("web", "db")
    assert json.loads(deleted["before"])["role"] == "db"
    assert updated["traceId"] == changed.headers["traceresponse"].split("-")[1]
    assert await audited.events("&target=audited-1&action=" + f"{FLEET}.DeleteServer") == [deleted]
    asked = "/v1/audit?start_time=-1h&page_size=1"
    first = (await audited.call(asked)).json
    second = (await audited.call(f"{asked}&page_token={first['nextPageToken']}")).json
    assert first["events"][0]["id"] != second["events"][0]["id"]


async def test_refused_calls_are_counted_over_both_transports(audited: Audited) -> None:
    wrong = {"authorization": "Bearer not-a-token"}
    for _ in range(7):
        assert (await audited.call("/v1/servers/x", method="DELETE", headers=wrong)).status == 401
    async with grpc.aio.insecure_channel(audited.product.addresses["gateway"]) as channel:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{FLEET}/DeleteServer")(b"", metadata=(("authorization", "Bearer no"),))
    await asyncio.sleep(0)
    await audited.product.kill("gateway", how=signal.SIGTERM)  # what is counted becomes events
    await audited.product.start("gateway")

    async def there() -> int:
        found = await audited.events("&code=UNAUTHENTICATED")
        return sum(int(event["count"]) for event in found if event["action"] == f"{FLEET}.DeleteServer") == 12

    await eventually(there, 30.0)


async def test_the_log_is_proved_and_exported_and_tampering_named(audited: Audited) -> None:
    assert (await audited.call("/v1/servers", body={"id": f"audited-{uuid4()}"})).status == 200
    proof = await audited.proof()
    assert proof["valid"] is True and int(proof["events"]) >= 1 and proof["publicKey"]
    done = await asyncio.to_thread(audited.command, "audit", "verify")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = [json.loads(line) for line in (await audited.call("/v1/audit:export")).body.splitlines()]
    events = [line["event"] for line in lines if "event" in line]
    assert len(events) >= int(proof["events"])
    exports = await eventually(lambda: audited.events("&action=openmanager.gateway.v1.AuditService.ExportAuditLog"), 30)
    assert exports
    changed = next(event for event in reversed(events) if event["actor"] == "token-holder")
    writer, last = changed["writerId"], int(changed["seq"])
    await audited.tamper(f"UPDATE audit_events SET actor = 'nobody' WHERE writer_id = '{writer}' AND seq = {last}")
    proof = await audited.proof()
    assert proof["valid"] is False
    (finding,) = proof["findings"]
    assert (finding["kind"], finding["writerId"], int(finding["firstSeq"])) == (
        "AUDIT_FINDING_KIND_ALTERED",
        writer,
        last,
    )
    done = await asyncio.to_thread(audited.command, "audit", "verify")
    assert done.returncode == 1 and f"event {last} " in done.stdout
    await audited.tamper(
        f"UPDATE audit_events SET actor = 'token-holder' WHERE writer_id = '{writer}' AND seq = {last}"
    )
    assert (await audited.proof())["valid"] is True


async def test_only_an_administrator_reads_it(audited: Audited) -> None:
    made = await audited.call("/v1/tokens", body={"name": "viewer", "role": "ROLE_VIEWER"})
    assert made.status == 200, made.body
    viewer = {"authorization": f"Bearer {made.json['secret']}"}

    async def known() -> bool:
        return (await audited.call("/v1/servers", headers=viewer)).status == 200

    await eventually(known, 30.0)
    for path in ("/v1/audit", "/v1/audit:verify", "/v1/audit:export"):
        assert (await audited.call(path, headers=viewer)).status == 403
    stub = audit_pb2_grpc.AuditServiceStub
    async with grpc.aio.insecure_channel(audited.product.addresses["gateway"]) as channel:
        answers = stub(channel).VerifyAuditLog(audit_pb2.VerifyAuditLogRequest(progress=True), metadata=METADATA)
        last = [answer async for answer in answers][-1]
        assert last.proof.valid


async def test_a_start_with_other_settings_is_an_event(audited: Audited) -> None:
    await audited.product.kill("gateway", how=signal.SIGTERM)
    audited.product.environ["GATEWAY_RATE_LIMIT"] = "5000"
    await audited.product.start("gateway")

    async def there() -> list[dict[str, Any]]:
        found = await audited.events("&action=openmanager.gateway.Configure")
        return found if len(found) == 2 else []

    changed, first = await eventually(there, 30.0)
    assert "before" not in first
    before, after = json.loads(changed["before"]), json.loads(changed["after"])
    assert {name for name in after if after[name] != before[name]} == {"GATEWAY_RATE_LIMIT"}
    assert after["GATEWAY_TOKEN"] == "(set)"
    assert len(await audited.events("&action=openmanager.metadata.Configure")) == 1


async def test_what_a_worker_that_is_no_more_has_left_behind_is_shipped(audited: Audited) -> None:
    product = audited.product
    await product.kill("metadata", how=signal.SIGTERM)
    wrong = {"authorization": "Bearer of-a-worker"}
    assert (await audited.call("/v1/servers/left-behind", method="PATCH", body={}, headers=wrong)).status == 401
    await product.kill("gateway", how=signal.SIGTERM)
    folder = product.folder / "data" / "gateway"
    (folder / "worker-7").mkdir()
    for file in folder.glob("audit.db*"):
        file.rename(folder / "worker-7" / file.name)
    await product.start("metadata", "gateway")
    await eventually(audited.reaches_metadata, 30.0)

    async def there() -> bool:
        found = await audited.events("&code=UNAUTHENTICATED")
        return any(event["action"] == f"{FLEET}.UpdateServer" for event in found)

    await eventually(there, 30.0)
    assert (await audited.proof())["valid"] is True


async def test_users_and_tokens_are_in_it_and_their_secrets_are_not(audited: Audited) -> None:
    password = "correct horse battery staple"
    user = {"user": {"name": "Grace", "role": "ROLE_OPERATOR"}, "password": password}
    assert (await audited.call("/v1/users", body=user)).status == 200
    made = await audited.call("/v1/tokens", body={"name": "for-grace", "role": "ROLE_VIEWER", "user": "Grace"})
    service = "openmanager.gateway.v1.AccessService"
    (event,) = await eventually(
        lambda: audited.events(f"&target={made.json['token']['id']}&action={service}.CreateToken"), 10.0
    )
    assert json.loads(event["after"])["name"] == "for-grace"
    (event,) = await audited.events(f"&target=Grace&action={service}.CreateUser")
    assert json.loads(event["after"])["role"] == "ROLE_OPERATOR"
    everything = (await audited.call("/v1/audit:export")).body.decode()
    assert made.json["token"]["id"] in everything
    for secret in (password, made.json["secret"], TOKEN):
        assert secret not in everything


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.fault("kill -9 of PostgreSQL, metadata and gateway in the middle of 1,000 audited changes")
async def test_every_acknowledged_change_is_in_the_log_once_whoever_dies(
    tmp_path: Path, database_server: PostgresServer
) -> None:
    target = await database_server.fresh_database()
    database = target.address.rpartition("/")[2]
    settings = {"DATABASE_URL": database_server.url(database), "GATEWAY_TOKEN": TOKEN, "SIMULATOR_SERVERS": "1"}
    acknowledged: list[str] = []
    async with Product(tmp_path, **settings) as product:
        await product.start("metadata", "timeseries", "cache", "simulator", "gateway")
        audited = Audited(product, database_server, database)

        async def change(channel: grpc.aio.Channel, number: int) -> None:
            stub = simulator_pb2_grpc.SimulatorServiceStub(channel)
            trace_id = f"{number + 1:032x}"
            place = ("traceparent", f"00-{trace_id}-00f067aa0ba902b7-00")
            ends = time.monotonic() + 20.0
            while time.monotonic() < ends:
                try:
                    await stub.StartSimulator(
                        simulator_pb2.StartSimulatorRequest(), metadata=(*METADATA, place), timeout=5
                    )
                except grpc.aio.AioRpcError:
                    return  # not acknowledged; it may be in the log
                acknowledged.append(trace_id)
                return

        async def some(first: int, number: int) -> None:
            async with grpc.aio.insecure_channel(product.addresses["gateway"]) as channel:
                for start in range(first, first + number, 20):
                    await asyncio.gather(*(change(channel, index) for index in range(start, start + 20)))

        async with asyncio.TaskGroup() as group:
            group.create_task(some(0, 500))
            await eventually(lambda: len(acknowledged) > 100, 30.0)
            await product.kill("metadata")
            database_server.stop(signal.SIGQUIT)
        assert len(acknowledged) > 400  # nobody waits for them
        database_server.start()
        await product.start("metadata")
        async with asyncio.TaskGroup() as group:
            group.create_task(some(500, 500))
            await eventually(lambda: len(acknowledged) > 600, 30.0)
            await product.kill("gateway", "metadata")
        await product.start("metadata", "gateway")

        async def everything() -> bool:
            status = (await audited.proof())["chains"]
            return bool(status) and set(acknowledged) <= set(await traces())

        async def traces() -> list[str]:
            connection = await asyncpg.connect(**(database_server.admin | {"database": database}))
            try:
                rows = await connection.fetch("SELECT trace_id FROM audit_events WHERE action LIKE '%StartSimulator'")
            finally:
                await connection.close()
            return [row[0] for row in rows]

        await eventually(everything, 60.0)
        found = await traces()
        assert len(found) == len(set(found))
        assert (await audited.proof())["valid"] is True
