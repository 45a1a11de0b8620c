"""No secret is where people look: logs, errors, metrics, the status, the audit log, or any file but its own."""

import asyncio
import json
from pathlib import Path

import grpc

from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from tests.harness import eventually
from tests.harness.product import Answer, Product

PASSWORD, OTHER = "a-Password-nobody-knows", "an0ther-Password-of-hers"
TOKEN = "the-token-of-the-gateway-0123456789"
GUESS = "om_a-guess-that-is-wrong-but-may-be-nearly-right"


async def test_no_secret_is_where_people_look(tmp_path: Path) -> None:
    said: list[bytes] = []
    async with Product(tmp_path, GATEWAY_TOKEN=TOKEN, LOG_LEVEL="DEBUG") as product:
        await product.start("metadata", "timeseries", "cache", "gateway")
        setup_file = product.folder / "data" / "metadata" / "setup-token"
        await eventually(setup_file.exists)
        setup = setup_file.read_text().strip()

        async def call(path: str, body: object = None, secret: str = TOKEN, method: str | None = None) -> Answer:
            headers = {"authorization": f"Bearer {secret}"} if secret else {}
            answer = await product.http(path, body=body, method=method, headers=headers)
            said.append(json.dumps(dict(answer.headers)).encode())
            return answer

        async def made() -> Answer | None:
            answer = await call("/v1/users:setUp", {"setupToken": setup, "name": "Ada", "password": PASSWORD}, "")
            return answer if answer.status != 503 else None  # the gateway may not have found metadata yet

        first = await eventually(made)
        assert first.status == 200, first.body
        created = await call("/v1/tokens", {"name": "t", "role": "ROLE_VIEWER"})
        rotated = await call(f"/v1/tokens/{created.json['token']['id']}:rotate", {})
        secrets = {TOKEN, setup, PASSWORD, OTHER, GUESS, product.secret}
        secrets |= {first.json["tokenSecret"], created.json["secret"], rotated.json["secret"]}
        said += [(await call("/v1/users:setUp", {"setupToken": setup, "name": "Eve", "password": OTHER}, "")).body]
        for path, body in (
            ("/v1/users", {"user": {"name": "Eve", "role": "ROLE_VIEWER"}, "password": OTHER}),
            ("/v1/users", {"user": {"name": "", "role": 9}, "password": OTHER}),
            ("/v1/users/Eve:setPassword", {"password": OTHER}),
            ("/v1/users/Nobody:setPassword", {"password": OTHER}),
            ("/v1/tokens", {"name": GUESS[:3], "role": "ROLE_NOTHING"}),
        ):
            said.append((await call(path, body)).body)
        for path in ("/v1/servers", "/v1/users", "/v1/tokens?show_ended=true", "/v1/audit", "/v1/storage/status"):
            said.append((await call(path)).body)
            said.append((await call(path, secret=GUESS)).body)
        for path in ("/v1/audit:export", "/metrics", "/readyz", "/openapi.json", f"/{GUESS[:8]}"):
            said.append((await call(path)).body)
        async with product.channel("gateway") as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
            for secret in (GUESS, rotated.json["secret"]):
                try:
                    shown = (("authorization", f"Bearer {secret}"),)
                    await stub.DeleteServer(fleet_pb2.DeleteServerRequest(id="x"), metadata=shown)
                except grpc.aio.AioRpcError as error:
                    said.append(f"{error.details()} {error.trailing_metadata()}".encode())
        await product.kill("metadata")  # what is said of a peer that is away
        said.append((await call("/v1/tokens", {"name": "t", "role": "ROLE_VIEWER"})).body)
        await product.start("metadata")
    found = [(name, text) for name, text in await asyncio.to_thread(everything, tmp_path)]
    for secret in secrets:
        raw = secret.encode()
        assert [text for text in said if raw in text] == []
        own = {"service-secret", "setup-token"}
        assert [name for name, text in found if raw in text and Path(name).name not in own] == []


def everything(folder: Path) -> list[tuple[str, bytes]]:
    """Every file of the installation: logs, databases, journals."""
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
