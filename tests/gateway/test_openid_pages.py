"""Log-in with an OpenID provider, as a browser sees it; and the settings of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from fleet.access import ADMIN, OPERATOR
from gateway.access.openid import Registration
from gateway.http.openid_pages import OpenIdPages, StateCookie
from gateway.settings import GatewaySettings
from openmanager.access.v1 import access_pb2
from runtime.caller import Caller
from runtime.clock import ManualClock
from runtime.errors import OpenManagerError, PermissionDenied
from runtime.settings import SettingsError
from tests.gateway.http.serving import serving
from tests.gateway.openid_fake import REDIRECT, SECRET, FakeProvider, Writer, client, fake_provider, send

LOGIN, CALLBACK = "/auth/openid/login", "/auth/openid/callback"
STATE = "openmanager-openid"


@dataclass
class FakeSessions:
    """Remembers whom it was told of; refuses everybody while it has an error."""

    opened: list[tuple[access_pb2.OpenSessionRequest, Caller]] = field(default_factory=list)
    error: OpenManagerError | None = None

    async def open(self, request: access_pb2.OpenSessionRequest, who: Caller) -> access_pb2.OpenSessionResponse:
        if self.error is not None:
            raise self.error
        self.opened.append((request, who))
        return access_pb2.OpenSessionResponse(secret="session-secret")

    def kept(self, opened: access_pb2.OpenSessionResponse) -> str:
        return f"session={opened.secret}; Path=/; HttpOnly"


@dataclass
class Stand:
    """A provider, a gateway, and a browser."""

    provider: FakeProvider
    sessions: FakeSessions
    browser: httpx2.AsyncClient
    told: list[Any] = field(default_factory=list)

    async def back_from_provider(self) -> httpx2.Response:
        there = await self.browser.get(LOGIN)
        assert there.status_code == 302, there.text
        return await self.browser.get(CALLBACK, params=self.provider.log_in(there.headers["location"]))


@contextlib.asynccontextmanager
async def stand(**options: Any) -> AsyncIterator[Stand]:
    async with fake_provider(ManualClock()) as provider, client(provider, **options) as openid:
        sessions, told = FakeSessions(), []

        async def opened(who: Caller, session: access_pb2.OpenSessionResponse) -> None:
            told.append((who.name, session.secret))

        pages = OpenIdPages(
            openid,
            sessions,
            secure=False,
            opened=opened,
            refused=lambda who, error: told.append((who.name, error.reason)),
        )
        async with (
            serving(extra=pages.routes()) as served,
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{served.port}", trust_env=False, timeout=20.0) as browser,
        ):
            yield Stand(provider, sessions, browser, told)


async def test_a_browser_is_sent_there_and_comes_back_with_a_session() -> None:
    async with stand() as here:
        there = await here.browser.get(LOGIN)
        (cookie,) = there.headers.get_list("set-cookie")
        parts = cookie.split("; ")
        assert parts[0].startswith(f"{STATE}=")
        assert set(parts[1:]) == {"Max-Age=600", "Path=/", "HttpOnly", "SameSite=Lax"}
        assert (there.status_code, there.headers["cache-control"]) == (302, "no-store")
        query = here.provider.log_in(there.headers["location"])
        assert query["state"] not in here.provider.issuer and STATE in here.browser.cookies
        back = await here.browser.get(CALLBACK, params=query | {"next": "//evil.example"})
        assert (back.status_code, back.headers["location"]) == (303, "/")
        assert back.headers["cache-control"] == "no-store" and back.headers["referrer-policy"] == "no-referrer"
        assert here.browser.cookies.get("session") == "session-secret"
        assert STATE not in here.browser.cookies, "it is good once"
        ((request, who),) = here.sessions.opened
        assert request.identity.name == who.name == "ada" and request.identity.issuer == here.provider.issuer
        assert (who.address, who.authentication) == ("127.0.0.1", "session")
        again = await here.browser.get(CALLBACK, params=query)
        assert again.headers["location"] == "/?login_error=OPENID_STATE_INVALID"
        assert here.told == [("ada", "session-secret"), ("", "OPENID_STATE_INVALID")]


async def test_what_failed_is_told_by_its_reason_alone() -> None:
    async with stand() as here:
        here.provider.user["preferred_username"] = None
        failed = await here.back_from_provider()
        assert (failed.status_code, failed.headers["location"]) == (303, "/?login_error=OPENID_NAME_MISSING")
        assert STATE not in here.browser.cookies and "session" not in here.browser.cookies
        here.provider.user["preferred_username"] = "ada"
        here.sessions.error = PermissionDenied("she is not let in", reason="A&B=C")
        failed = await here.back_from_provider()
        assert failed.headers["location"] == "/?login_error=A%26B%3DC" and failed.content == b""
        assert here.told == [("", "OPENID_NAME_MISSING"), ("ada", "A&B=C")]
        here.provider.metadata = {"issuer": "another"}
        here.provider.clock.advance(3_600)
        away = await here.browser.get(LOGIN)
        assert (away.status_code, away.headers["location"]) == (303, "/?login_error=OPENID_UNAVAILABLE")


async def test_another_tab_that_asks_whether_there_is_a_provider_ends_no_log_in() -> None:
    async with stand() as here:
        there = await here.browser.get(LOGIN)
        asked = await here.browser.head(LOGIN)
        assert (asked.status_code, "set-cookie" in asked.headers) == (204, False)
        back = await here.browser.get(CALLBACK, params=here.provider.log_in(there.headers["location"]))
        assert back.headers["location"] == "/"


@pytest.mark.parametrize("path", [LOGIN, CALLBACK])
async def test_a_browser_is_sent_nowhere_else(path: str) -> None:
    async with stand() as here:
        elsewhere = {"next": "//evil.example", "redirect_uri": "https://evil.example", "error": "//evil.example/"}
        answer = await here.browser.get(
            path, params=elsewhere, headers={"x-original-url": "//evil.example", "referer": "https://evil.example"}
        )
        location = answer.headers["location"]
        assert location.startswith((f"{here.provider.issuer}/auth?", "/?login_error=OPENID_"))
        assert "evil" not in location


async def test_too_many_at_once_may_try_again() -> None:
    async with stand(max_exchanges=1) as here:
        there = await here.browser.get(LOGIN)
        query = here.provider.log_in(there.headers["location"])
        reached, release = asyncio.Event(), asyncio.Event()

        async def hold(_request: Any, writer: Writer) -> None:
            reached.set()
            await release.wait()
            await send(writer, 400, {"error": "invalid_grant"})

        here.provider.answers["/token"] = hold
        held = asyncio.create_task(here.browser.get(CALLBACK, params=query))
        await reached.wait()
        busy = await here.browser.get(CALLBACK, params=query)
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1") and "set-cookie" not in busy.headers
        assert busy.json()["details"][0]["reason"] == "OPENID_BUSY"
        release.set()
        assert (await held).headers["location"] == "/?login_error=OPENID_REFUSED"


@pytest.mark.parametrize(
    ("header", "carried"),
    [
        (f"{STATE}=a", "a"),
        (f"other=1; {STATE}=a; more=2", "a"),
        (f"{STATE}=a; {STATE}=b", ""),
        (f"x{STATE}=a", ""),
        (f"{STATE}", ""),
        ("", ""),
    ],
)
def test_of_two_state_cookies_none_counts(header: str, carried: str) -> None:
    request = Request({"type": "http", "headers": [(b"cookie", header.encode())]})
    assert StateCookie(secure=False).carried_by(request) == carried


def test_over_tls_the_cookie_is_bound_to_it() -> None:
    cookie = StateCookie(secure=True)
    for text in (cookie.set("a"), cookie.clear()):
        assert text.startswith("__Host-openmanager-openid=") and text.endswith("; Secure")
    request = Request({"type": "http", "headers": [(b"cookie", b"openmanager-openid=a")]})
    assert cookie.carried_by(request) == ""


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"OIDC_ISSUER": "https://id.example"}, ("OIDC_CLIENT_ID", "OIDC_REDIRECT_URL")),
        ({"OIDC_CLIENT_ID": "me"}, ("OIDC_ISSUER", "OIDC_REDIRECT_URL")),
        ({"OIDC_ISSUER": "http://id.example"}, ("OIDC_ISSUER: is not",)),
        ({"OIDC_ISSUER": "https://user:pass@id.example"}, ("OIDC_ISSUER: is not",)),
        ({"OIDC_ISSUER": "https://id.example/?realm=one"}, ("OIDC_ISSUER: is not",)),
        ({"OIDC_REDIRECT_URL": "https://manager.example/"}, ("OIDC_REDIRECT_URL", "/auth/openid/callback")),
        ({"OIDC_REDIRECT_URL": "http://manager.example/auth/openid/callback"}, ("OIDC_REDIRECT_URL", "https")),
        ({"OIDC_SCOPES": "profile"}, ("OIDC_SCOPES",)),
        ({"OIDC_ROLES": "admins=ADMIN"}, ("OIDC_ROLE_CLAIM",)),
        ({"OIDC_ROLE_CLAIM": "groups"}, ("OIDC_ROLES",)),
        ({"OIDC_ROLES": "agents=AGENT"}, ("OIDC_ROLES", "VIEWER, OPERATOR, ADMIN")),
    ],
)
def test_settings_that_make_no_sense_are_named(environ: dict[str, str], named: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as refused:
        GatewaySettings.load(environ)
    for name in named:
        assert name in str(refused.value)


def test_settings_that_do() -> None:
    environ = {
        "OIDC_ISSUER": "http://127.0.0.1:8443/realm",
        "OIDC_CLIENT_ID": "me",
        "OIDC_CLIENT_SECRET": SECRET,
        "OIDC_REDIRECT_URL": REDIRECT,
        "OIDC_ROLE_CLAIM": "groups",
        "OIDC_ROLES": "cn=admins=ADMIN, ops=OPERATOR,",
    }
    settings = GatewaySettings.load(environ)
    assert settings.oidc_roles == {"cn=admins": ADMIN, "ops": OPERATOR}
    known = Registration.of(settings)
    assert known is not None and SECRET not in repr(settings) + repr(known)
    assert Registration.of(GatewaySettings.load({})) is None
