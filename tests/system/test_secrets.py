"""No secret is where people look: logs, errors, traces, metrics, the status, the audit log, or any file but its own."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from tests.harness import eventually
from tests.harness.collector import Collector
from tests.harness.postgres import PostgresServer, debian_postgres
from tests.harness.product import Answer, Product
from tests.harness.redis import redis_server

PASSWORD, OTHER = "a-Password-nobody-knows", "an0ther-Password-of-hers"
OF_REDIS = "the-password-of-redis-0123456789"
TOKEN = "the-token-of-the-gateway-0123456789"
GUESS = "om_a-guess-that-is-wrong-but-may-be-nearly-right"
ASKED, ANSWERED = "why-does-Grace-not-get-her-pay-slip", "because-she-left-last-week"
REFUSED = "what-the-database-will-not-take"
"""Words to an AI: in the database, and in no log, trace or metric."""
OWN_FILES = {"service-secret", "setup-token"}
PROCESSES = ("metadata", "timeseries", "cache", "gateway")
TRACED = {
    ("metadata", "INSERT"),
    ("metadata", "/openmanager.gateway.v1.AiInteractionService/RecordInteraction"),
    ("cache", "/openmanager.cache.v1.CacheService/UpdateServers"),
    ("timeseries", "/openmanager.timeseries.v1.TimeSeriesService/Append"),
    ("gateway", "POST /v1/users:setUp"),
    ("gateway", "POST /v1/users"),
    ("gateway", "POST /v1/tokens/{id}:rotate"),
    ("gateway", "POST /v1/session"),
    ("gateway", "POST /v1/ai/interactions"),
    ("gateway", "/openmanager.gateway.v1.FleetService/DeleteServer"),
}
"""Spans of calls that carried secrets: (process, name)."""


@dataclass(kw_only=True)
class Watched:
    """A product, what it answered, and the secrets that it was told or gave.

    Attributes:
        said: answers in which no secret may be.
        secrets: that may be nowhere but where they belong.
        texts: that may be in answers and databases, and nowhere else.
    """

    product: Product
    said: list[bytes] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=lambda: {ASKED, ANSWERED, REFUSED})

    async def call(self, path: str, body: object = None, secret: str = TOKEN, method: str | None = None) -> Answer:
        """A call whose headers may hold no secret."""
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        answer = await self.product.http(path, body=body, method=method, headers=headers)
        self.said.append(json.dumps(dict(answer.headers)).encode())
        return answer

    async def ask(self, path: str, body: object = None, secret: str = TOKEN) -> None:
        """One whose answer may hold none either."""
        self.said.append((await self.call(path, body, secret)).body)

    async def delete_over_grpc(self, secret: str) -> None:
        async with self.product.channel("gateway") as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
            try:
                shown = (("authorization", f"Bearer {secret}"),)
                await stub.DeleteServer(fleet_pb2.DeleteServerRequest(id="x"), metadata=shown)
            except grpc.aio.AioRpcError as error:
                self.said.append(f"{error.details()} {error.trailing_metadata()}".encode())


@asynccontextmanager
async def watched(folder: Path, postgres: PostgresServer, collector: Collector) -> AsyncIterator[Watched]:
    """A product with its stores behind passwords, that logs and traces all it can."""
    database = (await postgres.fresh_database()).address.rpartition("/")[2]
    async with redis_server() as redis:
        async with redis.client() as client:
            await client.config_set("requirepass", OF_REDIS)
        stores = {
            "DATABASE_URL": postgres.url(database),
            "REDIS_URL": redis.url.replace("redis://", f"redis://:{OF_REDIS}@"),
        }
        settings = stores | collector.environ | {"GATEWAY_TOKEN": TOKEN, "LOG_LEVEL": "DEBUG"}
        async with Product(folder, **settings) as product:
            await product.start(*PROCESSES)
            made = Watched(product=product)
            made.secrets |= {TOKEN, PASSWORD, OTHER, GUESS, OF_REDIS, postgres.password, product.secret}
            await postgres.execute(f"ALTER TABLE ai_interactions ADD CHECK (query <> '{REFUSED}')", database=database)
            yield made


async def users_and_tokens(w: Watched) -> None:
    setup_file = w.product.folder / "data" / "metadata" / "setup-token"
    await eventually(setup_file.exists, within_s=30)
    setup = setup_file.read_text().strip()

    async def made() -> Answer | None:
        answer = await w.call("/v1/users:setUp", {"setupToken": setup, "name": "Ada", "password": PASSWORD}, "")
        return answer if answer.status != 503 else None  # the gateway may not have found metadata yet

    first = await eventually(made, within_s=30)
    assert first.status == 200, first.body
    created = await w.call("/v1/tokens", {"name": "t", "role": "ROLE_VIEWER"})
    rotated = await w.call(f"/v1/tokens/{created.json['token']['id']}:rotate", {})
    w.secrets |= {setup, first.json["tokenSecret"], created.json["secret"], rotated.json["secret"]}
    await w.ask("/v1/users:setUp", {"setupToken": setup, "name": "Eve", "password": OTHER}, "")
    for path, body in (
        ("/v1/users", {"user": {"name": "Eve", "role": "ROLE_VIEWER"}, "password": OTHER}),
        ("/v1/users", {"user": {"name": "Eve", "role": "ROLE_VIEWER"}, "password": OTHER}),
        ("/v1/users", {"user": {"name": "", "role": 9}, "password": OTHER}),
        ("/v1/users/Eve:setPassword", {"password": OTHER}),
        ("/v1/users/Nobody:setPassword", {"password": OTHER}),
        ("/v1/tokens", {"name": GUESS[:3], "role": "ROLE_NOTHING"}),
    ):
        await w.ask(path, body)
    for secret in (GUESS, rotated.json["secret"]):
        await w.delete_over_grpc(secret)
        await w.ask(f"/v1/servers?token={secret}")
        await w.ask(f"/v1/servers?access_token={secret}", secret="")
        await w.ask(f"/v1/servers:watch?authorization=Bearer%20{secret}", secret=secret)
        await w.ask("/v1/servers", secret=secret)


async def sessions(w: Watched) -> None:
    """What a cookie carries is a secret as any; the header that sets it is the one place where it may be."""
    asked = {"name": "Eve", "password": OTHER}
    opened = await w.product.http("/v1/session", body=asked)
    assert opened.status == 200, opened.body
    cookie = next(value for name, value in opened.headers.items() if name.lower() == "set-cookie").partition(";")[0]
    w.secrets.add(cookie.partition("=")[2])
    w.said.append(opened.body)
    shown = {"cookie": cookie}
    for path, method, headers in (
        ("/v1/servers", "GET", shown),
        ("/v1/session", "GET", shown),
        ("/v1/servers/s-1", "DELETE", shown),
        ("/v1/servers/s-1", "DELETE", shown | {"x-csrf-token": opened.json["csrfToken"]}),
        ("/v1/servers", "GET", shown | {"authorization": f"Bearer {GUESS}"}),
        ("/v1/session", "DELETE", shown),
        ("/v1/servers", "GET", shown),
    ):
        answer = await w.product.http(path, method=method, headers=headers)
        w.said += [answer.body, json.dumps(dict(answer.headers)).encode()]
    w.said.append((await w.product.http("/v1/session", body=asked | {"password": PASSWORD})).body)


async def words_to_an_ai(w: Watched) -> None:
    for query in (ASKED, REFUSED):
        body = {"query": query, "response": ANSWERED, "sessionId": "s"}
        recorded = await w.call("/v1/ai/interactions", body)
        assert recorded.status == 200, recorded.body
    log = w.product.log("metadata")
    await eventually(lambda: b"PostgreSQL refused" in log.read_bytes(), within_s=30)
    for path, body in (
        (f"/v1/ai/interactions:search?query={ASKED}", None),
        (f"/v1/ai/interactions?query={ASKED}", None),  # no such parameter
        (f"/v1/ai/interactions/{recorded.json['id']}:rate", {"rating": 3, "comment": ASKED}),
        (f"/v1/ai/interactions/{recorded.json['id']}:correct", {"correction": ANSWERED}),
        ("/v1/ai/interactions", {"query": ASKED, "response": ANSWERED, "confidence": 7}),
    ):
        await w.call(path, body)


async def what_people_look_at(w: Watched) -> None:
    for path in ("/v1/servers", "/v1/users", "/v1/tokens?show_ended=true", "/v1/audit", "/v1/storage/status"):
        await w.ask(path)
        await w.ask(path, secret=GUESS)
    for path in ("/v1/audit:export", "/metrics", "/readyz", "/openapi.json", f"/{GUESS[:8]}"):
        await w.ask(path)
    await w.ask("/v1/servers", {"id": "s-1", "hostname": "one"})
    await w.ask("/v1/metrics:write", {"metrics": [{"name": "m"}], "rows": [{"serverId": "s-1"}], "values": [1]})


async def test_no_secret_is_where_people_look(tmp_path: Path) -> None:
    with debian_postgres() as postgres:
        async with Collector() as collector:
            async with watched(tmp_path, postgres, collector) as w:
                await users_and_tokens(w)
                await sessions(w)
                await words_to_an_ai(w)
                await what_people_look_at(w)
                status = [(await w.call(path)).body for path in ("/v1/storage/status", "/metrics")]
                await w.product.kill("metadata")  # what is said of a peer that is away
                await w.ask("/v1/tokens", {"name": "t", "role": "ROLE_VIEWER"})
                await w.product.start("metadata")
            spans = {(name.removeprefix("openmanager-"), span.name) for name, span in collector.spans()}
        assert spans >= TRACED, spans
        assert collector.received["metrics"]
    files = await asyncio.to_thread(everything, tmp_path)
    sent = [raw for kind in collector.received.values() for raw in kind]
    for secret in w.secrets:
        raw = secret.encode()
        assert [text for text in w.said if raw in text] == []
        assert [shown(raw, text) for text in sent if raw in text] == []
        assert [name for name, text in files if raw in text and Path(name).name not in OWN_FILES] == []
    for words in w.texts:
        raw = words.encode()
        assert [shown(raw, text) for text in (*sent, *status) if raw in text] == []
        assert [(name, shown(raw, text)) for name, text in files if name.endswith(".log") and raw in text] == []


def shown(raw: bytes, text: bytes) -> bytes:
    """What is around a text that should not be there."""
    at = text.index(raw)
    return text[max(0, at - 120) : at + 200]


def everything(folder: Path) -> list[tuple[str, bytes]]:
    """Every file of the installation: logs, databases, journals."""
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
