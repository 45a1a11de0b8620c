"""Calls that their callers begin and do not go on with for as long as they like."""

import asyncio
import hashlib
import logging
import math
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from fleet.access import ADMIN, VIEWER, Caller
from gateway.access.callers import Callers, exchange_authenticator, grpc_authenticator, known_to
from gateway.access.policy import Policy
from gateway.access.table import AccessTable
from gateway.admission import Admission
from gateway.http import app
from gateway.http.exchange import MAX_OPEN_BODY_BYTES
from openmanager.gateway.v1 import fleet_pb2
from runtime import streams
from runtime.channel import Channel
from runtime.clock import SystemClock
from runtime.doorman import Knows, Metadata
from runtime.handlers import bind
from runtime.interception import Interception
from runtime.server import GrpcServer
from runtime.waiting import Waiting
from tests.gateway.http.serving import FakeServicer, bound_services, read_answer, serving
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


async def test_what_a_caller_may_is_asked_when_his_body_is_there(table: AccessTable) -> None:
    callers = Callers(None, table, accounts=True)
    async with serving(callers=callers) as served, asyncio.timeout(WITHIN_S):
        for later, words in (
            ({}, "TOKEN_INVALID"), (known(VIEWER), "ACCESS_CHANGED"), (known(ADMIN), "web-01"),
        ):  # fmt: skip
            table._take(known(ADMIN))
            head = {"authorization": f"Bearer {SECRET}", "content-length": "15"}
            reader, writer = await served.send("POST", "/v1/servers", b'{"id":', head)
            await eventually(lambda: served.app.in_flight == 1, WITHIN_S)
            table._take(later)
            writer.write(b'"web-01"}')
            answer = await read_answer(reader)
            assert words in answer.body.decode(), answer
            writer.close()
            await eventually(lambda: not served.app.in_flight, WITHIN_S)
        assert len(served.servicer.requests) == 1


async def test_a_body_that_has_not_come_takes_no_place_of_those_who_wait_for_a_store() -> None:
    """Of half log-ins each stranger may begin some: nobody could log in, nor ask who he is, while they lasted."""
    waiting = Waiting(2, setting="GATEWAY_MAX_WAITING_CALLS")
    async with serving(token=SECRET, interception=Interception(waiting=waiting)) as served, asyncio.timeout(WITHIN_S):
        begun = [await served.send("POST", "/v1/session", b"{", {"content-length": "100"}) for _ in range(2)]
        await eventually(lambda: served.app.in_flight == len(begun), WITHIN_S)
        answer = await served.get("/v1/tokens", authorization=f"Bearer {SECRET}")
        assert answer.status == 501, answer  # the played service does not have it, but was asked
        for _, writer in begun:
            writer.close()


async def test_who_may_not_go_on_and_does_not_read_goes_all_the_same(
    table: AccessTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He would keep his places among watchers and calls for ever, by a token that was revoked for it."""
    monkeypatch.setattr(streams, "TAKEN_WITHIN_S", 0.2)
    servicer = FakeServicer()
    bound = [bind(SERVICE, servicer)]
    callers = Callers(None, table, accounts=True)
    interception = Interception(grpc_authenticator(callers, Policy(bound), Admission(SystemClock())))
    server = GrpcServer(bound, interception)
    try:
        async with await Connection.open(await server.start("127.0.0.1:0")) as connection, asyncio.timeout(WITHIN_S):
            stream = connection.call(f"/{SERVICE}/WatchFleet", [("authorization", f"Bearer {SECRET}")])
            connection.send(DATA, END_STREAM, stream, message(0))
            await sent_as_much_as_fits(servicer)
            table._take({})
            await interception.end_streams_of(table.over)
            await eventually(lambda: not servicer.running, WITHIN_S)
    finally:
        await server.stop(0)


async def test_so_it_is_over_http(
    table: AccessTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streams, "TAKEN_WITHIN_S", 0.2)
    callers = Callers(None, table, accounts=True)
    interception = Interception(exchange_authenticator(callers, Policy(bound_services(FakeServicer()))))
    async with serving(callers=callers, interception=interception) as served, asyncio.timeout(WITHIN_S):
        _, writer = await served.send("GET", "/v1/fleet/watch", headers={"authorization": f"Bearer {SECRET}"})
        await sent_as_much_as_fits(served.servicer)
        table._take({})
        await interception.end_streams_of(table.over)
        await eventually(lambda: not served.servicer.running and not served.app.in_flight, WITHIN_S)
        writer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def sent_as_much_as_fits(servicer: FakeServicer) -> None:
    """Has a watcher sent messages until whoever does not read holds the next one up."""
    large = fleet_pb2.WatchFleetResponse(version="e-1", servers=[fleet_pb2.Server(id="x" * 200_000)] * 10)
    for _ in range(20):
        servicer.ticks.put_nowait(large)
    await eventually(lambda: servicer.ticks.qsize() < 20, WITHIN_S)
    left = 0
    while left != servicer.ticks.qsize():
        left = servicer.ticks.qsize()
        await asyncio.sleep(0.2)
    assert left and servicer.running == 1


@pytest.mark.parametrize("bound", ["MAX_OPEN_CALLS", "MAX_OPEN_CALLS_OF_ADDRESS"])
async def test_half_log_ins_leave_requests_to_who_is_known(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_CONCURRENT_CALLS", 4)
    monkeypatch.setattr(app, bound, 2)
    async with serving(token=SECRET) as served, asyncio.timeout(WITHIN_S):
        half = ("POST", "/v1/session", b"{", {"content-length": "100"})
        begun = [await served.send(*half) for _ in range(2)]
        await eventually(lambda: served.app.in_flight == 2, WITHIN_S)
        begun += [await served.send(*half) for _ in range(2)]
        for reader, _ in begun[2:]:
            refused = await read_answer(reader)
            assert refused.status == 429 and "MAX_OPEN_CALLS" in refused.body.decode(), refused
        assert (await served.get("/v1/fleet/summary", authorization=f"Bearer {SECRET}")).status == 200
        for _, writer in begun:
            writer.close()
        await eventually(lambda: not served.app.in_flight and not served.app._open, WITHIN_S)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_stranger_sends_no_more_than_a_log_in_takes(chunked: bool) -> None:
    body = b'{"password":"%b"}' % (b"x" * MAX_OPEN_BODY_BYTES)
    head = {"content-length": "", "transfer-encoding": "chunked"} if chunked else {}
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    async with serving(token=SECRET) as served, asyncio.timeout(WITHIN_S):
        for path in ("/v1/session", "/v1/users:setUp"):
            reader, writer = await served.send("POST", path, sent, head)
            answer = await read_answer(reader)
            assert answer.status == 413 and "MAX_OPEN_BODY_BYTES" in answer.body.decode(), answer
            writer.close()


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
