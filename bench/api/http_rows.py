"""Rows `http` and `stores`: GET /v1/servers/{id} in a closed loop.

Against an empty application on the same ASGI server, with the same headers and body; and against what Prometheus and
VictoriaMetrics take to answer with the same 511 values.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from bench.api import stores
from bench.api.checks import body_of, checking, http_answer, series_values, server_values
from bench.api.generators import Counted, missing, wrk
from bench.api.judged import Judged, absent, judge
from bench.api.product import BEARER, Gateway, beside, gateway, tell
from bench.api.size import Bench
from bench.api.turn import BARE, GATEWAY, IN_FLIGHT, Contender, Found, compete, now_ms, tell_again
from bench.peers import PROGRAMS, VICTORIA, BenchError, free_port, wait

HTTP, STORES = "http", "stores"
HTTP_WORK: Final = f"GET /v1/servers/{{id}}, wrk, {IN_FLIGHT} connections"
STORES_WORK: Final = f"1 server's 511 values now, wrk, {IN_FLIGHT} connections"
HTTP_AT_LEAST: Final = 0.85
"""Turns of either side go from 20,000 to 40,000 a second, as the threads of the ASGI server happen to lie on two
cores: the median of 5 ratios was 0.83, 0.97 and 1.00 on one commit. So there are three times as many turns, half as
long."""
STORES_AT_LEAST: Final = 5.0
HEADERS: Final = dict(BEARER)

Check = Callable[[bytes], object]


def lacking() -> str:
    """What has to be installed first."""
    return missing("wrk")


def measure_http(bench: Bench) -> Found:
    """Requests a second of the gateway and of the empty application."""
    size = replace(bench.size, rounds=bench.size.rounds * 3, seconds=bench.size.seconds / 2)
    bench = replace(bench, size=size)
    with ExitStack() as stack:
        front = stack.enter_context(gateway(bench.inner, "gateway-http"))
        tell(front, 0, now_ms())
        server_id = front.mix.server_ids[0]
        path = f"/v1/servers/{server_id}"
        answer = http_answer(front.http_address, path, HEADERS)
        file = bench.folder / "bare-http.answer"
        file.write_bytes(answer)
        address = f"127.0.0.1:{free_port()}"
        arguments = ("http", address, str(file))
        bare = stack.enter_context(beside(bench.inner, "bare-http", address, "bench.api.bare", *arguments))
        wait(bare, lambda: bool(http_answer(address, path, HEADERS)))
        if _headers(same := http_answer(address, path, HEADERS)) != _headers(answer):
            raise BenchError(f"the empty application has other headers: {_headers(same)}, {_headers(answer)}")

        def check(answered: bytes) -> object:
            return server_values(answered, server_id)

        contenders = {
            GATEWAY: _reading(bench, front, path, check),
            BARE: Contender(load=_loading(bench, address, path, check), processes=[bare]),
        }
        return compete(bench, HTTP, contenders) | {"body_bytes": len(body_of(answer))}


def measure_stores(bench: Bench) -> Found:
    """Requests a second of the gateway and of each store that is there."""
    with ExitStack() as stack:
        front = stack.enter_context(gateway(bench.inner, "gateway-stores"))
        asked, tick = stack.enter_context(stores.holding(bench.folder, front.mix, now_ms()))
        tell(front, tick, now_ms())
        server_id = front.mix.server_ids[0]
        path = f"/v1/servers/{server_id}"
        ours = server_values(http_answer(front.http_address, path, HEADERS), server_id)

        def check(answered: bytes) -> None:
            if server_values(answered, server_id) != ours:
                raise BenchError("the gateway answers with other values")

        def check_store(answered: bytes) -> None:
            if series_values(answered) != ours:
                raise BenchError("a store answers with other values")

        contenders = {GATEWAY: _reading(bench, front, path, check, tick)}
        for store in asked:
            load = _loading(bench, store.server.address, store.path(server_id), check_store)
            contenders[store.server.name] = Contender(load=load, processes=[store.server])
        return compete(bench, STORES, contenders)


def _reading(bench: Bench, front: Gateway, path: str, check: Check, tick: int = 0) -> Contender:
    load = _loading(bench, front.http_address, path, check)
    return Contender(load=load, processes=front.processes, before=tell_again(front, tick))


def _loading(bench: Bench, address: str, path: str, check: Check) -> Callable[[], Counted]:
    def look() -> bytes:
        answer = http_answer(address, path, HEADERS)
        check(answer)
        return answer

    def load() -> Counted:
        least = len(body_of(look()))
        with checking(look):
            return wrk(
                f"http://{address}{path}",
                HEADERS,
                connections=IN_FLIGHT,
                seconds=bench.size.seconds,
                body_bytes=least,
                scratch=bench.folder,
            )

    return load


def _headers(answer: bytes) -> list[bytes]:
    """The names, in order: their values may tell of a moment."""
    return [line.partition(b":")[0].lower() for line in answer.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]]


def judged_http(found: Found) -> list[Judged]:
    """At least so many of the empty application's."""
    rates, costs = found["rates"], found["server_cpu_us_a_call"]
    remark = f"{costs[GATEWAY]:.0f} us of processor a request, {costs[BARE]:.0f} empty"
    return [
        judge(HTTP, HTTP_WORK, "empty ASGI", "requests/s", rates[GATEWAY], rates[BARE], HTTP_AT_LEAST, remark=remark)
    ]


def judged_stores(found: Found) -> list[Judged]:
    """So many times each store's."""
    rates = found["rates"]
    rows = []
    for name, program in ((stores.PROMETHEUS, stores.PROMETHEUS), (VICTORIA, PROGRAMS[VICTORIA])):
        if name in rates:
            rows.append(judge(STORES, STORES_WORK, name, "requests/s", rates[GATEWAY], rates[name], STORES_AT_LEAST))
        else:
            rows.append(absent(STORES, f"{STORES_WORK}, {name}", f"{program} is not on the PATH"))
    return rows
