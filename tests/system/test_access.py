"""Who may do what, with the real processes: set-up, users, tokens, roles and scopes, over gRPC and HTTP alike."""

import asyncio
import json
import re
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from openmanager.gateway.v1 import access_pb2, access_pb2_grpc, fleet_pb2, fleet_pb2_grpc, options_pb2
from runtime.errors import carried_error
from tests.client.calling import called
from tests.harness import eventually
from tests.harness.findings import finding, record
from tests.harness.product import Answer, Product

PASSWORD = "correct horse battery"
WEB, DB = "web-01", "db-01"
WITHIN_S = 30.0
"""Only catches what hangs; on a machine of its own a change is known after 0 to 2 s."""


class Manager:
    """A product whose gateway wants accounts, with two servers and an administrator."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.secret = ""

    async def call(
        self, path: str, *, body: Any = None, method: str | None = None, secret: str | None = None
    ) -> Answer:
        shown = self.secret if secret is None else secret
        headers = {"authorization": f"Bearer {shown}"} if shown else {}
        return await self.product.http(path, body=body, method=method, headers=headers)

    async def token(self, role: str, scope: dict[str, Any] | None = None, **more: Any) -> tuple[str, str]:
        """Id and secret of a new token that is known at the gateway."""
        token = {"name": f"a {role}", "role": f"ROLE_{role}", **more} | ({} if scope is None else {"scope": scope})
        made = await self.call("/v1/tokens", body=token)
        assert made.status == 200, made.body
        secret: str = made.json["secret"]
        await eventually(lambda: self.is_known(secret), WITHIN_S)
        return made.json["token"]["id"], secret

    async def is_known(self, secret: str) -> bool:
        return (await self.call("/v1/session", secret=secret)).status == 200

    async def set_up(self) -> None:
        path = self.product.folder / "data" / "metadata" / "setup-token"
        await eventually(path.exists, WITHIN_S)
        assert path.stat().st_mode & 0o077 == 0
        body = {"setupToken": path.read_text().strip(), "name": "Ada", "password": PASSWORD}
        made = await self.call("/v1/users:setUp", body=body, secret="")
        while made.status == 503:  # the gateway was started before metadata, and tries again within 2 s
            await asyncio.sleep(0.1)
            made = await self.call("/v1/users:setUp", body=body, secret="")
        assert made.status == 200, made.body
        self.secret = made.json["tokenSecret"]
        assert not path.exists()
        again = await self.call("/v1/users:setUp", body=body, secret="")
        assert again.status == 401 and "SETUP_TOKEN_INVALID" in again.body.decode()
        await eventually(lambda: self.is_known(self.secret), WITHIN_S)


@pytest.fixture(scope="module")
async def manager(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Manager]:
    async with Product(tmp_path_factory.mktemp("access"), GATEWAY_ACCOUNTS="true") as product:
        await product.start("metadata", "timeseries", "cache", "gateway")
        manager = Manager(product)
        await manager.set_up()
        rows = {
            "metrics": [{"name": "cpu_usage"}],
            "servers": [
                {"serverId": WEB, "environment": "production", "role": "web"},
                {"serverId": DB, "environment": "production", "role": "db"},
            ],
            "rows": [{"serverId": name, "time": time.time()} for name in (WEB, DB)],
            "values": [1.0, 2.0],
        }
        assert (await manager.call("/v1/metrics:write", body=rows)).status == 200

        async def are_shown() -> bool:
            return (await manager.call("/v1/servers")).json.get("totalSize") == 2

        await eventually(are_shown, WITHIN_S)
        yield manager


async def test_nobody_comes_in_without_a_token_that_is_known(manager: Manager) -> None:
    for secret, reason in (("", "TOKEN_REQUIRED"), ("om_" + "x" * 43, "TOKEN_INVALID")):
        refused = await manager.call("/v1/servers", secret=secret)
        assert refused.status == 401 and reason in refused.body.decode()
    assert (await manager.call("/healthz", secret="")).status == 200
    assert (await manager.call("/metrics", secret="")).status == 401


async def test_a_token_that_is_revoked_rotated_or_over_is_no_more(manager: Manager) -> None:
    token_id, secret = await manager.token("VIEWER")
    rotated = await manager.call(f"/v1/tokens/{token_id}:rotate", body={})

    async def is_refused(secret: str) -> bool:
        return not await manager.is_known(secret)

    await eventually(lambda: is_refused(secret), WITHIN_S)
    await eventually(lambda: manager.is_known(rotated.json["secret"]), WITHIN_S)
    assert (await manager.call(f"/v1/tokens/{token_id}", method="DELETE")).json["revokeTime"]
    await eventually(lambda: is_refused(rotated.json["secret"]), WITHIN_S)
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 8))
    _, secret = await manager.token("VIEWER", expireTime=soon)
    await eventually(lambda: is_refused(secret), WITHIN_S)
    assert "TOKEN_EXPIRED" in (await manager.call("/v1/servers", secret=secret)).body.decode()
    assert (await manager.call("/v1/tokens")).json["totalSize"] < len(
        (await manager.call("/v1/tokens?show_ended=true")).json["tokens"]
    )


async def test_a_user_who_is_disabled_or_demoted_takes_his_tokens_along(manager: Manager) -> None:
    body = {"user": {"name": "Grace", "role": "ROLE_OPERATOR"}, "password": PASSWORD}
    assert (await manager.call("/v1/users", body=body)).status == 200
    assert (
        await manager.call("/v1/users", body=body | {"user": {"name": "gRACE", "role": "ROLE_VIEWER"}})
    ).status == 409
    too_much = await manager.call("/v1/tokens", body={"name": "t", "role": "ROLE_ADMIN", "user": "Grace"})
    assert too_much.status == 400 and "token.role" in too_much.body.decode()
    _, secret = await manager.token("OPERATOR", user="grace")
    assert (await manager.call("/v1/session", secret=secret)).json["name"] == "Grace"
    changed = await manager.call("/v1/users/Grace", body={"role": "ROLE_VIEWER"}, method="PATCH")
    assert changed.json["role"] == "ROLE_VIEWER", changed.body

    async def has_role(role: str) -> bool:
        return (await manager.call("/v1/session", secret=secret)).json.get("role") == role

    await eventually(lambda: has_role("ROLE_VIEWER"), WITHIN_S)
    assert (await manager.call("/v1/users/Grace", body={"disabled": True}, method="PATCH")).status == 200

    async def is_out() -> bool:
        return not await manager.is_known(secret)

    await eventually(is_out, WITHIN_S)
    for change in ({"role": "ROLE_VIEWER"}, {"disabled": True}):
        refused = await manager.call("/v1/users/Ada", body=change, method="PATCH")
        assert refused.status == 400 and "LAST_ADMINISTRATOR" in refused.body.decode(), refused.body
    assert (await manager.call("/v1/users/Ada", method="DELETE")).status == 400


async def test_who_has_a_scope_sees_nothing_else(manager: Manager) -> None:
    _, secret = await manager.token("VIEWER", {"serverRoles": ["web"]})

    async def get(path: str) -> Answer:
        return await manager.call(path, secret=secret)

    assert (await get("/v1/session")).json["scope"] == {"environments": [], "serverRoles": ["web"], "serverIds": []}
    listed = await get("/v1/servers")
    assert [server["id"] for server in listed.json["servers"]] == [WEB] and listed.json["totalSize"] == 1
    assert (await get("/v1/fleet/summary")).json["total"] == 1
    assert (await get(f"/v1/servers/{WEB}")).status == 200
    hidden, unknown = await get(f"/v1/servers/{DB}"), await get("/v1/servers/nothing")
    assert hidden.status == 404 and hidden.body == unknown.body.replace(b"nothing", DB.encode())
    window = "metric=cpu_usage&start_time=-1h&end_time=now"
    assert (await get(f"/v1/servers/{WEB}/history?{window}")).json["series"]
    assert (await get(f"/v1/servers/{DB}/history?{window}")).status == 404
    query = {"metrics": ["cpu_usage"], "startTime": "-1h", "endTime": "now"}
    series = (await manager.call("/v1/history:query", body=query, secret=secret)).body.decode()
    assert WEB in series and DB not in series
    assert (await manager.call("/v1/history:query", body=query | {"serverIds": [DB]}, secret=secret)).status == 404
    assert (await get("/v1/metrics")).status == 400
    found = [finding(server_id, 1_790_000_000_000) for server_id in (WEB, DB)]
    record(manager.product.addresses["metadata"], manager.product.secret, *found)
    shown = await get("/v1/anomalies")
    assert [one["serverId"] for one in shown.json["anomalies"]] == [WEB] and shown.json["totalSize"] == 1
    assert [(await get(f"/v1/anomalies/{one.id}")).status for one in found] == [200, 404]
    for path in ("/metrics", "/v1/ai/interactions", "/v1/simulator", "/v1/analytics/report"):
        assert (await get(path)).status == 403, path
    # What happens to others changes no entity tag of his.
    tag = listed.headers["etag"]
    row = {"serverId": DB, "time": time.time()}
    body = {"metrics": [{"name": "cpu_usage"}], "rows": [row], "values": [50.0]}
    assert (await manager.call("/v1/metrics:write", body=body)).status == 200

    async def is_shown() -> bool:
        return (await manager.call(f"/v1/servers/{DB}")).json["metrics"] == {"cpu_usage": 50.0}

    await eventually(is_shown, WITHIN_S)
    assert (await get("/v1/servers")).headers["etag"] == tag
    both = await manager.call("/v1/servers")
    assert both.json["totalSize"] == 2 and both.headers["etag"] != tag


async def test_who_has_a_scope_takes_no_server_out_of_it(manager: Manager) -> None:
    _, secret = await manager.token("ADMIN", {"environments": ["production"], "serverRoles": ["web", "app"]})

    async def update(body: dict[str, str], mask: str = "") -> Answer:
        path = f"/v1/servers/{WEB}{mask and '?update_mask='}{mask}"
        return await manager.call(path, body=body, method="PATCH", secret=secret)

    for refused in (await update({"environment": "staging"}), await update({"role": "db"}), await update({}, "role")):
        assert refused.status == 403 and "OUT_OF_SCOPE" in refused.body.decode(), refused.body
    for role in ("app", "web"):
        changed = await update({"role": role, "location": "rack 7"})
        assert changed.status == 200 and changed.json["environment"] == "production", changed.body
    assert (await update({"environment": "staging", "location": "rack 8"}, "location")).status == 200


async def test_a_watcher_with_a_scope_learns_of_nobody_else(manager: Manager) -> None:
    _, secret = await manager.token("VIEWER", {"serverRoles": ["web"]})
    async with manager.product.channel("gateway") as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
        call = stub.WatchFleet(fleet_pb2.WatchFleetRequest(), metadata=(("authorization", f"Bearer {secret}"),))
        first = await call.read()
        assert [server.id for server in first.servers] == [WEB] and not first.removed
        for role in ("app", "web"):  # out of his sight and back; the other server comes and goes unseen
            for name in (DB, WEB):
                given = role if name == WEB else "db"
                body = {"hostname": f"{name}.{role}", "role": given}
                changed = await manager.call(f"/v1/servers/{name}", body=body, method="PATCH")
                assert changed.status == 200, changed.body
            message = await call.read()
            if role == "app":
                assert [gone.id for gone in message.removed] == [WEB] and not message.servers
            else:
                assert [server.id for server in message.servers] == [WEB] and not message.removed
        call.cancel()


async def test_an_agent_writes_rows_of_its_servers_and_nothing_else(manager: Manager) -> None:
    _, secret = await manager.token("AGENT", {"serverIds": [WEB, "web-02"]})

    async def write(name: str, **server: str) -> Answer:
        row = {"serverId": name, "time": time.time()}
        body: dict[str, Any] = {"metrics": [{"name": "cpu_usage"}], "rows": [row], "values": [3.0]}
        if server:
            body["servers"] = [{"serverId": name, **server}]
        return await manager.call("/v1/metrics:write", body=body, secret=secret)

    assert (await write(WEB)).status == (await write("web-02")).status == 200
    hidden, new = await write(DB), await write("new")
    for refused in (hidden, new, await write(DB, role="web")):
        assert refused.status == 403 and "OUT_OF_SCOPE" in refused.body.decode()
    assert new.body == hidden.body.replace(DB.encode(), b"new") and b"rows[0].server_id" in new.body
    for path in ("/v1/servers", f"/v1/servers/{WEB}", "/metrics", "/v1/tokens"):
        assert (await manager.call(path, secret=secret)).status in {403, 404}, path
    _, moving = await manager.token("AGENT", {"environments": ["production"], "serverRoles": ["web"]})
    row = {"serverId": WEB, "time": time.time()}
    body = {"metrics": [{"name": "cpu_usage"}], "rows": [row], "values": [3.0]}
    for role, status in (("web", 200), ("db", 403)):
        answer = await manager.call(
            "/v1/metrics:write", body=body | {"servers": [{"serverId": WEB, "role": role}]}, secret=moving
        )
        assert answer.status == status, (role, answer.body)


async def test_an_agent_takes_no_server_over_that_is_not_in_the_live_state(manager: Manager) -> None:
    assert (await manager.call("/v1/servers", body={"id": "laid-off", "environment": "staging"})).status == 200
    assert (await manager.call("/v1/servers/laid-off", method="DELETE")).status == 200

    async def write(environment: str) -> Answer:
        _, secret = await manager.token("AGENT", {"environments": [environment]})
        rows = [{"serverId": "laid-off", "time": time.time()}]
        servers = [{"serverId": "laid-off", "environment": environment}]
        body = {"metrics": [{"name": "cpu_usage"}], "rows": rows, "values": [3.0], "servers": servers}
        return await manager.call("/v1/metrics:write", body=body, secret=secret)

    assert "OUT_OF_SCOPE" in (await write("production")).body.decode()
    assert (await write("staging")).status == 200
    assert (await manager.call("/v1/servers/laid-off:undelete", body={})).json["environment"] == "staging"
    assert (await manager.call("/v1/servers/laid-off", method="DELETE")).status == 200


async def test_callers_at_once_are_never_taken_for_one_another(manager: Manager) -> None:
    """Who calls is known to the code that runs for a call: by gRPC on one connection, and by HTTP."""
    secrets = {role: (await manager.token(role))[1] for role in ("VIEWER", "OPERATOR", "AGENT")}
    async with manager.product.channel("gateway") as channel:
        stub = access_pb2_grpc.AccessServiceStub(channel.grpc)

        async def by_grpc(role: str) -> bool:
            shown = (("authorization", f"Bearer {secrets[role]}"),)
            answer = await stub.GetCaller(access_pb2.GetCallerRequest(), metadata=shown)
            return bool(options_pb2.Role.Name(answer.role) == f"ROLE_{role}")

        async def by_http(role: str) -> bool:
            return bool((await manager.call("/v1/session", secret=secrets[role])).json["role"] == f"ROLE_{role}")

        async def nobody() -> bool:
            try:
                await stub.GetCaller(access_pb2.GetCallerRequest())
            except grpc.aio.AioRpcError as error:
                return error.code() == grpc.StatusCode.UNAUTHENTICATED
            return False

        for _ in range(10):
            calls = [call(role) for role in secrets for call in (by_grpc, by_grpc, by_grpc, by_http)]
            assert all(await asyncio.gather(*calls, nobody(), nobody()))


async def test_over_grpc_the_same_rules_hold(manager: Manager) -> None:
    _, secret = await manager.token("VIEWER", {"serverRoles": ["web"]})
    async with manager.product.channel("gateway") as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
        shown = (("authorization", f"Bearer {secret}"),)
        assert (await stub.GetServer(fleet_pb2.GetServerRequest(id=WEB), metadata=shown)).server.id == WEB
        for request, metadata, reason in (
            (stub.GetServer(fleet_pb2.GetServerRequest(id=DB), metadata=shown), shown, "SERVER_NOT_FOUND"),
            (stub.DeleteServer(fleet_pb2.DeleteServerRequest(id=WEB), metadata=shown), shown, "ROLE_REQUIRED"),
            (stub.GetServer(fleet_pb2.GetServerRequest(id=WEB)), (), "TOKEN_REQUIRED"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await request
            error = carried_error(caught.value)
            assert error is not None and error.reason == reason, metadata


async def test_who_is_known_stays_known_without_the_metadata_service(manager: Manager) -> None:
    _, secret = await manager.token("VIEWER")
    await manager.product.kill("metadata")
    try:
        assert await manager.is_known(secret)
        assert (await manager.call("/v1/servers", secret="om_other")).status == 401
    finally:
        await manager.product.start("metadata")

    async def is_back() -> bool:  # the gateway tries again within 2 s
        return (await manager.call("/v1/users")).status == 200

    await eventually(is_back, WITHIN_S)
    assert await manager.is_known(secret)


async def test_the_command_makes_tokens_and_ends_them(manager: Manager) -> None:
    async def command(*words: str) -> "subprocess.CompletedProcess[str]":
        environ = {"OPENMANAGER_TOKEN": manager.secret}
        return await asyncio.to_thread(called, manager.product.addresses["gateway"], *words, environ=environ)

    made = await command("token", "create", "rack 7", "--role", "viewer", "--server", WEB, "--expires", "+90d")
    assert made.returncode == 0 and made.stdout.startswith("om_") and made.stdout.count("\n") == 1, made.stderr
    secret = made.stdout.strip()
    await eventually(lambda: manager.is_known(secret), WITHIN_S)
    listed = json.loads((await command("token", "list", "--output", "json")).stdout)
    (token,) = [one for one in listed if one["name"] == "rack 7"]
    assert token["scope"]["serverIds"] == [WEB] and secret not in json.dumps(listed)
    shown = (await command("token", "list")).stdout
    assert re.search(rf"{token['id']} +rack 7 +viewer +{WEB} ", shown), shown
    rotated = await command("token", "rotate", token["id"])
    assert rotated.returncode == 0 and rotated.stdout.startswith("om_") and rotated.stdout != made.stdout
    assert (await command("token", "revoke", token["id"])).returncode == 0

    async def is_out() -> bool:
        return not await manager.is_known(rotated.stdout.strip())

    await eventually(is_out, WITHIN_S)
    unknown = await command("token", "revoke", "7d0f3c52-8f0e-4f64-9d0b-3f5c1a0c2b11")
    assert unknown.returncode == 4 and "TOKEN_NOT_FOUND" in unknown.stderr


async def test_the_command_adds_people_and_changes_what_they_may(manager: Manager) -> None:
    async def command(*words: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
        environ = {"OPENMANAGER_TOKEN": manager.secret}
        address = manager.product.addresses["gateway"]
        return await asyncio.to_thread(called, address, *words, environ=environ, stdin=typed)

    async def comes_in(password: str) -> bool:
        said = {"name": "Barbara", "password": password}
        return (await manager.call("/v1/session", body=said, secret="")).status == 200

    made = await command("user", "create", "Barbara", "--role", "operator", typed=f"{PASSWORD}\n")
    assert made.returncode == 0 and "operator, all servers" in made.stderr and not made.stdout, made.stderr
    assert await comes_in(PASSWORD)
    short = await command("user", "password", "Barbara", typed="short\n")
    assert short.returncode == 2 and "12 characters" in short.stderr, short.stderr
    assert (await command("user", "password", "Barbara", typed="another password\n")).returncode == 0
    assert await comes_in("another password") and not await comes_in(PASSWORD)
    changed = await command("user", "change", "Barbara", "--role", "viewer", "--server", WEB, "--disable")
    assert changed.returncode == 0 and f"viewer, {WEB}, disabled" in changed.stderr, changed.stderr
    shown = (await command("user", "list")).stdout
    assert re.search(rf"Barbara +viewer +{WEB} .* disabled", shown), shown
    changed = await command("user", "change", "Barbara", "--all-servers", "--enable")
    listed = json.loads((await command("user", "list", "--output", "json")).stdout)
    (user,) = [one for one in listed if one["name"] == "Barbara"]
    assert (user["role"], user["disabled"], user.get("scope")) == ("ROLE_VIEWER", False, None)
    for words, said in (
        (("user", "change", "Barbara"), "nothing to change"),
        (("user", "change", "Barbara", "--all-servers", "--server", WEB), "either"),
    ):
        refused = await command(*words)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    assert (await command("user", "delete", "Barbara")).returncode == 0
    gone = await command("user", "delete", "Barbara")
    assert gone.returncode == 4 and "USER_NOT_FOUND" in gone.stderr


def test_roles_are_what_they_are_called() -> None:
    assert [options_pb2.Role.Name(number) for number in range(5)] == [
        "ROLE_UNSPECIFIED", "ROLE_VIEWER", "ROLE_OPERATOR", "ROLE_ADMIN", "ROLE_AGENT",
    ]  # fmt: skip
    assert access_pb2.Token().role == options_pb2.ROLE_UNSPECIFIED
