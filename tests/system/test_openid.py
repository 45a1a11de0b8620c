"""Log-in with a real OpenID provider, which keeps its rules by itself."""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from pydantic import SecretStr

from fleet.access import ADMIN, VIEWER
from gateway.access.openid import OpenId
from openmanager.access.v1 import access_pb2
from runtime.clock import SystemClock
from runtime.errors import OpenManagerError
from tests.gateway.openid_fake import registration
from tests.harness.openid_provider import CLIENT, PUBLIC_CLIENT, SECRET, USER, OpenIdProvider, openid_provider

REDIRECT = "http://127.0.0.1:8080/auth/openid/callback"
INSTALLATION = "secret of the installation"


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[OpenIdProvider]:
    async with openid_provider(REDIRECT) as running:
        yield running


def client(provider: OpenIdProvider, **changed: Any) -> OpenId:
    known = {"client_id": CLIENT, "client_secret": SecretStr(SECRET), "redirect_url": REDIRECT}
    return OpenId(registration(provider.issuer, **known | changed), INSTALLATION, SystemClock())


async def logged_in(provider: OpenIdProvider, openid: OpenId, *, as_client: str = CLIENT) -> access_pb2.Identity:
    url, carried = await openid.begin()
    back = await provider.log_in(url, client=as_client)
    assert str(back).startswith(f"{REDIRECT}?")
    return await openid.finish(back.params, carried)


async def refused(openid: OpenId, back: httpx2.URL, carried: str) -> str:
    with pytest.raises(OpenManagerError) as caught:
        await openid.finish(back.params, carried)
    return caught.value.reason


async def test_who_logs_in_there_is_known_here(provider: OpenIdProvider) -> None:
    async with client(provider) as openid:
        found = await logged_in(provider, openid)
        assert (found.issuer, found.name, found.role) == (provider.issuer, USER, ADMIN)
        again = await logged_in(provider, openid)
        assert found.subject and again.subject == found.subject
        await provider.change_user(groups=["staff"])
        assert (await logged_in(provider, openid)).role == VIEWER
        await provider.change_user(groups=["staff", "admins"])


async def test_what_the_provider_tells_only_who_asks_is_asked_for(provider: OpenIdProvider) -> None:
    """Its ID tokens have everything, so that only a claim that does not exist is looked for elsewhere."""
    async with client(provider, role_claim="no_such_claim") as openid:
        assert (await logged_in(provider, openid)).role == 0


async def test_a_public_client_needs_no_secret(provider: OpenIdProvider) -> None:
    async with client(provider, client_id=PUBLIC_CLIENT, client_secret=None) as openid:
        assert (await logged_in(provider, openid, as_client=PUBLIC_CLIENT)).name == USER


async def test_an_e_mail_address_is_a_name_if_it_is_verified(provider: OpenIdProvider) -> None:
    async with client(provider, name_claim="email") as openid:
        assert (await logged_in(provider, openid)).name == "ada@example.com"
        await provider.change_user(email_verified="no")
        url, carried = await openid.begin()
        assert await refused(openid, await provider.log_in(url), carried) == "OPENID_NAME_MISSING"
        await provider.change_user(email_verified="yes")


async def test_a_code_is_good_once_and_with_its_own_verifier(provider: OpenIdProvider) -> None:
    async with client(provider) as openid:
        url, carried = await openid.begin()
        back = await provider.log_in(url)
        assert (await openid.finish(back.params, carried)).name == USER
        assert await refused(openid, back, carried) == "OPENID_REFUSED"
        victims, _ = await openid.begin()
        stolen = (await provider.log_in(victims)).params["code"]
        url, carried = await openid.begin()
        mixed = (await provider.log_in(url)).copy_set_param("code", stolen)
        assert await refused(openid, mixed, carried) == "OPENID_REFUSED"


async def test_another_secret_is_refused(provider: OpenIdProvider) -> None:
    async with client(provider, client_secret=SecretStr("another")) as openid:
        url, carried = await openid.begin()
        assert await refused(openid, await provider.log_in(url), carried) == "OPENID_REFUSED"


async def test_the_provider_changes_its_key(provider: OpenIdProvider) -> None:
    async with client(provider) as openid:
        await logged_in(provider, openid)
        await provider.change_key("EC", "second")
        assert (await logged_in(provider, openid)).name == USER


async def test_the_provider_goes_away_and_comes_back(provider: OpenIdProvider) -> None:
    async with client(provider) as openid:
        url, carried = await openid.begin()
        back = await provider.log_in(url)
        provider.end()
        assert await refused(openid, back, carried) == "OPENID_UNAVAILABLE"
        await provider.start(REDIRECT)
        assert (await openid.finish(back.params, carried)).name == USER, "the code was never shown"
