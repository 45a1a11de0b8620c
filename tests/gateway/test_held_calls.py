"""Calls that their callers begin, and go on with when they may not any more."""

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fleet.access import ADMIN, VIEWER, Caller
from gateway.access.callers import Callers, grpc_authenticator, known_to
from gateway.access.policy import Policy
from gateway.access.table import AccessTable
from gateway.admission import Admission
from openmanager.gateway.v1 import fleet_pb2
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.doorman import Knows, Metadata
from runtime.handlers import bind
from runtime.interception import Interception
from runtime.server import GrpcServer
from tests.gateway.http.serving import FakeServicer
from tests.harness import eventually
from tests.harness.http2 import DATA, END_STREAM, HEADERS, Connection, message

SECRET = "om_a-secret"
DIGEST = hashlib.sha256(SECRET.encode()).digest()
SERVICE = "openmanager.gateway.v1.FleetService"
WITHIN_S = 20.0
OK, UNAUTHENTICATED, PERMISSION_DENIED = b"grpc-status\x010", b"grpc-status\x0216", b"grpc-status\x017"
"""As header fields have them."""


def known(role: int, *, ends_ms: float = math.inf) -> dict[bytes, tuple[Caller, float]]:
    """What a table has of one who shows SECRET."""
    return {DIGEST: (Caller.of("ada", role, "token", digest=DIGEST), ends_ms)}


@pytest_asyncio.fixture
async def table() -> AsyncIterator[AccessTable]:
    async with Channel("127.0.0.1:1") as channel:
        found = AccessTable(channel, SystemClock())
        found._take(known(ADMIN))
        yield found


@pytest.mark.parametrize(
    ("later", "answer", "words"),
    [
        ({}, UNAUTHENTICATED, b"the token is not valid"),
        (known(ADMIN, ends_ms=1.0), UNAUTHENTICATED, b"the token has expired"),
        (known(VIEWER), PERMISSION_DENIED, b"needs the role ADMIN"),
        (known(ADMIN), OK, b""),
    ],
    ids=["revoked", "over", "demoted", "the same"],
)
async def test_what_a_caller_may_is_asked_when_his_message_is_there(
    table: AccessTable, later: dict[bytes, tuple[Caller, float]], answer: bytes, words: bytes
) -> None:
    """He may begin as many calls as he likes, and send their messages when his token has been revoked."""
    servicer, at_the_door = FakeServicer(), list[str]()
    bound = [bind(SERVICE, servicer)]
    callers, policy = Callers(None, table, accounts=True), Policy(bound)
    server = GrpcServer(
        bound,
        Interception(grpc_authenticator(callers, policy, Admission(SystemClock()))),
        knows=noting(known_to(callers, policy), at_the_door),
    )
    try:
        async with await Connection.open(await server.start("127.0.0.1:0")) as connection, asyncio.timeout(WITHIN_S):
            stream = connection.call(f"/{SERVICE}/DeleteServer", [("authorization", f"Bearer {SECRET}")])
            reading = asyncio.create_task(fields_of(connection, stream))
            await eventually(lambda: bool(at_the_door), WITHIN_S)
            table._take(later)
            request = fleet_pb2.DeleteServerRequest(id="web-01").SerializeToString()
            connection.send(DATA, END_STREAM, stream, message(len(request), request))
            fields = await reading
        assert answer in fields and words in fields
        assert len(servicer.requests) == (answer == OK)
    finally:
        await server.stop(0)


async def fields_of(connection: Connection, stream: int) -> bytes:
    """All header fields of the answer to a call."""
    fields = b""
    while (got := await connection.until(HEADERS, stream=stream)) is not None:
        fields += got.payload
        if got.flags & END_STREAM:
            break
    return fields


def noting(knows: Knows, asked: list[str]) -> Knows:
    def known_or_not(method: str, metadata: Metadata) -> bool:
        asked.append(method)
        return knows(method, metadata)

    return known_or_not
