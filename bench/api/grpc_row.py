"""Row `grpc`: GetServer with 511 metrics, in a closed loop, against a bare server with the same bytes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Final

from bench.api.checks import GET_SERVER, GrpcReader, checking
from bench.api.generators import Counted, h2load, missing
from bench.api.judged import Judged, judge
from bench.api.product import BEARER, Gateway, beside, gateway, tell
from bench.api.size import Bench
from bench.api.turn import BARE, GATEWAY, IN_FLIGHT, Contender, Found, compete, now_ms, tell_again
from bench.peers import Server, free_port, wait
from openmanager.gateway.v1 import fleet_pb2

ROW: Final = "grpc"
WORK: Final = f"GetServer, 511 metrics, h2load, {IN_FLIGHT} in flight"
AT_LEAST: Final = 0.85


def lacking() -> str:
    """What has to be installed first."""
    return missing("h2load")


@contextmanager
def bare_server(bench: Bench, name: str, reply: bytes, server_id: str) -> Iterator[Server]:
    """A bare gRPC server that answers everything with these bytes."""
    file = bench.folder / f"{name}.reply"
    file.write_bytes(reply)
    address = f"127.0.0.1:{free_port()}"
    with beside(bench.inner, name, address, "bench.api.bare", "grpc", address, str(file)) as server:
        with GrpcReader(address) as reader:
            wait(server, lambda: bool(reader.check(server_id)))
        yield server


def first_reply(front: Gateway) -> tuple[str, bytes]:
    """A server that the gateway knows once it has been told its fleet, and what it answers about it."""
    tell(front, 0, now_ms())
    server_id = front.mix.server_ids[0]
    with GrpcReader(front.address) as reader:
        return server_id, reader.check(server_id)


def measure(bench: Bench) -> Found:
    """Calls a second."""
    size = replace(bench.size, rounds=bench.size.rounds * 3, seconds=bench.size.seconds / 2)  # as in `http_rows`
    bench = replace(bench, size=size)
    with ExitStack() as stack:
        front = stack.enter_context(gateway(bench.inner, "gateway-grpc"))
        server_id, reply = first_reply(front)
        bare = stack.enter_context(bare_server(bench, "bare-grpc", reply, server_id))
        request = fleet_pb2.GetServerRequest(id=server_id).SerializeToString()

        def loading(address: str) -> Callable[[], Counted]:
            reader = stack.enter_context(GrpcReader(address))

            def load() -> Counted:
                size = len(reader.check(server_id))
                with checking(lambda: reader.check(server_id)):
                    return h2load(
                        address,
                        GET_SERVER,
                        request,
                        dict(BEARER),
                        in_flight=IN_FLIGHT,
                        seconds=bench.size.seconds,
                        reply_bytes=size,
                        scratch=bench.folder,
                    )

            return load

        contenders = {
            GATEWAY: Contender(load=loading(front.address), processes=front.processes, before=tell_again(front)),
            BARE: Contender(load=loading(bare.address), processes=[bare]),
        }
        return compete(bench, ROW, contenders) | {"reply_bytes": len(reply)}


def judged(found: Found) -> list[Judged]:
    """At least so many of the bare server's calls."""
    rates, costs = found["rates"], found["server_cpu_us_a_call"]
    remark = f"{costs[GATEWAY]:.0f} us of processor a call, {costs[BARE]:.0f} bare"
    return [judge(ROW, WORK, "bare grpc.aio", "calls/s", rates[GATEWAY], rates[BARE], AT_LEAST, remark=remark)]
