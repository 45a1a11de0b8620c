"""Rows `paced` and `asking`: 500 clients that ask once a second each, while the fleet is told its ticks.

`paced`: how long they wait, against the bare server under the same load, with the same ticks going through the same
gateway beside it. `asking`: what the reads cost gateway and cache together, against a gateway that asks the cache for
each read (`bench.api.asking`); the ticks come as the simulator's do, past the gateway.
"""

import statistics
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from bench.api.checks import GET_SERVER, GrpcReader, checking
from bench.api.feeder import feeding
from bench.api.grpc_row import bare_server, first_reply
from bench.api.judged import Judged, judge
from bench.api.open_loop import Load, offer
from bench.api.product import BEARER, Gateway, gateway, tree_cpu_s
from bench.api.size import Bench
from bench.api.turn import BARE, GATEWAY, Found
from bench.peers import wait
from bench.queries import turns
from openmanager.gateway.v1 import fleet_pb2

PACED, ASKING = "paced", "asking"
P50_AT_MOST: Final = 1.5
P99_AT_MOST: Final = 2.0
CPU_AT_MOST: Final = 0.70
ASKING_MODULE: Final = "bench.api.asking"
INTERVAL_S: Final = 1.0
BEFORE: Final = "before: 9-12 ms for 100 clients; aim: 3-7 ms"
ASKING_CLIENTS: Final = 200
"""At most; asking takes more than twice the processor time, and a gateway that falls behind measures its queue."""
REPLY_SHARE: Final = 0.99
"""Of the bytes of the reply that was looked at: those of other servers have names of other lengths."""


def measure_paced(bench: Bench) -> Found:
    """Milliseconds from a call's time to its answer."""
    found: dict[str, list[dict[str, float]]] = {GATEWAY: [], BARE: []}
    ticks: dict[str, list[float]] = {GATEWAY: [], BARE: []}
    with ExitStack() as stack:
        front = stack.enter_context(gateway(bench.inner, "gateway-paced"))
        server_id, reply = first_reply(front)
        bare = stack.enter_context(bare_server(bench, "bare-paced", reply, server_id))
        addresses = {GATEWAY: front.address, BARE: bare.address}
        readers = {name: stack.enter_context(GrpcReader(address)) for name, address in addresses.items()}
        for number in range(bench.size.rounds):
            for name in turns(list(addresses), number):
                with feeding(front, every_s=bench.size.tick_s) as fed:
                    load = _load(bench, front, addresses[name], len(reply))
                    # the bare server has one answer for every question
                    with checking(lambda name=name: readers[name].check(server_id)):  # type: ignore[misc]
                        found[name].append(offer(load).summary())
                ticks[name] += fed.acknowledged_ms
                one = found[name][-1]
                said = f"{name} p50 {one['p50_ms']:.2f} ms, p99 {one['p99_ms']:.2f} ms"
                bench.say(f"{PACED} round {number + 1}/{bench.size.rounds}: {said}")
    return {
        "clients": bench.size.clients,
        "tick_s": bench.size.tick_s,
        "rounds": found,
        "tick_acknowledged_p50_ms": {name: statistics.median(one) for name, one in ticks.items()},
        "median": {
            name: {key: statistics.median(one[key] for one in all_of) for key in all_of[0]}
            for name, all_of in found.items()
        },
    }


def measure_asking(bench: Bench) -> Found:
    """Processor time of gateway and cache for 1,000 reads, by how the gateway reads."""
    modules = {GATEWAY: "gateway", ASKING: ASKING_MODULE}
    found: dict[str, list[float]] = {name: [] for name in modules}
    for number in range(bench.size.rounds):
        for name in turns(list(modules), number):
            label = f"{ASKING}-{name}-{number}"
            # one at a time, from a fresh start: a gateway that stands still is sent what changes all the same
            with (
                gateway(bench.inner, label, module=modules[name]) as front,
                feeding(bench.inner, every_s=bench.size.tick_s),
                GrpcReader(front.address) as reader,
            ):
                server_id = front.mix.server_ids[0]
                wait(front.server, lambda reader=reader, one=server_id: bool(reader.check(one)))  # type: ignore[misc]
                load = replace(
                    _load(bench, front, front.address, len(reader.check(server_id))),
                    clients=min(bench.size.clients, ASKING_CLIENTS),
                )
                processes = [front.server, bench.inner.services["cache"]]
                used_s = tree_cpu_s(processes)
                calls = offer(load).made
                found[name].append((tree_cpu_s(processes) - used_s) * 1_000 / calls)
                reader.check(server_id)
            said = f"{name} {found[name][-1]:.3f} s of processor for 1,000 reads"
            bench.say(f"{ASKING} round {number + 1}/{bench.size.rounds}: {said}")
    return {
        "clients": min(bench.size.clients, ASKING_CLIENTS),
        "tick_s": bench.size.tick_s,
        "cpu_s_a_thousand": found,
        "median": {name: statistics.median(one) for name, one in found.items()},
    }


def _load(bench: Bench, front: Gateway, address: str, reply_bytes: int) -> Load:
    ids = front.mix.server_ids
    return Load(
        address=address,
        path=GET_SERVER,
        metadata=BEARER,
        messages=tuple(fleet_pb2.GetServerRequest(id=one).SerializeToString() for one in ids),
        clients=bench.size.clients,
        seconds=bench.size.seconds,
        interval_s=INTERVAL_S,
        reply_bytes=int(reply_bytes * REPLY_SHARE),
    )


def judged_paced(found: Found) -> list[Judged]:
    """Not so many times as long as the bare server's."""
    ours, bare = found["rounds"][GATEWAY], found["rounds"][BARE]
    work = f"{found['clients']} clients, 1 call/s each, 20 x 511 told every {found['tick_s']:g} s"
    rows = []
    for name, bound in (("p50", P50_AT_MOST), ("p99", P99_AT_MOST)):
        key = f"{name}_ms"
        rows.append(
            judge(
                PACED,
                f"{work}, {name}",
                "bare grpc.aio",
                "ms",
                [one[key] for one in ours],
                [one[key] for one in bare],
                bound,
                at_most=True,
                remark=BEFORE,
            )
        )
    return rows


def judged_asking(found: Found) -> list[Judged]:
    """At most so much of it."""
    ours, asking = found["cpu_s_a_thousand"][GATEWAY], found["cpu_s_a_thousand"][ASKING]
    work = f"CPU of 1,000 reads, {found['clients']} a second, 20 x 511 told every {found['tick_s']:g} s"
    return [judge(ASKING, work, "asking the cache", "s", ours, asking, CPU_AT_MOST, at_most=True)]
