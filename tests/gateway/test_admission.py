"""Too many calls of one caller are refused at once, and with a time to try again."""

from contextlib import suppress

import pytest

from gateway import admission as module
from gateway.access.callers import Callers, grpc_authenticator
from gateway.access.policy import Policy
from gateway.admission import Admission
from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import ManualClock
from runtime.errors import ResourceExhausted
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.gateway.http.serving import FakeServicer, serving


def let_in(admission: Admission, calls: int, host: str = "10.0.0.1") -> int:
    admitted = 0
    for _ in range(calls):
        with suppress(ResourceExhausted):
            admission.admit(host)
            admitted += 1
    return admitted


def test_each_caller_has_a_rate_and_a_burst_of_two_seconds() -> None:
    clock = ManualClock()
    admission = Admission(clock, rate=10.0)
    assert let_in(admission, 100) == 20
    assert let_in(admission, 100, "10.0.0.2") == 20, "another one has his own"
    with pytest.raises(ResourceExhausted) as refused:
        admission.admit("10.0.0.1")
    assert (refused.value.reason, refused.value.metadata["limit"]) == ("RATE_LIMITED", "GATEWAY_RATE_LIMIT")
    assert refused.value.retry_after_s == pytest.approx(0.1)
    clock.advance(0.1)
    assert let_in(admission, 100) == 1, "as it said"
    clock.advance(3_600)
    assert let_in(admission, 100) == 20


def test_without_a_rate_nobody_is_counted() -> None:
    admission = Admission(ManualClock())
    assert let_in(admission, 1_000) == 1_000 and not admission._buckets


def test_callers_are_forgotten_beyond_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CALLERS", 10)
    admission = Admission(ManualClock(), rate=1.0)
    for number in range(50):
        admission.admit(f"10.0.0.{number}")
    assert len(admission._buckets) == 10


async def test_over_http_and_grpc_it_is_a_status_with_a_time_and_pages_are_left_alone() -> None:
    clock = ManualClock()
    async with serving(admission=Admission(clock, rate=1.0)) as served:
        answers = [await served.get("/v1/fleet/summary") for _ in range(3)]
        assert [answer.status for answer in answers] == [200, 200, 429]
        assert answers[2].reason() == "RATE_LIMITED" and answers[2].headers["retry-after"] == "1"
        assert (await served.get("/healthz")).status == (await served.get("/metrics")).status == 200
    servicer = bind("openmanager.gateway.v1.FleetService", FakeServicer())
    authenticator = grpc_authenticator(Callers(None, None), Policy([servicer]), Admission(clock, rate=1.0))
    server = GrpcServer([servicer], Interception(authenticator))
    async with Channel(await server.start("127.0.0.1:0")) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
        with pytest.raises(ResourceExhausted) as refused:
            for _ in range(3):
                async with calling("gateway"):
                    await stub.GetFleetSummary(fleet_pb2.GetFleetSummaryRequest())
        assert (refused.value.reason, refused.value.retry_after_s) == ("RATE_LIMITED", 1.0)
        assert "from 127.0.0.1" in refused.value.message
    await server.stop(0)
