"""Which calls become audit events, what these say, and that no change is acknowledged without one; over real gRPC."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fleet.audit.event import Event
from fleet.audit.log import AuditLog
from gateway.audit import Audit, audited, is_audited, left_behind, own_file, target_of, telling
from openmanager.gateway.v1 import access_pb2, ai_pb2, audit_pb2, fleet_pb2, ingest_pb2
from runtime import audited as notes
from runtime import caller
from runtime.caller import Caller
from runtime.channel import Channel, calling
from runtime.clock import ManualClock, SystemClock
from runtime.errors import Internal, NotFound, OpenManagerError, PermissionDenied, ResourceExhausted, Unavailable
from runtime.interception import CallContext, Interception
from runtime.server import GrpcServer, bind
from tests.harness import eventually
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoStub

ADA = Caller(name="ada", role="ADMIN", authentication="token")
ACTION = "openmanager.test.v1.EchoService"


class Made:
    """A server whose calls are audited, a caller's stub, and the events."""

    def __init__(self, log: AuditLog, events: list[Event], stub: EchoStub, servicer: EchoServicer) -> None:
        self.log, self.events, self.stub, self.servicer = log, events, stub, servicer

    async def counted(self) -> list[Event]:
        """The events, those of calls that are counted too, as if the minute were over."""
        await self.log._count(before_us=2**62)
        await eventually(lambda: self.log.lag.events == 0)
        return self.events


@contextlib.asynccontextmanager
async def auditing(folder: Path, get: Any = None, authenticator: Any = None) -> AsyncIterator[Made]:
    events: list[Event] = []

    async def ship(shipped: Sequence[Event]) -> None:
        events.extend(shipped)

    def authenticate(_method: str, _context: CallContext) -> Any:
        return ADA

    servicer = EchoServicer(get)
    clock = ManualClock()  # refused calls are counted by the minute, which is not to be over in the middle of a test
    async with AuditLog(folder / "audit.db", "gateway", clock=clock, limit_bytes=1 << 20, ship=ship) as log:
        audit = Audit(log, clock)
        checked = telling(authenticator or authenticate, audit.refused_call, lambda _context: ADA)
        server = GrpcServer([audited(bind(SERVICE, servicer), audit)], Interception(checked))
        address = await server.start("127.0.0.1:0")
        try:
            async with Channel(address) as channel:
                yield Made(log, events, EchoStub(channel.grpc), servicer)
        finally:
            await server.stop(0)


async def test_a_change_is_an_event_with_who_what_whence_and_how_it_was_before(tmp_path: Path) -> None:
    def change(request: Any, _context: Any) -> Any:
        notes.note(target="server-1", before={"role": "web"}, after={"role": "db"})
        return request

    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with auditing(tmp_path, change) as made:
        await made.stub.Create(Echo(), metadata=(("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),))
        await made.stub.Get(Echo())
        (event,) = await made.counted()
    assert (event.actor, event.role, event.authentication, event.address) == ("ada", "ADMIN", "token", "127.0.0.1")
    assert (event.action, event.target, event.code, event.reason) == (f"{ACTION}.Create", "server-1", "OK", "")
    assert (event.before, event.after, event.trace_id) == ('{"role":"web"}', '{"role":"db"}', trace_id)


async def test_a_change_is_answered_after_its_event_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()
    append = AuditLog.append

    async def slow(self: AuditLog, said: Any) -> Any:
        await release.wait()
        return await append(self, said)

    monkeypatch.setattr(AuditLog, "append", slow)
    async with auditing(tmp_path) as made:
        call = made.stub.Create(Echo())
        await eventually(lambda: made.servicer.calls == 1)
        assert not (await asyncio.wait({asyncio.ensure_future(call.code())}, timeout=0.2))[0]
        release.set()
        await call


async def test_what_cannot_be_journaled_is_not_done(tmp_path: Path) -> None:
    async with auditing(tmp_path) as made:
        made.log._fault = ResourceExhausted("the disk is full", reason="DISK_FULL")
        with pytest.raises(ResourceExhausted, match="nothing is changed that cannot be recorded"):
            async with calling("gateway"):
                await made.stub.Create(Echo())
        assert made.servicer.calls == 0
        await made.stub.Get(Echo())  # reading goes on


async def test_a_change_that_could_not_be_recorded_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: AuditLog, said: Any) -> Any:
        raise Unavailable("the disk failed", reason="STORAGE_FAILED")

    monkeypatch.setattr(AuditLog, "append", fail)
    async with auditing(tmp_path) as made:
        with pytest.raises(Unavailable) as caught:
            async with calling("gateway"):
                await made.stub.Create(Echo())
        assert caught.value.reason == "AUDIT_UNAVAILABLE"


@pytest.mark.parametrize(
    ("error", "code", "count"),
    [
        (NotFound("no such echo"), "NOT_FOUND", 3),  # it changed nothing: one event for all
        (Internal("half done"), "INTERNAL", 1),
        (ZeroDivisionError(), "INTERNAL", 1),
        (Unavailable("away", reason="PEER_UNAVAILABLE"), "UNAVAILABLE", 1),
    ],
)
async def test_a_change_that_failed_is_an_event_too(tmp_path: Path, error: Exception, code: str, count: int) -> None:
    def fail(_request: Any, _context: Any) -> Any:
        raise error

    async with auditing(tmp_path, fail) as made:
        for _ in range(3):
            with contextlib.suppress(OpenManagerError):
                async with calling("gateway"):
                    await made.stub.Create(Echo())
        events = await made.counted()
    assert [(event.code, event.count) for event in events] == [(code, count)] * (3 // count)


async def test_what_a_stranger_did_not_bring_about_is_counted(tmp_path: Path) -> None:
    async def fail(_request: Any, _context: Any) -> Any:
        if made.servicer.calls < 4:
            raise Unavailable("away", reason="PEER_UNAVAILABLE")
        await asyncio.sleep(60)

    async with auditing(tmp_path, fail, lambda _method, _context: Caller(name="anybody")) as made:
        for _ in range(3):
            with pytest.raises(Unavailable):
                async with calling("gateway"):
                    await made.stub.Create(Echo())
        call = made.stub.Create(Echo())
        await eventually(lambda: made.servicer.calls == 4)
        call.cancel()

        async def is_told() -> bool:
            return {event.reason for event in await made.counted()} == {"PEER_UNAVAILABLE", "CALLER_LEFT"}

        await eventually(is_told)
    assert sum(event.count for event in made.events) == 4 and {event.actor for event in made.events} == {"anybody"}
    assert len(made.events) == 2


async def test_a_change_that_changed_nothing_is_counted(tmp_path: Path) -> None:
    def idle(request: Any, _context: Any) -> Any:
        notes.nothing_changed()
        return request

    notes.nothing_changed()  # outside of a call it does nothing
    async with auditing(tmp_path, idle) as made:
        for _ in range(3):
            await made.stub.Create(Echo())
        assert not made.events and made.log.lag.events == 0
        events = await made.counted()
    assert [(event.actor, event.code, event.count) for event in events] == [("ada", "OK", 3)]


async def test_a_change_whose_caller_left_is_an_event_too(tmp_path: Path) -> None:
    async def wait(_request: Any, _context: Any) -> Any:
        await asyncio.sleep(60)

    async with auditing(tmp_path, wait) as made:
        call = made.stub.Create(Echo())
        await eventually(lambda: made.servicer.calls == 1)
        call.cancel()
        await eventually(lambda: [event.reason for event in made.events] == ["CALLER_LEFT"])


async def test_streams_of_metrics_are_counted_and_other_streams_recorded_when_they_begin(tmp_path: Path) -> None:
    async with auditing(tmp_path) as made:
        for _ in range(3):
            assert len([answer async for answer in made.stub.Chat(iter([Echo()] * 5))]) == 5
        watch = made.stub.Watch(Echo())
        await watch.read()
        await eventually(lambda: [event.action for event in made.events] == [f"{ACTION}.Watch"])
        watch.cancel()
        events = await made.counted()
    assert [(event.action, event.count) for event in events] == [(f"{ACTION}.Watch", 1), (f"{ACTION}.Chat", 3)]


async def test_what_a_stream_of_metrics_is_refused_is_told_beside_that_it_began(tmp_path: Path) -> None:
    def refuse(_request: Any, _context: Any) -> Any:
        raise PermissionDenied("not your server", reason="OUT_OF_SCOPE")

    async with auditing(tmp_path, refuse) as made:
        for _ in range(2):
            with pytest.raises(PermissionDenied):
                async with calling("gateway"):
                    _ = [answer async for answer in made.stub.Chat(iter([Echo()]))]
        events = await made.counted()
    found = {(event.action, event.actor, event.code, event.reason, event.count) for event in events}
    assert found == {
        (f"{ACTION}.Chat", "ada", "OK", "", 2),
        (f"{ACTION}.Chat", "ada", "PERMISSION_DENIED", "OUT_OF_SCOPE", 2),
    }


async def test_what_a_method_that_only_reads_refuses_itself_is_counted(tmp_path: Path) -> None:
    class Fleet:
        async def ListServers(self, request: fleet_pb2.ListServersRequest, _context: object) -> bytes:
            if request.show_deleted:
                raise PermissionDenied("not for who sees some", reason="SCOPE_TOO_NARROW")
            raise NotFound("nothing")

    events: list[Event] = []

    async def ship(shipped: Sequence[Event]) -> None:
        events.extend(shipped)

    async with AuditLog(tmp_path / "audit.db", "gateway", clock=SystemClock(), limit_bytes=1 << 20, ship=ship) as log:
        service = bind(fleet_pb2.DESCRIPTOR.services_by_name["FleetService"], Fleet())
        method = audited(service, Audit(log, SystemClock())).handlers["ListServers"].unary_unary
        assert method is not None
        for request in (fleet_pb2.ListServersRequest(show_deleted=True), fleet_pb2.ListServersRequest()):
            with pytest.raises(OpenManagerError):
                await method(request, Peer())
        await log._count(before_us=2**62)
        await eventually(lambda: len(events) == 1)
    assert (events[0].action.rpartition(".")[2], events[0].address) == ("ListServers", "192.0.2.1")
    assert events[0].reason == "SCOPE_TOO_NARROW"


class Peer:
    def peer(self) -> str:
        return "ipv4:192.0.2.1:4711"


async def test_calls_refused_at_the_door_are_one_event(tmp_path: Path) -> None:
    def refuse(_method: str, _context: CallContext) -> Any:
        raise PermissionDenied("this needs the role ADMIN", reason="ROLE_REQUIRED")

    async with auditing(tmp_path, authenticator=refuse) as made:
        for method in (made.stub.Get, made.stub.Create, made.stub.Create):
            with pytest.raises(PermissionDenied):
                async with calling("gateway"):
                    await method(Echo())
        events = await made.counted()
    found = {(event.action, event.actor, event.address, event.reason, event.count) for event in events}
    assert found == {
        (f"{ACTION}.Get", "ada", "127.0.0.1", "ROLE_REQUIRED", 1),
        (f"{ACTION}.Create", "ada", "127.0.0.1", "ROLE_REQUIRED", 2),
    }


def test_journals_of_workers_that_are_no_more_are_shipped_by_the_first_process(tmp_path: Path) -> None:
    for number in (None, 1, 2, 3):
        own_file(tmp_path, number).parent.mkdir(exist_ok=True)
        own_file(tmp_path, number).touch()
    assert left_behind(tmp_path, None, 1) == [own_file(tmp_path, number) for number in (1, 2, 3)]
    assert left_behind(tmp_path, 1, 2) == [own_file(tmp_path, None), own_file(tmp_path, 3)]
    assert left_behind(tmp_path, 2, 2) == []


def test_what_is_audited_is_what_changes_or_exports() -> None:
    services = [
        file.DESCRIPTOR.services_by_name[name]
        for file, name in ((fleet_pb2, "FleetService"), (ingest_pb2, "IngestService"), (audit_pb2, "AuditService"))
    ]
    found = {method.name for service in services for method in service.methods if is_audited(method)}
    assert found == {
        *("CreateServer", "UpdateServer", "DeleteServer", "UndeleteServer", "WriteMetrics", "ExportAuditLog")
    }


def test_what_a_request_is_about() -> None:
    assert target_of(fleet_pb2.DeleteServerRequest(id="s-1")) == "s-1"
    assert target_of(fleet_pb2.UpdateServerRequest(server=fleet_pb2.Server(id="s-2", hostname="h"))) == "s-2"
    assert target_of(access_pb2.SetPasswordRequest(name="ada", password="secret")) == "ada"
    assert target_of(ai_pb2.RecordInteractionRequest()) == ""


def test_nothing_is_noted_outside_of_an_audited_call() -> None:
    notes.note(target="x")
    assert notes.current.get() is None
    assert caller.current.get() is None
