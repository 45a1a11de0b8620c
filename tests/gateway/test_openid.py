"""Log-in with an OpenID provider that lies: nobody comes in for whom it has not vouched."""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Callable
from urllib.parse import parse_qs, urlsplit

import pytest

from fleet.access import ADMIN, OPERATOR, VIEWER
from gateway.access import openid as module
from gateway.access.openid_state import MAX_AGE_S
from runtime.clock import ManualClock
from runtime.errors import OpenManagerError
from tests.gateway.openid_fake import (
    CLIENT,
    SECRET,
    Claims,
    FakeProvider,
    by_hmac,
    client,
    fake_provider,
    key,
    logged_in,
    refusal,
    send,
    signed_by,
    unsigned,
)

METADATA = "/realm/.well-known/openid-configuration"


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    async with fake_provider(ManualClock()) as running:
        yield running


async def test_who_has_logged_in_there_is_known_here(provider: FakeProvider) -> None:
    provider.user |= {"groups": ["staff", "admins", "ops", "others", 7]}
    async with client(provider) as openid:
        found = await logged_in(provider, openid)
    assert (found.issuer, found.subject, found.name, found.role) == (provider.issuer, "u-1", "ada", ADMIN)


@pytest.mark.parametrize(
    ("groups", "role"), [(["ops", "staff"], OPERATOR), ("staff", VIEWER), (["others"], 0), (None, 0), ({"ops": 1}, 0)]
)
async def test_the_most_powerful_role_counts_and_none_is_made_up(
    provider: FakeProvider, groups: object, role: int
) -> None:
    provider.user |= {"groups": groups}
    async with client(provider) as openid:
        assert (await logged_in(provider, openid)).role == role
    async with client(provider, role_claim=None, roles={}) as openid:
        assert (await logged_in(provider, openid)).role == 0


def _changed(name: str, value: object) -> Callable[[Claims], None]:
    return lambda claims: claims.update({name: value})


def _without(name: str) -> Callable[[Claims], None]:
    return lambda claims: claims.pop(name)


LIES: dict[str, Callable[[Claims], None]] = {
    "for another client": _changed("aud", "another"),
    "for another client, though given to this one": lambda claims: claims.update(aud="another", azp=CLIENT),
    "for several clients, all others": _changed("aud", ["another", "one more"]),
    "for several clients, without azp": _changed("aud", [CLIENT, "another"]),
    "given to another client": _changed("azp", "another"),
    "for nobody": _without("aud"),
    "of another issuer": _changed("iss", "https://provider.example"),
    "of an issuer that begins like it": lambda claims: claims.update(iss=claims["iss"] + "/"),
    "of no issuer": _without("iss"),
    "for another log-in": _changed("nonce", "another"),
    "for no log-in": _without("nonce"),
    "expired": lambda claims: claims.update(exp=claims["iat"] - module.LEEWAY_S - 1),
    "without an end": _without("exp"),
    "of the future": lambda claims: claims.update(iat=claims["iat"] + module.LEEWAY_S + 1),
    "without a beginning": _without("iat"),
    "not valid yet": lambda claims: claims.update(nbf=claims["iat"] + module.LEEWAY_S + 1),
    "of nobody": _without("sub"),
    "of an empty name": _changed("sub", ""),
    "of an endless name": _changed("sub", "a" * 256),
    "of half a character": _changed("sub", "\ud800"),
    "beside another access token": _changed("at_hash", "AAAAAAAAAAAAAAAAAAAAAA"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_an_id_token_that_is_not_for_this_log_in_is_refused(provider: FakeProvider, lie: str) -> None:
    provider.lie = LIES[lie]
    async with client(provider) as openid:
        url, carried = await openid.begin()
        await refusal(openid, provider.log_in(url), carried, reason="OPENID_TOKEN_INVALID")


async def test_an_id_token_for_several_clients_that_was_given_to_this_one_is_taken(provider: FakeProvider) -> None:
    provider.lie = lambda claims: claims.update(aud=["another", CLIENT], azp=CLIENT)
    async with client(provider) as openid:
        assert (await logged_in(provider, openid)).name == "ada"


def _altered(provider: FakeProvider) -> Callable[[Claims], str]:
    def sign(claims: Claims) -> str:
        header, _, signature = provider.sign_well(claims).split(".")
        return ".".join((header, provider.sign_well(claims | {"sub": "root"}).split(".")[1], signature))

    return sign


FORGERIES: dict[str, Callable[[FakeProvider], Callable[[Claims], str]]] = {
    "alg none": lambda _provider: unsigned,
    "HS256 with the client's secret": lambda _provider: by_hmac,
    "HS256 with the client's secret, named as the key": lambda _provider: lambda claims: by_hmac(claims, kid="first"),
    "HS256 with the public key": lambda provider: (
        lambda claims: by_hmac(claims, provider.key.as_pem(private=False), kid="first")
    ),
    "another's key under the same name": lambda _provider: lambda claims: signed_by(key("first"), claims),
    "an altered claim": _altered,
    "a key that the provider does not have": lambda _provider: lambda claims: signed_by(key("unknown"), claims),
    "a key that the token brings along": lambda _provider: _with_own_key,
    "nothing readable": lambda _provider: lambda _claims: "e30.e30",
    "no text": lambda _provider: lambda _claims: {"a": 1},  # type: ignore[return-value,dict-item]
}


def _with_own_key(claims: Claims) -> str:
    own = key("first")
    return signed_by(own, claims, jwk=own.as_dict(private=False))


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_an_id_token_that_the_provider_has_not_signed_is_refused(provider: FakeProvider, forgery: str) -> None:
    provider.sign = FORGERIES[forgery](provider)
    async with client(provider) as openid:
        url, carried = await openid.begin()
        await refusal(openid, provider.log_in(url), carried, reason="OPENID_TOKEN_INVALID")
    assert len(provider.asked("/realm/keys")) == 1 + ("does not have" in forgery), (
        "asked again for an unknown key alone"
    )


async def test_a_symmetric_key_among_the_providers_is_none(provider: FakeProvider) -> None:
    shared = {"kty": "oct", "kid": "shared", "k": base64.urlsafe_b64encode(SECRET.encode()).rstrip(b"=").decode()}
    provider.published = [shared]
    provider.sign = lambda claims: by_hmac(claims, kid="shared")
    async with client(provider) as openid:
        url, carried = await openid.begin()
        await refusal(openid, provider.log_in(url), carried, reason="OPENID_TOKEN_INVALID")
    provider.answers["/keys"] = lambda _request, writer: send(writer, 200, {"keys": [shared]})
    async with client(provider) as openid:
        with pytest.raises(OpenManagerError) as caught:
            await openid.begin()
    assert caught.value.reason == "OPENID_UNAVAILABLE", "there is no key that counts"


async def test_a_new_key_of_the_provider_is_asked_for_once(provider: FakeProvider) -> None:
    async with client(provider) as openid:
        await logged_in(provider, openid)
        provider.key = key("second")
        assert (await logged_in(provider, openid)).name == "ada"
        assert (await logged_in(provider, openid)).name == "ada"
    assert len(provider.asked("/realm/keys")) == 2
    assert all("authorization" not in request.headers for request in provider.asked("/realm/keys"))


async def test_a_key_that_cannot_be_read_does_not_spoil_the_others(provider: FakeProvider) -> None:
    provider.published = [{"kty": "EC", "crv": "P-1", "x": "", "y": ""}, {"kty": "AKP"}, {"kty": "RSA"}, 7, None]
    async with client(provider) as openid:
        assert (await logged_in(provider, openid)).name == "ada"


async def test_what_the_provider_says_of_itself_is_asked_for_once_in_a_while(provider: FakeProvider) -> None:
    async with client(provider) as openid:
        await asyncio.gather(*(logged_in(provider, openid) for _ in range(5)))
        assert len(provider.asked(METADATA)) == 1
        provider.clock.advance(module.REFRESH_S)
        await logged_in(provider, openid)
        assert len(provider.asked(METADATA)) == 2


async def test_only_the_browser_that_began_a_log_in_ends_it(provider: FakeProvider) -> None:
    async with client(provider) as openid, client(provider, secret="of another installation") as foreign:
        url, carried = await openid.begin()
        query = provider.log_in(url)
        _, other = await openid.begin()
        foreign_url, anothers = await foreign.begin()
        await refusal(openid, provider.log_in(foreign_url), anothers, reason="OPENID_STATE_INVALID")
        for state in (query["state"][:-1], "", "\N{SNOWMAN}"):
            await refusal(openid, query | {"state": state}, carried, reason="OPENID_STATE_INVALID")
        altered = [carried[:at] + ("A" if carried[at] != "A" else "B") + carried[at + 1 :] for at in (0, 60, 120, -2)]
        for cookie in ("", other, anothers, *altered, carried[:40], "\N{SNOWMAN}", "!"):
            await refusal(openid, query, cookie, reason="OPENID_STATE_INVALID")
        assert not provider.asked("/realm/token"), "nobody asked the provider"
        assert (await openid.finish(query, carried)).name == "ada"


async def test_every_log_in_has_secrets_of_its_own(provider: FakeProvider) -> None:
    async with client(provider) as openid:
        asked = [parse_qs(urlsplit((await openid.begin())[0]).query) for _ in range(3)]
    for name in ("state", "nonce", "code_challenge"):
        assert len({each[name][0] for each in asked}) == 3 and len(asked[0][name][0]) >= 43, name


async def test_a_log_in_takes_at_most_ten_minutes(provider: FakeProvider) -> None:
    async with client(provider) as openid:
        url, carried = await openid.begin()
        query = provider.log_in(url)
        provider.clock.advance(MAX_AGE_S + 1)
        await refusal(openid, query, carried, reason="OPENID_STATE_INVALID")
        provider.clock.advance(-2 * MAX_AGE_S)
        await refusal(openid, query, carried, reason="OPENID_STATE_INVALID")
        provider.clock.advance(2 * MAX_AGE_S - 1)
        assert (await openid.finish(query, carried)).name == "ada"


async def test_a_gateway_whose_clock_is_a_little_behind_ends_what_another_began(provider: FakeProvider) -> None:
    async with client(provider) as one, client(provider) as other:
        url, carried = await one.begin()
        query = provider.log_in(url)
        provider.clock.advance(-2.0)
        assert (await other.finish(query, carried)).name == "ada"


async def test_neither_a_code_nor_a_cookie_is_good_twice(provider: FakeProvider) -> None:
    async with client(provider) as openid:
        url, carried = await openid.begin()
        query = provider.log_in(url)
        await openid.finish(query, carried)
        await refusal(openid, query, carried, reason="OPENID_REFUSED")
        others, _ = await openid.begin()
        stolen = provider.log_in(others)["code"]
        await refusal(openid, query | {"code": stolen}, carried, reason="OPENID_REFUSED")


async def test_a_code_is_worth_nothing_without_the_verifier(provider: FakeProvider) -> None:
    """Another's code, put into one's own log-in."""
    async with client(provider) as openid:
        url, carried = await openid.begin()
        victims, _ = await openid.begin()
        query = provider.log_in(url) | {"code": provider.log_in(victims)["code"]}
        await refusal(openid, query, carried, reason="OPENID_REFUSED")


@pytest.mark.parametrize("code", [None, "", "x" * 5_000, "a\nb", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"])
async def test_what_is_no_code_is_not_shown_to_the_provider(provider: FakeProvider, code: str | None) -> None:
    async with client(provider) as openid:
        url, carried = await openid.begin()
        query = provider.log_in(url)
        query = {"state": query["state"]} | ({} if code is None else {"code": code})
        await refusal(openid, query, carried, reason="OPENID_REFUSED")
    assert not provider.asked("/realm/token")


async def test_another_providers_answer_and_a_no_are_refused(
    provider: FakeProvider, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with client(provider) as openid:
        url, carried = await openid.begin()
        query = provider.log_in(url)
        await refusal(openid, query | {"iss": "https://other.example"}, carried, reason="OPENID_REFUSED")
        denied = {"state": query["state"], "error": "access_denied\nforged line", "error_description": "so"}
        error = await refusal(openid, denied, carried, reason="OPENID_REFUSED")
        assert "access_denied" not in str(error) and r"access_denied\nforged" in caplog.text
        assert not provider.asked("/realm/token")
        assert (await openid.finish(query | {"iss": provider.issuer}, carried)).name == "ada"


async def test_a_name_is_needed(provider: FakeProvider) -> None:
    async with client(provider) as openid:
        for name in (None, "", 7, ["ada"], "a" * 256, "a\nb", "a\0", "\ud800"):
            provider.user["preferred_username"] = name
            url, carried = await openid.begin()
            query = provider.log_in(url)
            await refusal(openid, query, carried, reason="OPENID_NAME_MISSING", code="PERMISSION_DENIED")


async def test_an_e_mail_address_is_a_name_only_if_it_is_verified(provider: FakeProvider) -> None:
    provider.user["email"] = "ada@example.com"
    async with client(provider, name_claim="email") as openid:
        for verified in (None, False, "false", "true", 1):
            provider.user["email_verified"] = verified
            url, carried = await openid.begin()
            query = provider.log_in(url)
            await refusal(openid, query, carried, reason="OPENID_NAME_MISSING", code="PERMISSION_DENIED")
        provider.user["email_verified"] = True
        assert (await logged_in(provider, openid)).name == "ada@example.com"


async def test_what_is_not_in_the_id_token_is_asked_for(provider: FakeProvider) -> None:
    provider.user = {"sub": "u-1", "groups": ["ops"]}
    provider.userinfo = {"sub": "u-1", "preferred_username": "ada", "groups": ["admins"]}
    async with client(provider) as openid:
        found = await logged_in(provider, openid)
        assert (found.name, found.role) == ("ada", OPERATOR), "what was signed counts"
        provider.userinfo["sub"] = "u-2"
        url, carried = await openid.begin()
        await refusal(openid, provider.log_in(url), carried, reason="OPENID_TOKEN_INVALID")


async def test_the_secret_is_shown_as_the_provider_wants_it(provider: FakeProvider) -> None:
    async with client(provider) as openid:
        await logged_in(provider, openid)
    provider.metadata = {"token_endpoint_auth_methods_supported": ["client_secret_post"]}
    async with client(provider) as openid:
        await logged_in(provider, openid)
    provider.public_client = True
    async with client(provider, client_secret=None) as openid:
        await logged_in(provider, openid)
    basic, post, public = provider.asked("/realm/token")
    assert "authorization" in basic.headers and "client_secret" not in basic.form
    assert "authorization" not in post.headers and post.form["client_secret"] == SECRET
    assert "authorization" not in public.headers and public.form["client_id"] == CLIENT


async def test_no_secret_is_in_any_log(provider: FakeProvider, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with client(provider) as openid:
        url, carried = await openid.begin()
        query = provider.log_in(url)
        await openid.finish(query, carried)
        await refusal(openid, query, carried, reason="OPENID_REFUSED")
        for reason, lie, sign in (
            ("OPENID_TOKEN_INVALID", _changed("nonce", "another"), None),
            ("OPENID_TOKEN_INVALID", _changed("x", 1), unsigned),
            ("OPENID_NAME_MISSING", _without("preferred_username"), None),
        ):
            provider.lie, provider.sign = lie, sign
            another, cookie = await openid.begin()
            code = "PERMISSION_DENIED" if "NAME" in reason else "UNAUTHENTICATED"
            await refusal(openid, provider.log_in(another), cookie, reason=reason, code=code)
            provider.told += [cookie]
    assert "a log-in is refused" in caplog.text
    secrets = [*provider.told, SECRET, carried, query["state"]]
    assert len(secrets) > 15 and not [secret for secret in secrets if secret in caplog.text]
