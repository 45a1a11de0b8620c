"""Reading back from Prometheus: bounds, outages, callers that go away, answers that are none."""

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from urllib.parse import unquote_plus

import pytest

from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, ResourceExhausted, Unavailable
from services.timeseries.engine import Aggregation, Query
from services.timeseries.remote import prometheus as reader
from tests.harness import eventually
from tests.harness.fault_proxy import fault_proxy
from tests.harness.prometheus import PrometheusServer
from tests.timeseries.engine.model import metric_set, rows
from tests.timeseries.remote.prometheus_stores import CLOCK, DAY_MS, Store, ask, reading, shipped, tagged

SET = metric_set("cpu_usage", "memory_usage", "requests_total", "constant")
OTHER_SET = metric_set("requests_total", "cpu_usage", "extra")


async def test_bounds_are_said_and_nothing_is_cut(prometheus: PrometheusServer) -> None:
    of_set, at = metric_set("bound_a", "bound_b", "bound_total"), (CLOCK.now_ms() // DAY_MS - 8) * DAY_MS
    batch = rows(of_set, [("bounds", at + number * 1_000, [1.0] * 3) for number in range(100)])
    await shipped(Store(prometheus, [prometheus.write_url], []), [tagged(of_set, batch)])
    known = {metric.key: metric for metric in of_set.metrics}

    async def refused(query: Query, **bounds: int) -> tuple[str, str]:
        async with reading([prometheus.url], **bounds) as history:
            with pytest.raises(ResourceExhausted) as caught:
                [result async for result in history.query(query, known)]
            return caught.value.reason, caught.value.message

    whole = {"metrics": ("bound_a", "bound_b"), "start_ms": at, "end_ms": at + 100_000}
    assert (await refused(Query(**whole), max_points=199))[0] == "MAX_POINTS"
    assert (await refused(Query(step_ms=1_000, **whole), max_points=199))[0] == "MAX_POINTS"
    assert (await refused(Query(**whole), max_series=1))[0] == "MAX_SERIES"
    first = Query(step_ms=10_000, aggregation=Aggregation.FIRST, **whole)
    assert await refused(first, max_read_points=199) == (
        "MAX_SCANNED_POINTS",
        "the query reads back more than max_read_points = 199 points",
    )
    async with reading([prometheus.url], max_points=200, max_read_points=200, max_series=2) as history:
        for query in (Query(**whole), Query(step_ms=1_000, **whole), first):
            assert len([result async for result in history.query(query, known)]) == 2
        rate = Query(metrics=("bound_a",), start_ms=at, end_ms=at + 1, step_ms=1, aggregation=Aggregation.RATE)
        for asked in (rate, dataclasses.replace(rate, metrics=None, server_ids=("bounds",))):
            with pytest.raises(InvalidArgument, match="RATE wants a counter"):
                await ask(history, asked, known)
        for nothing in (
            Query(metrics=("bound_a",), start_ms=at, end_ms=at),
            Query(metrics=(), start_ms=at, end_ms=at + 1),
            Query(metrics=None, server_ids=(), start_ms=at, end_ms=at + 1),
        ):
            assert await ask(history, nothing, known) == {}
        with pytest.raises(ResourceExhausted, match="MAX_WINDOWS"):
            await ask(history, Query(metrics=("bound_a",), start_ms=0, end_ms=1 << 62, step_ms=1_000), known)
        endless = Query(metrics=("bound_a",), start_ms=-5, end_ms=1 << 62)
        assert len((await ask(history, endless, known))["bounds", "bound_a"]) == 100
        endless = Query(metrics=("bound_a",), start_ms=0, end_ms=1 << 62, step_ms=DAY_MS, aggregation=Aggregation.COUNT)
        assert await ask(history, endless, known) == {("bounds", "bound_a"): [(at, 100.0)]}


async def test_a_store_that_is_away_or_slow_is_not_waited_for_by_everybody(
    prometheus: PrometheusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, clock = Query(metrics=("nothing",), start_ms=0, end_ms=1_000), ManualClock()
    async with fault_proxy(prometheus.port) as proxy, reading([f"http://127.0.0.1:{proxy.port}"], clock) as history:
        assert await ask(history, query, {}) == {}
        proxy.delay_s = 60.0
        reasons = []
        with monkeypatch.context() as impatient:
            impatient.setattr(reader, "QUERY_TIMEOUT_S", 1.0)
            for _ in range(4):
                with pytest.raises(Unavailable) as caught:
                    await ask(history, query, {})
                reasons.append(caught.value.reason)
        assert reasons == ["STORE_UNAVAILABLE"] * 2 + ["CIRCUIT_OPEN"] * 2
        await proxy.restore()

        async def answered() -> bool:
            clock.advance(10)
            try:
                return await ask(history, query, {}) == {}
            except Unavailable as error:
                raise AssertionError(error.message) from error

        await eventually(answered, within_s=30)
        await proxy.cut()
        with pytest.raises(Unavailable, match="does not answer"):
            await ask(history, query, {})
        # with a second address nobody notices
        async with reading([f"http://127.0.0.1:{proxy.port}", prometheus.url]) as two:
            assert await ask(two, query, {}) == {}


async def test_a_caller_that_goes_away_stops_the_query(
    prometheus: PrometheusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "SERVERS_TOGETHER", 1)
    of_set, at = metric_set("many"), (CLOCK.now_ms() // DAY_MS - 9) * DAY_MS
    batch = rows(of_set, [(f"many-{number:03}", at, [1.0]) for number in range(300)])
    await shipped(Store(prometheus, [prometheus.write_url], []), [tagged(of_set, batch)])
    asked = []
    async with reading([prometheus.url]) as history:
        request = history._request
        monkeypatch.setattr(history, "_request", lambda *args: (asked.append(args), request(*args))[1])
        results = history.query(Query(metrics=("many",), start_ms=at, end_ms=at + 1), {})
        async with aclosing(results):  # type: ignore[type-var]
            assert (await anext(results)).server_id == "many-000"
        few = len(asked)
        assert few < 10 and asked[0][0].cancel.is_set()
        task = asyncio.create_task(ask(history, Query(metrics=("many",), start_ms=at, end_ms=at + 1), {}))
        await eventually(lambda: len(asked) > few + 5, within_s=20)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        ended = len(asked)
        assert (
            len(await ask(history, Query(metrics=("many",), server_ids=("many-007",), start_ms=at, end_ms=at + 1), {}))
            == 1
        )
        assert len(asked) <= ended + 3, "nothing of the other query is asked any more"


@pytest.mark.parametrize(
    ("status", "body", "reason", "said"),
    [
        ("401 No", "{}", "STORE_REFUSED", "PROMETHEUS_BEARER_TOKEN"),
        ("403 No", "{}", "STORE_REFUSED", "PROMETHEUS_TENANT"),
        ("404 No", "lost", "STORE_UNREADABLE", "PROMETHEUS_QUERY_URL is no base of a query API"),
        ("200 OK", "<html>", "STORE_UNREADABLE", "PROMETHEUS_QUERY_URL is no base of a query API"),
        (
            "200 OK",
            '{"status":"success","isPartial":true,"data":{"result":[]}}',
            "STORE_UNAVAILABLE",
            "a part of the store",
        ),
        (
            "200 OK",
            '{"status":"success","data":{"result":[]},"warnings":["PromQL info: a","remote_read: connection refused"]}',
            "STORE_UNAVAILABLE",
            "is away: remote_read: connection refused",
        ),
        (  # Thanos, and VictoriaMetrics' cluster, where a part of them is away
            "422 No",
            '{"status":"error","errorType":"execution","error":"expanding series: rpc error: connection refused"}',
            "STORE_UNAVAILABLE",
            "the store cannot answer: .*connection refused",
        ),
        ("503 Away", "starting", "STORE_UNAVAILABLE", "answers 503: starting"),
        ("429 Slow", "too much", "STORE_THROTTLES", "answers 429: too much"),
    ],
)
async def test_an_answer_that_is_none_says_what_to_mend(status: str, body: str, reason: str, said: str) -> None:
    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with reading(
        [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"], bearer_token="a-secret-token"
    ) as history:
        with pytest.raises(Unavailable, match=said) as caught:
            await ask(history, Query(metrics=("a",), start_ms=0, end_ms=1), {})
        assert caught.value.reason == reason and "a-secret-token" not in caught.value.message
    server.close()


@asynccontextmanager
async def answering(answer: Callable[[str, str], tuple[int, str]]) -> AsyncIterator[str]:
    """The address of a store that answers a path and fields with a status and a body."""

    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await stream.readuntil(b"\r\n\r\n")).decode()
        size = next((int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0)
        path, _, fields = head.split(" ")[1].partition("?")
        status, body = answer(path, unquote_plus(fields + (await stream.readexactly(size)).decode()))
        writer.write(f"HTTP/1.1 {status} -\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_part_that_is_away_is_no_whole_answer_of_names_either() -> None:
    """As Thanos does: what is there comes with a warning, or not at all where that is asked for."""
    whole = True

    def answer(path: str, fields: str) -> tuple[int, str]:
        data = "[]" if "/label/" in path else '{"result":[]}'
        body = f'{{"status":"success","data":{data},"warnings":["No StoreAPIs matched for this query"]}}'
        return 200 if whole or "partial_response=false" not in fields else 503, body

    async with answering(answer) as url, reading([url]) as history:
        query = Query(metrics=None, start_ms=0, end_ms=1)
        assert await ask(history, query, {}) == {}
        whole = False
        with pytest.raises(Unavailable, match="answers 503"):
            await ask(history, query, {})


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        [1],
        "text",
        {"result": None},
        {"result": ["text"]},
        {"result": [{"metric": {}, "values": [["soon", "1"]]}]},
        {"result": [{"metric": {}, "values": [[0, "many"]]}]},
        {"result": [{"metric": {}, "values": [[0]]}]},
        {"result": [{"metric": ["a"], "values": [[0, "1"]]}]},
    ],
)
@pytest.mark.parametrize("metrics", [("a",), None], ids=["series", "names"])
async def test_what_answers_like_something_else_is_an_outage(data: object, metrics: tuple[str, ...] | None) -> None:
    """Which is told in `incomplete`, beside what is held here, where a fault of ours would be all of the answer."""

    def answer(path: str, fields: str) -> tuple[int, str]:
        found: object = data
        if "vector(1)" in fields and metrics is None:
            found = {"result": []}
        elif "/label/" in path:
            found = data if data is not None else {"a": 1}
        return 200, json.dumps({"status": "success", "data": found})

    async with answering(answer) as url, reading([url]) as history:
        with pytest.raises(Unavailable, match="does not answer as a query API does") as caught:
            await ask(history, Query(metrics=metrics, server_ids=("s",), start_ms=0, end_ms=1), {})
        assert caught.value.reason == "STORE_UNREADABLE"


async def test_native_histograms_of_others_are_left_out() -> None:
    def answer(path: str, fields: str) -> tuple[int, str]:
        if "/label/" in path:
            return 200, '{"status":"success","data":["a"]}'
        own = {"metric": {"__name__": "a", "server_id": "a"}}
        if "count_over_time" in fields:
            found = [{"metric": {}, "value": [0, "2"]}]
        else:
            histogram = {"count": "1", "sum": "1", "buckets": []}
            found = [{**own, "values": [[0, "1"]]}, {**own, "histograms": [[0, histogram]]}]
        return 200, json.dumps({"status": "success", "data": {"result": found}})

    async with answering(answer) as url, reading([url]) as history:
        assert await ask(history, Query(metrics=None, start_ms=0, end_ms=1), {}) == {("a", "a"): [(0, 1.0)]}


@pytest.mark.parametrize(
    "said",
    [
        "query processing would load too many samples into memory in query execution",
        "the query exceeded the maximum number of chunks (limit: 2000000 chunks) (err-mimir-max-chunks-per-query)",
        "the query time range exceeds the limit (query length: 9000h0m0s, limit: 768h0m0s)",
        "cannot select more than -search.maxSamplesPerQuery=1000000000 samples",
    ],
)
async def test_a_query_that_is_too_large_for_the_store_is_no_outage(said: str) -> None:
    body = json.dumps({"status": "error", "errorType": "execution", "error": said})
    async with answering(lambda _path, _fields: (422, body)) as url, reading([url]) as history:
        for _ in range(3):
            with pytest.raises(ResourceExhausted, match="does not answer so large a query"):
                await ask(history, Query(metrics=("a",), start_ms=0, end_ms=1), {})


@pytest.mark.parametrize("noticed", [True, False])
async def test_a_store_that_became_another_version_is_asked_for_ranges_as_that_has_them(*, noticed: bool) -> None:
    """Ranges include their left edge before Prometheus 3: taken for one of those, it would leave out what is
    just there, as are points of whole minutes."""
    closed_left, away = True, False
    widths: list[str] = []

    def answer(_path: str, fields: str) -> tuple[int, str]:
        if away:
            return 503, "starting"
        found = []
        if "vector(1)" in fields:
            found.append({"metric": {}, "value": [0, "3" if closed_left else "2"]})
        else:
            widths.extend(re.findall(r"\[(\w+)\]", fields))
        return 200, json.dumps({"status": "success", "data": {"result": found}})

    query = Query(
        metrics=("a",), server_ids=("s",), start_ms=0, end_ms=60_000, step_ms=60_000, aggregation=Aggregation.COUNT
    )
    clock = ManualClock()
    async with answering(answer) as url, reading([url], clock) as history:
        await ask(history, query, {})
        assert widths == ["59999ms"]
        closed_left = False
        if noticed:
            away = True
            with pytest.raises(Unavailable):
                await ask(history, query, {})
            away = False
        else:
            clock.advance(reader.EDGES_KNOWN_S)
        await ask(history, query, {})
        assert widths == ["59999ms", "60000ms"]
