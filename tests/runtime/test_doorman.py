"""Who has no token is refused before his message is read, and is told what the authenticator says."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime import doorman as module
from runtime.doorman import ANY_METHOD, bearer_of
from runtime.interception import HEALTH_SERVICE, Interception, service_secret_authenticator
from runtime.limits import MAX_OPEN_MESSAGES
from tests.harness import eventually
from tests.harness.http2 import DATA, END_STREAM, HEADERS, RST_STREAM, Connection, message
from tests.runtime.conftest import serving
from tests.runtime.echo import SERVICE, Echo, unary

TOKEN = secrets.token_urlsafe(32)
BEARER = f"Bearer {TOKEN}"
LARGE = 10 << 20
UNAUTHENTICATED, UNIMPLEMENTED = b"grpc-status\x0216", b"grpc-status\x0212"  # as header fields have them
WITHIN_S = 10.0


def guarded() -> dict[str, Any]:
    return {"interception": Interception(service_secret_authenticator(TOKEN)), "knows": bearer_of(TOKEN)}


async def answer(address: str, path: str, authorization: str) -> bytes:
    """The header fields with which a call is answered of whose message only the length was sent."""
    more = [("authorization", authorization)] if authorization else []
    async with await Connection.open(address) as connection:
        stream = connection.call(path, more)
        connection.send(DATA, 0, stream, message(LARGE))
        async with asyncio.timeout(WITHIN_S):
            got = await connection.until(HEADERS, stream=stream)
    assert got is not None
    return got.payload


@pytest.mark.parametrize("method", ["Get", "Watch", "Collect", "Chat"])
@pytest.mark.parametrize(
    "authorization", ["", TOKEN, f"Bearer {TOKEN}x", "Bearer \xe4"], ids=["none", "bare", "longer", "foreign"]
)
async def test_the_message_is_not_waited_for(method: str, authorization: str) -> None:
    async with serving(**guarded()) as running:
        assert UNAUTHENTICATED in await answer(running.address, f"/{SERVICE}/{method}", authorization)


async def test_of_who_has_a_token_it_is() -> None:
    async with serving(**guarded()) as running, await Connection.open(running.address) as connection:
        stream = connection.call(f"/{SERVICE}/Get", [("authorization", BEARER)])
        request = Echo(text="hello").SerializeToString()
        connection.send(DATA, 0, stream, message(len(request)))
        await answer(running.address, f"/{SERVICE}/Get", "")  # by then it would have been refused
        connection.send(DATA, 1, stream, request)
        async with asyncio.timeout(WITHIN_S):
            got = await connection.until(DATA, stream=stream)
        assert got is not None and got.payload[5:] == request


async def test_which_methods_there_are_is_not_told_to_strangers(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(**guarded()) as running:
        with caplog.at_level(logging.INFO, "access"):
            for path in (f"/{SERVICE}/Invented", "/nobody.Knows/This"):
                assert UNAUTHENTICATED in await answer(running.address, path, "")
                assert UNIMPLEMENTED in await answer(running.address, path, BEARER)
            assert UNAUTHENTICATED in await answer(running.address, f"/{SERVICE}/Get", "")
    assert [vars(record)["rpc"] for record in caplog.records] == [ANY_METHOD, ANY_METHOD, f"/{SERVICE}/Get"]


async def test_a_client_of_grpc_is_told_whatever_it_sends() -> None:
    async with serving(**guarded()) as running, running.raw(max_send_message_length=-1) as channel:
        for text in ("", "x" * LARGE):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unary(channel, request=Echo(text=text), metadata=(("authorization", "Bearer wrong"),))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "service secret" in (caught.value.details() or "")
        assert running.servicer.calls == 0
        assert (await unary(channel, metadata=(("authorization", BEARER),))).text == "hello"


async def test_health_is_open() -> None:
    async with serving(**guarded()) as running, running.raw() as channel:
        answered = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answered.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert bearer_of(TOKEN)(f"/{HEALTH_SERVICE}/Check", ())
    assert not bearer_of(TOKEN)(f"/{HEALTH_SERVICE}Too/Check", ())
    assert bearer_of(TOKEN, open_services=["a.B"])("/a.B/C", (("authorization", "wrong"),))


@contextlib.asynccontextmanager
async def few_at_once() -> AsyncIterator[Connection]:
    """A connection to a server of which Get is open to all, as health is."""
    async with (
        serving(open_to_all=[f"/{SERVICE}/Get"], **guarded()) as running,
        await Connection.open(running.address) as connection,
    ):
        yield connection


def held(connection: Connection, path: str) -> int:
    """Begins a call of whose message there is the length only."""
    stream = connection.call(path)
    connection.send(DATA, 0, stream, message(LARGE))
    return stream


@pytest.mark.parametrize("path", [f"/{SERVICE}/Get", f"/{HEALTH_SERVICE}/Check", f"/{HEALTH_SERVICE}/Watch"])
async def test_of_what_is_open_to_all_few_messages_of_an_address_are_read_at_once(path: str) -> None:
    """Of each gRPC keeps what has come, and strangers may begin as many as they like."""
    async with few_at_once() as connection, asyncio.timeout(WITHIN_S):
        begun = [held(connection, path) for _ in range(MAX_OPEN_MESSAGES)]
        whole = connection.call(path)
        connection.send(DATA, END_STREAM, whole, message(0))
        known = connection.call(f"/{SERVICE}/Create", [("authorization", BEARER)])
        connection.send(DATA, END_STREAM, known, message(0))
        got = await connection.until(HEADERS)
        assert got is not None and got.stream == known
        connection.send(RST_STREAM, 0, begun[0], (8).to_bytes(4, "big"))
        got = await connection.until(HEADERS, stream=whole)
        assert got is not None


@pytest.mark.parametrize("path", [f"/{SERVICE}/Get", f"/{HEALTH_SERVICE}/Check", f"/{HEALTH_SERVICE}/Watch"])
async def test_what_is_open_to_all_waits_for_no_message(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_MESSAGE_WITHIN_S", 0.2)
    async with few_at_once() as connection, asyncio.timeout(WITHIN_S):
        begun = {held(connection, path) for _ in range(3 * MAX_OPEN_MESSAGES)}
        fields = b""
        while begun:
            got = await connection.until(HEADERS)
            assert got is not None
            fields += got.payload
            begun -= {got.stream} if got.flags & END_STREAM else set()
        assert b"grpc-status\x014" in fields and b"no message within" in fields


async def test_strangers_leave_calls_to_who_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches health ends when he likes."""
    monkeypatch.setattr(module, "MAX_OPEN_CALLS_OF_ADDRESS", 5)
    async with serving(**guarded()) as running, running.raw() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(5)]
        for watch in watches:
            await watch.read()
        for refused in (
            stub.Check(health_pb2.HealthCheckRequest()),
            stub.Watch(health_pb2.HealthCheckRequest()).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await unary(channel, metadata=(("authorization", BEARER),))).text == "hello"
        watches.pop().cancel()

        async def is_answered() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return bool(await stub.Check(health_pb2.HealthCheckRequest()))
            return False

        await eventually(is_answered, WITHIN_S)
