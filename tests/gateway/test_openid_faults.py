"""A provider that fails in any way costs a bounded time and memory, is told as such, and is asked again."""

import asyncio
import gzip
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.openid import REFRESH_S
from gateway.access.openid_http import MAX_ANSWER_BYTES
from gateway.access.openid_provider import MAX_KEYS
from runtime.clock import ManualClock
from runtime.errors import OpenManagerError, status_code
from tests.gateway.openid_fake import Claims, FakeProvider, Request, Writer, client, fake_provider, logged_in, send

METADATA, KEYS, TOKEN, USERINFO = "/.well-known/openid-configuration", "/keys", "/token", "/userinfo"


@pytest.fixture
async def provider() -> AsyncIterator[FakeProvider]:
    async with fake_provider(ManualClock()) as running:
        yield running


@pytest.mark.parametrize(
    "said",
    [
        {"issuer": "https://provider.example"},
        {"issuer": None},
        {"authorization_endpoint": "http://provider.example/auth"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"token_endpoint": "http://169.254.169.254/token"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": None},
        {"userinfo_endpoint": 7},
    ],
)
async def test_what_the_provider_may_not_say_of_itself(provider: FakeProvider, said: Claims) -> None:
    provider.metadata = said
    async with client(provider) as openid:
        with pytest.raises(OpenManagerError) as caught:
            await openid.begin()
    assert caught.value.reason == "OPENID_UNAVAILABLE"


async def _garbage(_request: Request, writer: Writer) -> None:
    await send(writer, 200, b"<html>")


async def _broken(_request: Request, writer: Writer) -> None:
    await send(writer, 500, {"error": "secret text of the provider"})


async def _elsewhere(request: Request, writer: Writer) -> None:
    await send(writer, 302, b"", f"location: http://{request.headers['host']}/realm/trap")


async def _list(_request: Request, writer: Writer) -> None:
    await send(writer, 200, [1])


async def _endless(_request: Request, writer: Writer) -> None:
    """And without saying how long it is."""
    writer.write(b"HTTP/1.1 200 -\r\ncontent-type: application/json\r\n\r\n[")
    while True:
        writer.write(b"1," * 32_768)
        await writer.drain()


async def _cut(_request: Request, writer: Writer) -> None:
    writer.transport.abort()


async def _silent(_request: Request, _writer: Writer) -> None:
    await asyncio.sleep(60)


async def _dripping(_request: Request, writer: Writer) -> None:
    """Never silent for long, so that only a bound of the whole ends it."""
    writer.write(b"HTTP/1.1 200 -\r\ncontent-type: application/json\r\n\r\n")
    for _ in range(600):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.1)


PATIENT_S = 20.0
"""For a provider that is well again: a machine that stalls is no fault of it."""
FAULTS = [_garbage, _broken, _elsewhere, _list, _endless, _cut, _dripping]


@pytest.mark.parametrize("path", [METADATA, KEYS, TOKEN, USERINFO])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_provider_that_fails_costs_a_bounded_time_and_recovers(
    provider: FakeProvider, fault: Any, path: str
) -> None:
    provider.user, provider.userinfo = {"sub": "u-1"}, {"sub": "u-1", "preferred_username": "ada"}
    provider.answers[path] = fault
    async with client(provider, timeout_s=0.4) as openid:
        with pytest.raises(OpenManagerError) as caught:
            async with asyncio.timeout(PATIENT_S):
                await logged_in(provider, openid)
        assert (caught.value.reason, status_code(caught.value).name) == ("OPENID_UNAVAILABLE", "UNAVAILABLE")
        assert "secret text" not in str(caught.value)
        assert not [request for request in provider.requests if request.path.endswith("trap")]
        del provider.answers[path]
        openid._timeout_s = PATIENT_S
        assert (await logged_in(provider, openid)).name == "ada"


@pytest.mark.parametrize(
    ("size", "coding", "said"),
    [
        (MAX_ANSWER_BYTES, "", None),
        (MAX_ANSWER_BYTES + 1, "", f"over {MAX_ANSWER_BYTES} bytes"),
        (1_000, "gzip", "compressed"),
    ],
)
async def test_an_answer_has_at_most_so_many_bytes_and_is_not_compressed(
    provider: FakeProvider, caplog: pytest.LogCaptureFixture, size: int, coding: str, said: str | None
) -> None:
    """Right answers but for that."""
    right = json.dumps({"keys": [provider.key.as_dict(private=False)]}).encode().ljust(size)

    async def answer(request: Request, writer: Writer) -> None:
        assert request.headers["accept-encoding"] == "identity"
        packed = (gzip.compress(right), "content-encoding: gzip") if coding else (right,)
        await send(writer, 200, *packed)

    provider.answers[KEYS] = answer
    async with client(provider) as openid:
        if said is None:
            await openid.begin()
        else:
            with pytest.raises(OpenManagerError) as caught:
                await openid.begin()
            assert caught.value.reason == "OPENID_UNAVAILABLE" and said in caplog.text


@pytest.mark.parametrize("path", [METADATA, KEYS, TOKEN, USERINFO])
async def test_a_provider_may_say_anything(provider: FakeProvider, path: str) -> None:
    """Besides what is right, or instead."""
    provider.user, provider.userinfo = {"sub": "u-1"}, {"sub": "u-1", "preferred_username": "ada"}
    odd: Any = {}

    async def answer(request: Request, writer: Writer) -> None:
        await send(writer, 200, odd if isinstance(odd, bytes) else provider.answered(request)[1] | odd)

    provider.answers[path] = answer
    async with client(provider) as openid:
        for odd in (  # noqa: B007
            b"[" * 100_000,
            {"expires_in": [1]},
            {"expires_in": 1e400},
            {"token_type": 7},
            {"id_token": 7},
            {"keys": {"kty": "RSA"}},
            {"sub": "\ud800", "preferred_username": "\ud800"},
        ):
            provider.clock.advance(REFRESH_S)
            try:
                assert (await logged_in(provider, openid)).name == "ada"
            except OpenManagerError as error:
                assert error.reason.startswith("OPENID_")


@pytest.mark.parametrize(("named", "trusted"), [("127.0.0.1", True), ("127.0.0.1", False), ("127.0.0.2", True)])
async def test_a_provider_proves_that_it_is_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, trusted: bool
) -> None:
    certificate, private = tmp_path / "certificate", tmp_path / "key"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=provider -addext"
    files = ["-out", str(certificate), "-keyout", str(private)]
    subprocess.run([*command.split(), f"subjectAltName=IP:{named}", *files], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, private)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with fake_provider(ManualClock(), tls) as provider, client(provider) as openid:
        if trusted and named == "127.0.0.1":
            assert (await logged_in(provider, openid)).name == "ada"
        else:
            with pytest.raises(OpenManagerError) as caught:
                await openid.begin()
            assert caught.value.reason == "OPENID_UNAVAILABLE" and not provider.requests


async def test_a_provider_that_is_away_is_told_as_such() -> None:
    async with fake_provider(ManualClock()) as gone:
        pass
    async with client(gone) as openid:
        with pytest.raises(OpenManagerError) as caught:
            await openid.begin()
    assert caught.value.reason == "OPENID_UNAVAILABLE"


async def test_few_wait_for_the_provider_at_once(provider: FakeProvider) -> None:
    provider.answers[METADATA] = _silent
    async with client(provider, timeout_s=0.5, max_exchanges=2) as openid:
        found = await asyncio.gather(*(openid.begin() for _ in range(5)), return_exceptions=True)
        reasons = sorted(error.reason for error in found if isinstance(error, OpenManagerError))
        assert reasons == ["OPENID_BUSY"] * 3 + ["OPENID_UNAVAILABLE"] * 2
        provider.answers.clear()
        openid._timeout_s = PATIENT_S
        await asyncio.gather(openid.begin(), openid.begin())


async def test_of_a_provider_with_thousands_of_keys_the_first_are_read(provider: FakeProvider) -> None:
    right = provider.key.as_dict(private=False)
    others = [right | {"kid": f"another {number}"} for number in range(3 * MAX_KEYS)]
    for keys in ([right, *others], [*others[: MAX_KEYS - 1], right]):
        provider.answers[KEYS] = lambda _request, writer, keys=keys: send(writer, 200, {"keys": keys})
        async with client(provider) as openid:
            assert (await logged_in(provider, openid)).name == "ada"
            assert openid._known is not None and len(openid._known.keys.keys) == MAX_KEYS
