"""Log-in with a real OpenID provider through the real gateway and metadata: who comes in, as whom, and who does not."""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from tests.harness import eventually
from tests.harness.openid_provider import CLIENT, SECRET, USER, OpenIdProvider, openid_provider
from tests.harness.product import Product
from tests.system.test_access import PASSWORD, WITHIN_S, Manager

OTHER = "grace"


@dataclass
class Here:
    manager: Manager
    provider: OpenIdProvider

    @asynccontextmanager
    async def browser(self) -> AsyncIterator[httpx2.AsyncClient]:
        async with httpx2.AsyncClient(base_url=f"http://{self.manager.product.http_address}", trust_env=False) as made:
            yield made

    async def log_in(self, browser: httpx2.AsyncClient) -> str:
        """Where the browser ends up."""
        sent = await browser.get("/auth/openid/login")
        assert sent.status_code == 302 and sent.headers["location"].startswith(self.provider.url)
        back = await self.provider.log_in(sent.headers["location"])
        answer = await browser.get(str(back))
        assert answer.status_code == 303
        return answer.headers["location"]

    async def events(self, **wanted: str) -> list[dict[str, Any]]:
        path = "/v1/audit?action=openmanager.gateway.v1.AccessService.LogIn"
        found = (await self.manager.call(path)).json.get("events", [])
        return [event for event in found if wanted.items() <= event.items()]


@pytest.fixture(scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Here]:
    async with Product(tmp_path_factory.mktemp("openid"), GATEWAY_ACCOUNTS="true") as product:
        redirect = f"http://{product.http_address}/auth/openid/callback"
        async with openid_provider(redirect) as provider:
            product.environ |= {
                "OIDC_ISSUER": provider.issuer,
                "OIDC_CLIENT_ID": CLIENT,
                "OIDC_CLIENT_SECRET": SECRET,
                "OIDC_REDIRECT_URL": redirect,
                "OIDC_NAME_CLAIM": "nickname",
                "OIDC_ROLE_CLAIM": "groups",
                "OIDC_ROLES": "admins=OPERATOR,staff=VIEWER",
            }
            await product.start("metadata", "timeseries", "cache", "gateway")
            manager = Manager(product)
            await manager.set_up()
            yield Here(manager, provider)


async def test_a_user_with_a_password_is_taken_over_by_nobody(here: Here) -> None:
    assert "Ada".lower() == USER  # as the administrator of this installation is called, who has a password
    async with here.browser() as browser:
        assert await here.log_in(browser) == "/?login_error=IDENTITY_UNKNOWN"
        assert (await browser.get("/v1/session")).status_code == 401


async def test_who_the_provider_gives_a_role_comes_in_and_is_written_down(here: Here) -> None:
    await here.provider.change_user(nickname=OTHER)
    async with here.browser() as browser:
        assert await here.log_in(browser) == "/"
        known = (await browser.get("/v1/session")).json()
        assert (known["name"], known["role"]) == (OTHER, "ROLE_OPERATOR") and known["csrfToken"]
        shell = await browser.get("/", headers={"sec-fetch-site": "cross-site"})  # where the redirect ends
        assert shell.status_code == 200
        assert (await browser.get("/v1/users")).status_code == 403
        body = {"id": "web-1"}
        assert (await browser.post("/v1/servers", json=body)).json()["details"][0]["reason"] == "CSRF_TOKEN_INVALID"
        again = await browser.get("/auth/openid/callback?code=x&state=y")  # the state cookie is gone
        assert again.headers["location"] == "/?login_error=OPENID_STATE_INVALID"
        assert (await browser.delete("/v1/session")).status_code == 200
        assert (await browser.get("/v1/session")).status_code == 401
    (event, *_) = await eventually(lambda: here.events(code="OK", actor=OTHER), WITHIN_S)
    assert (event["target"], event["role"], event["authentication"]) == (OTHER, "OPERATOR", "session")
    await here.provider.change_user(groups=["staff"], nickname="renamed")
    async with here.browser() as browser:
        assert await here.log_in(browser) == "/"
        known = (await browser.get("/v1/session")).json()
        assert (known["name"], known["role"]) == (OTHER, "ROLE_VIEWER")
        assert (await here.manager.call(f"/v1/users/{OTHER}", method="DELETE")).status == 200

        async def is_out() -> bool:
            return (await browser.get("/v1/session")).status_code == 401

        await eventually(is_out, WITHIN_S)


async def test_without_a_role_only_a_user_comes_in(here: Here) -> None:
    await here.provider.change_user(groups=["others"], nickname="hopper")
    async with here.browser() as browser:
        assert await here.log_in(browser) == "/?login_error=IDENTITY_UNKNOWN"
        made = {"user": {"name": "hopper", "role": "ROLE_VIEWER"}}
        assert (await here.manager.call("/v1/users", body=made)).status == 200
        assert await here.log_in(browser) == "/"
        assert (await browser.get("/v1/session")).json()["role"] == "ROLE_VIEWER"


async def test_who_was_refused_is_written_down(here: Here) -> None:
    await here.manager.product.kill("gateway", how=signal.SIGTERM)  # what it has counted, it writes down now
    await here.manager.product.start("gateway")

    async def events() -> set[tuple[str, str, str]]:
        refused = [*await here.events(code="PERMISSION_DENIED"), *await here.events(code="UNAUTHENTICATED")]
        return {(event["reason"], event.get("actor", ""), event["address"]) for event in refused}

    expected = {("IDENTITY_UNKNOWN", USER, "127.0.0.1"), ("OPENID_STATE_INVALID", "", "127.0.0.1")}
    await eventually(lambda: _among(events, expected), WITHIN_S)


async def _among(found: Callable[[], Awaitable[set[Any]]], wanted: set[Any]) -> bool:
    there = await found()
    assert wanted <= there, there
    return True


async def test_nothing_secret_is_in_the_gateways_log(here: Here) -> None:
    log = here.manager.product.log("gateway").read_text()
    for secret in (SECRET, PASSWORD, "om-session_", "code=", "id_token"):
        assert secret not in log, secret
