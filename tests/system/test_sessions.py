"""People who log in, with the real processes: the cookie, what it may do, what ends it, what is written down of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from http.cookies import Morsel, SimpleCookie
from typing import Any

import grpc
import pytest

from openmanager.gateway.v1 import (
    access_pb2,
    access_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    ingest_pb2,
    ingest_pb2_grpc,
)
from runtime.errors import carried_error
from tests.harness import eventually
from tests.harness.product import Answer, Product
from tests.system.test_access import PASSWORD, WITHIN_S, Manager

COOKIE = "openmanager-session"


@pytest.fixture(scope="module")
async def manager(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Manager]:
    async with Product(tmp_path_factory.mktemp("sessions"), GATEWAY_ACCOUNTS="true") as product:
        await product.start("metadata", "timeseries", "cache", "gateway")
        manager = Manager(product)
        await manager.set_up()
        for name, role, more in (("Grace", "VIEWER", {"scope": {"serverIds": ["web-01"]}}), ("Alan", "OPERATOR", {})):
            user = {"name": name, "role": f"ROLE_{role}", **more}
            made = await manager.call("/v1/users", body={"user": user, "password": PASSWORD})
            assert made.status == 200, made.body
        yield manager


class Browser:
    """Keeps a cookie, as browsers do, and the token that changes need."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self.cookie: Morsel[str] | None = None
        self.csrf = ""

    async def log_in(self, name: str, password: str = PASSWORD, **headers: str) -> Answer:
        answer = await self.ask("/v1/session", {"name": name, "password": password}, **headers)
        self.csrf = answer.json.get("csrfToken", "") if answer.status == 200 else self.csrf
        return answer

    async def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie is not None and self.cookie.value:
            sent["cookie"] = f"{COOKIE}={self.cookie.value}"
        answer = await self._product.http(path, body=body, method=method, headers=sent)
        for name, value in answer.headers.items():
            if name.lower() == "set-cookie":
                self.cookie = SimpleCookie(value)[COOKIE]
        return answer

    async def is_in(self) -> bool:
        return (await self.ask("/v1/session")).status == 200


async def test_who_logs_in_is_himself_and_no_more_until_he_logs_out(manager: Manager) -> None:
    browser = Browser(manager.product)
    assert (await browser.ask("/v1/servers")).status == 401
    answer = await browser.log_in("grace")
    assert answer.status == 200, answer.body
    assert (answer.json["name"], answer.json["role"]) == ("Grace", "ROLE_VIEWER")
    assert answer.json["scope"]["serverIds"] == ["web-01"]
    cookie = browser.cookie
    assert cookie is not None and cookie["httponly"] and cookie["samesite"] == "Strict" and cookie["path"] == "/"
    assert 0 < int(cookie["max-age"]) <= 12 * 3_600 and cookie.value not in answer.body.decode()
    assert (await browser.ask("/v1/servers")).status == 200  # at once: the log-in waits until it is known
    known = (await browser.ask("/v1/session")).json
    assert (known["name"], known["csrfToken"]) == ("Grace", browser.csrf)
    assert (await browser.ask("/v1/users")).status == 403
    browser_2 = Browser(manager.product)
    browser_2.cookie = cookie
    assert (await browser.ask("/v1/session", method="DELETE")).status == 200
    assert browser.cookie is not None and browser.cookie.value == "" and browser.cookie["max-age"] == "0"
    ended = await browser_2.ask("/v1/servers")  # whoever kept the cookie
    assert ended.status == 401 and "SESSION_ENDED" in ended.body.decode()
    assert (await browser_2.ask("/v1/session", method="DELETE")).status == 200


async def test_a_change_needs_what_only_our_page_knows(manager: Manager) -> None:
    browser, other = Browser(manager.product), Browser(manager.product)
    assert (await browser.log_in("Ada")).status == (await other.log_in("Alan")).status == 200
    body = {"id": "web-77", "hostname": "web-77"}
    for shown in ({}, {"x_csrf_token": other.csrf}, {"x_csrf_token": ""}):
        refused = await browser.ask("/v1/servers", body, **shown)
        assert refused.status == 403 and "CSRF_TOKEN_INVALID" in refused.body.decode(), refused.body
        assert "x-csrf-token" in refused.body.decode()
    for site in ("cross-site", "same-site"):
        refused = await browser.ask("/v1/servers", body, x_csrf_token=browser.csrf, sec_fetch_site=site)
        assert refused.status == 403 and "ORIGIN_FOREIGN" in refused.body.decode()
        refused = await Browser(manager.product).log_in("Ada", sec_fetch_site=site)  # into somebody else's account
        assert refused.status == 403 and "set-cookie" not in {name.lower() for name in refused.headers}
    assert (await browser.ask("/v1/servers/web-77")).status == 404
    made = await browser.ask("/v1/servers", body, x_csrf_token=browser.csrf, sec_fetch_site="same-origin")
    assert made.status == 200, made.body
    gone = await browser.ask("/v1/servers/web-77", method="DELETE", x_csrf_token=browser.csrf)
    assert gone.status == 200, gone.body


async def test_a_cookie_is_no_token_and_a_token_no_cookie(manager: Manager) -> None:
    browser = Browser(manager.product)
    await browser.log_in("Ada")
    assert browser.cookie is not None
    as_token = await manager.call("/v1/servers", secret=browser.cookie.value)
    assert as_token.status == 401 and "TOKEN_INVALID" in as_token.body.decode()
    _, secret = await manager.token("ADMIN")
    as_cookie = await manager.product.http("/v1/servers", headers={"cookie": f"{COOKIE}={secret}"})
    assert as_cookie.status == 401 and "SESSION_ENDED" in as_cookie.body.decode()
    assert secret not in as_cookie.body.decode()
    async with manager.product.channel("gateway") as channel:
        stub = access_pb2_grpc.AccessServiceStub(channel.grpc)
        for call in (
            stub.LogIn(access_pb2.LogInRequest(name="Ada", password=PASSWORD)),
            stub.LogOut(access_pb2.LogOutRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = carried_error(caught.value)
            assert error is not None and error.reason == "HTTP_ONLY"
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # the cookie is HTTP's
            await stub.GetCaller(
                access_pb2.GetCallerRequest(), metadata=(("cookie", f"{COOKIE}={browser.cookie.value}"),)
            )
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.full
async def test_what_a_token_has_begun_ends_with_it(manager: Manager) -> None:
    made = [await manager.token("OPERATOR") for _ in range(2)]
    user = {"user": {"name": "Emmy", "role": "ROLE_OPERATOR"}, "password": PASSWORD}
    assert (await manager.call("/v1/users", body=user)).status == 200
    demoted = (await manager.token("OPERATOR", user="Emmy"))[1]
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 8))  # the last, so that it is not over before
    over = (await manager.token("OPERATOR", expireTime=soon))[1]
    shown = {"over": over, "revoked": made[0][1], "rotated": made[1][1], "demoted": demoted, "stays": manager.secret}
    async with manager.product.channel("gateway") as channel:
        fleet, ingest = fleet_pb2_grpc.FleetServiceStub(channel.grpc), ingest_pb2_grpc.IngestServiceStub(channel.grpc)
        watches, writes = {}, {}
        for name, secret in shown.items():
            metadata = (("authorization", f"Bearer {secret}"),)
            watches[name] = fleet.WatchFleet(fleet_pb2.WatchFleetRequest(), metadata=metadata)
            writes[name] = ingest.WriteMetrics(metadata=metadata)
            assert (await watches[name].read()).snapshot
            await writes[name].write(ingest_pb2.WriteMetricsRequest())
            assert await writes[name].read() is not grpc.aio.EOF
        assert (await manager.call(f"/v1/tokens/{made[0][0]}", method="DELETE")).status == 200
        assert (await manager.call(f"/v1/tokens/{made[1][0]}:rotate", body={})).status == 200
        assert (await manager.call("/v1/users/Emmy", body={"role": "ROLE_VIEWER"}, method="PATCH")).status == 200
        for name, reason in (
            ("revoked", "TOKEN_INVALID"), ("rotated", "TOKEN_INVALID"), ("demoted", "ACCESS_CHANGED"),
            ("over", "TOKEN_EXPIRED"),
        ):  # fmt: skip
            for call in (watches[name], writes[name]):
                async with asyncio.timeout(WITHIN_S):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        while await call.read() is not grpc.aio.EOF:
                            pass
                error = carried_error(caught.value)
                assert error is not None and error.reason == reason, (name, error)
        await writes["stays"].write(ingest_pb2.WriteMetricsRequest())
        assert await writes["stays"].read() is not grpc.aio.EOF and not watches["stays"].done()


@pytest.mark.full
async def test_what_ends_a_session_ends_it_everywhere(manager: Manager) -> None:
    async def is_out() -> bool:
        return not await browser.is_in()

    for path, body, method in (
        ("/v1/users/Alan:setPassword", {"password": "another password"}, "POST"),
        ("/v1/users/Alan", {"disabled": True}, "PATCH"),
        ("/v1/users/Alan", None, "DELETE"),
    ):
        enabled = {"user": {"disabled": False}, "updateMask": "disabled"}
        await manager.call("/v1/users/Alan?update_mask=disabled", body=enabled["user"], method="PATCH")
        await manager.call("/v1/users/Alan:setPassword", body={"password": PASSWORD})
        browser = Browser(manager.product)
        assert (await browser.log_in("Alan")).status == 200
        assert await browser.is_in()
        assert (await manager.call(path, body=body, method=method)).status == 200
        await eventually(is_out, WITHIN_S)
        refused = await Browser(manager.product).log_in("Alan")
        assert refused.status == 401 and "LOGIN_FAILED" in refused.body.decode()


async def test_a_session_outlives_processes_and_the_outage_of_metadata(manager: Manager) -> None:
    browser = Browser(manager.product)
    assert (await browser.log_in("Grace")).status == 200
    await manager.product.kill("gateway")
    await manager.product.start("gateway")
    await eventually(browser.is_in, WITHIN_S)
    await manager.product.kill("metadata")
    try:
        assert await browser.is_in()
        refused = await Browser(manager.product).log_in("Grace")
        assert refused.status == 503, refused.body
    finally:
        await manager.product.start("metadata")

    async def comes_in() -> bool:
        return (await Browser(manager.product).log_in("Grace")).status == 200

    await eventually(comes_in, WITHIN_S)
    assert await browser.is_in()


async def test_log_ins_are_written_down_with_who_and_from_where(manager: Manager) -> None:
    browser = Browser(manager.product)
    await browser.log_in("Grace")
    for cookie in ("", "openmanager-session=om-session_nobody") * 5:  # who is nobody leaves no event for each time
        gone = await manager.product.http("/v1/session", method="DELETE", headers={"cookie": cookie})
        assert gone.status == 200
    await browser.ask("/v1/session", method="DELETE")
    assert (await browser.log_in("Grace", "not the password")).status == 401

    async def events(action: str, actor: str = "Grace") -> list[dict[str, Any]]:
        found = (await manager.call(f"/v1/audit?action=openmanager.gateway.v1.AccessService.{action}")).json
        return [event for event in found.get("events", []) if event.get("actor") == actor]

    for action in ("LogIn", "LogOut"):
        (event, *_) = await eventually(lambda action=action: events(action), WITHIN_S)
        assert (event["target"], event["authentication"], event["address"]) == ("Grace", "session", "127.0.0.1")
        assert event["code"] == "OK"
        assert PASSWORD not in json.dumps(event)
    assert len(await events("LogOut", "anybody")) < 5


async def test_changes_of_users_and_tokens_tell_what_was_before(manager: Manager) -> None:
    user = {"name": "Edsger", "role": "ROLE_VIEWER"}
    assert (await manager.call("/v1/users", body={"user": user, "password": PASSWORD})).status == 200
    assert (await manager.call("/v1/users/Edsger", body={"role": "ROLE_OPERATOR"}, method="PATCH")).status == 200
    assert (await manager.call("/v1/users/Edsger", method="DELETE")).status == 200
    token_id, secret = await manager.token("VIEWER")
    assert (await manager.call(f"/v1/tokens/{token_id}", method="DELETE")).status == 200

    async def event(action: str, target: str) -> dict[str, Any]:
        found = (await manager.call(f"/v1/audit?action=openmanager.gateway.v1.AccessService.{action}")).json
        return next((event for event in found.get("events", []) if event["target"] == target), {})

    told = [("UpdateUser", "Edsger"), ("DeleteUser", "Edsger"), ("RevokeToken", token_id)]
    updated, deleted, revoked = [await eventually(lambda each=each: event(*each), WITHIN_S) for each in told]
    roles = [json.loads(told)["role"] for told in (updated["before"], updated["after"], deleted["before"])]
    assert roles == ["ROLE_VIEWER", "ROLE_OPERATOR", "ROLE_OPERATOR"]
    assert "revokeTime" not in revoked["before"] and "revokeTime" in revoked["after"]
    assert secret not in json.dumps(revoked)


async def test_guessing_is_slowed_down_and_says_when_to_try_again(manager: Manager) -> None:
    browser = Browser(manager.product)
    told = [(await browser.log_in("Mallory", f"guess number {n}")).status for n in range(11)]
    assert told == [401] * 10 + [429]
    refused = await browser.log_in("Mallory")
    assert refused.status == 429 and "LOGIN_RATE_LIMITED" in refused.body.decode()
    waits = next(int(value) for name, value in refused.headers.items() if name.lower() == "retry-after")
    assert 0 < waits <= 60
    assert (await browser.log_in("Grace")).status == 200  # another account, from the same address
