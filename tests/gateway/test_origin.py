"""From where calls come: of a connection, or what a trusted proxy says, and nobody else."""

from dataclasses import dataclass

import pytest

from gateway.access.callers import LOCAL_ADMINISTRATOR, TOKEN_HOLDER, Callers, grpc_authenticator
from gateway.access.origin import Origin
from gateway.access.policy import Policy
from gateway.admission import Admission
from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from runtime.channel import Channel, calling
from runtime.clock import ManualClock
from runtime.errors import PermissionDenied, Unauthenticated
from runtime.handlers import bind
from runtime.interception import Interception
from runtime.server import GrpcServer
from tests.gateway.http.serving import FakeServicer, serving

TOKEN = "a-token-of-some-length"
HEADER = "x-forwarded-for"
CHAINS = (["198.51.100.1, 192.0.2.7"], ["198.51.100.1", "192.0.2.7"])
"""What a caller's own header becomes: some proxies add to it, others add one more of the name."""


@pytest.mark.parametrize(
    ("host", "forwarded", "caller"),
    [
        ("10.1.2.3", ["192.0.2.7"], "192.0.2.7"),
        ("10.1.2.3", CHAINS[0], "192.0.2.7"),
        ("10.1.2.3", CHAINS[1], "192.0.2.7"),
        ("10.1.2.3", ["192.0.2.7", "nonsense"], "10.1.2.3"),
        ("10.1.2.3", ["::ffff:192.0.2.7"], "192.0.2.7"),
        ("10.1.2.3", ["2001:DB8::0:7"], "2001:db8::7"),
        ("10.1.2.3", ["nonsense"], "10.1.2.3"),
        ("10.1.2.3", [], "10.1.2.3"),
        ("172.16.0.1", ["192.0.2.7"], "172.16.0.1"),
        ("", ["192.0.2.7"], ""),
    ],
)
def test_a_trusted_proxy_is_believed_and_nobody_else(host: str, forwarded: list[str], caller: str) -> None:
    assert Origin("10.0.0.0/8").of(host, forwarded) == caller
    assert Origin(None).of(host, forwarded) == host


@pytest.mark.parametrize(
    ("proxy", "address"), [("127.0.0.0/8", "192.0.2.7"), ("10.0.0.0/8", "127.0.0.1"), (None, "127.0.0.1")]
)
@pytest.mark.parametrize("chain", CHAINS, ids=["one-header", "two-headers"])
async def test_rates_and_refusals_count_for_the_caller_and_not_for_the_proxy(
    proxy: str | None, address: str, chain: list[str]
) -> None:
    origin, admission, refused = Origin(proxy), Admission(ManualClock(), rate=1.0), list[str]()
    options = {"origin": origin, "admission": admission, "token": TOKEN}
    told = {HEADER: f"\r\n{HEADER}: ".join(chain)}
    async with serving(**options, refused=lambda _rpc, scope, *_: refused.append(scope["client"][0])) as served:
        await served.get("/v1/servers", **told)
        assert refused == [address]
        for _ in range(3):
            await served.get("/v1/servers", authorization=f"Bearer {TOKEN}", **told)
        assert refused == [address] * 2 and list(admission._buckets) == [address]
    servicer = bind("openmanager.gateway.v1.FleetService", FakeServicer())
    callers, seen = Callers(TOKEN, None, origin=origin), list[str]()
    authenticate = grpc_authenticator(callers, Policy([servicer]), Admission(ManualClock()))

    def noting(method: str, context: object) -> object:
        seen.append(callers.known(context).address)  # type: ignore[arg-type]
        found = authenticate(method, context)  # type: ignore[arg-type]
        seen.append(found.address or "127.0.0.1")
        return found

    server = GrpcServer([servicer], Interception(noting))
    async with Channel(await server.start("127.0.0.1:0")) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
        await stub.GetFleetSummary(
            fleet_pb2.GetFleetSummaryRequest(),
            metadata=(*((HEADER, each) for each in chain), ("authorization", f"Bearer {TOKEN}")),
        )
        assert seen == [address] * 2
    await server.stop(0)


@pytest.mark.parametrize(
    ("header", "reason"),
    [("x-forwarded-for", "PROXIED"), ("x-forwarded-proto", "PROXIED"), ("forwarded", "PROXIED"),
     ("origin", "ORIGIN_FOREIGN")],
)  # fmt: skip
async def test_without_a_token_nobody_behind_a_local_proxy_is_an_administrator(header: str, reason: str) -> None:
    servicer = bind("openmanager.gateway.v1.FleetService", FakeServicer())
    authenticate = grpc_authenticator(Callers(None, None), Policy([servicer]), Admission(ManualClock()))
    server = GrpcServer([servicer], Interception(authenticate))
    async with Channel(await server.start("127.0.0.1:0")) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel.grpc)
        await stub.GetFleetSummary(fleet_pb2.GetFleetSummaryRequest())
        with pytest.raises(PermissionDenied) as refused:
            async with calling("gateway"):
                await stub.GetFleetSummary(fleet_pb2.GetFleetSummaryRequest(), metadata=((header, "127.0.0.1"),))
        assert refused.value.reason == reason
    await server.stop(0)


@dataclass
class CallFrom:
    """A gRPC call's context, as far as who may come in looks at it."""

    address: str

    def peer(self) -> str:
        return self.address

    def invocation_metadata(self) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    "peer", ["ipv4:192.0.2.7:50", "ipv4:10.0.0.1:50", "ipv6:[2001:db8::1]:50", "ipv4:128.0.0.1:50"]
)
def test_without_a_token_nobody_comes_in_from_elsewhere(peer: str) -> None:
    servicer = bind("openmanager.gateway.v1.FleetService", FakeServicer())
    authenticate = grpc_authenticator(Callers(None, None), Policy([servicer]), Admission(ManualClock()))
    method = "/openmanager.gateway.v1.FleetService/ListServers"
    with pytest.raises(PermissionDenied, match="on this machine"):
        authenticate(method, CallFrom(peer))  # type: ignore[arg-type]
    for here in ("ipv4:127.0.0.1:50", "ipv6:[::1]:50", "unix:"):
        assert authenticate(method, CallFrom(here)) == LOCAL_ADMINISTRATOR  # type: ignore[arg-type]


def test_a_token_is_shown_as_a_bearer_and_in_no_other_way() -> None:
    callers = Callers(TOKEN, None)
    for shown in (f"Bearer {TOKEN}", f"bearer  {TOKEN} "):
        assert callers.by_header(shown) == TOKEN_HOLDER
    for shown in (
        f"Basic {TOKEN}",
        TOKEN,
        f" {TOKEN}",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
    ):
        with pytest.raises(Unauthenticated) as refused:
            callers.by_header(shown)
        assert refused.value.reason == "TOKEN_INVALID"
