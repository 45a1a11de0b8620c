"""History read back from a real InfluxDB equals the oracle, whatever lies in it and whatever breaks on the way."""

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fleet.model import Metric, MetricKind, MetricSet, Rows, ServerDescriptor
from runtime.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from services.timeseries.engine import Aggregation, EngineSettings, Query, SeriesResult
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.influxdb_api import InfluxTarget
from services.timeseries.remote import influxdb as module
from services.timeseries.remote import influxdb_connection as connection
from services.timeseries.remote.annotated_csv import Table, tables
from services.timeseries.remote.influxdb import InfluxHistory, TagsOf
from tests.harness import eventually
from tests.harness.fault_proxy import fault_proxy
from tests.harness.influxdb import ORG, TOKEN, InfluxServer
from tests.timeseries.engine.model import EVERYTHING, NAN, Answer, Model, assert_same, metric_set, rows
from tests.timeseries.engine.test_matrix import MIDNIGHT, Source, queries
from tests.timeseries.followers.samples import backend, descriptor

BOUNDS = EngineSettings()
SET = metric_set("cpu_usage", "requests_total")
Told = Mapping[str, ServerDescriptor]


@asynccontextmanager
async def history(
    url: str, bucket: str, *, token: str = TOKEN, bounds: EngineSettings = BOUNDS, tags_of: TagsOf | None = None
) -> AsyncIterator[InfluxHistory]:
    found = InfluxHistory(InfluxTarget(url=url, token=token, org=ORG, bucket=bucket), bounds, tags_of)
    try:
        yield found
    finally:
        await found.close()


@dataclass
class Shipped:
    """What is put into a bucket, and into the oracle."""

    url: str
    bucket: str
    model: Model

    async def ship(self, batches: Iterable[tuple[MetricSet, Rows, Told]]) -> None:
        to = backend(self.url, self.bucket)
        tagged = []
        for of_set, batch, told in batches:
            self.model.append(of_set, batch)
            tagged.append(TaggedRows(metric_set=of_set, rows=batch, descriptors=tuple(map(told.get, batch.server_ids))))
        receipt = await to.ship(tagged)
        assert not receipt.refused
        await to.close()

    async def ship_rows(
        self, of_set: MetricSet, lines: Sequence[tuple[str, int, Sequence[float]]], told: Told | None = None
    ) -> None:
        await self.ship([(of_set, rows(of_set, lines), told or {})])


@pytest.fixture
def shipped(influx: InfluxServer, bucket: str) -> Shipped:
    return Shipped(influx.url, bucket, Model())


async def results_of(found: InfluxHistory, query: Query, metrics: Mapping[str, Metric]) -> list[SeriesResult]:
    return [result async for result in found.query(query, metrics)]


async def ask(found: InfluxHistory, query: Query, metrics: Mapping[str, Metric]) -> Answer:
    """The answer in the oracle's form; asserts the order of the series and of their times."""
    results = await results_of(found, query, metrics)
    names = [(result.server_id, result.metric_key) for result in results]
    assert names == sorted(set(names))
    assert all((np.diff(result.times_ms) > 0).all() and result.times_ms.dtype == np.int64 for result in results)
    return {
        name: list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))
        for name, result in zip(names, results, strict=True)
    }


async def moves_of(server_id: str) -> Sequence[tuple[str, str]]:
    return {"a": [("staging", "web"), ("production", "web")], "b": [("", ""), ("staging", "db"), ("staging", "")]}.get(
        server_id, ()
    )


def told_at(number: int) -> Told:
    """Two servers move, each at its time; one was never told of at first; the third never is."""
    told = {"a": descriptor("a", "staging" if number < 37 else "production")}
    if number >= 20:
        told["b"] = descriptor("b", "staging", "db" if number < 51 else "")
    return told


@pytest.mark.parametrize(("seed", "rounds"), [(1, 1), pytest.param(2, 8, marks=pytest.mark.full)])
async def test_every_query_equals_the_oracle(shipped: Shipped, seed: int, rounds: int) -> None:
    source, rng = Source(seed), random.Random(seed)
    await shipped.ship([(*source.batch(number), told_at(number)) for number in range(80)])
    model = shipped.model
    part = Query(metrics=None, start_ms=MIDNIGHT - 300_000, end_ms=MIDNIGHT + 300_000)
    asked = [query for _ in range(rounds) for query in queries(rng)]
    async with history(shipped.url, shipped.bucket, tags_of=moves_of) as found:
        assert_same(await ask(found, EVERYTHING, model.metrics), model.query(EVERYTHING))
        assert_same(await ask(found, part, model.metrics), model.query(part))
        for query in asked:
            assert_same(await ask(found, query, model.metrics), model.query(query), query.aggregation)
    assert sum(bool(model.query(query)) for query in asked) > 40 * rounds


async def test_windows_are_labelled_by_their_aligned_start_and_clipped(shipped: Shipped) -> None:
    await shipped.ship_rows(SET, [("a", MIDNIGHT + at * 1_000, [float(at), float(at)]) for at in range(0, 300, 10)])
    async with history(shipped.url, shipped.bucket) as found:
        for aggregation, start_s, end_s in itertools.product(Aggregation, (0, 1, 59), (119, 121)):
            query = Query(
                metrics=("requests_total",),
                start_ms=MIDNIGHT + start_s * 1_000,
                end_ms=MIDNIGHT + end_s * 1_000,
                step_ms=60_000,
                aggregation=aggregation,
            )
            wanted = shipped.model.query(query)
            labels = [label for label, _ in wanted["a", "requests_total"]]
            assert labels[0] % 60_000 == 0 and (start_s == 59 or labels[0] <= query.start_ms), "not where it begins"
            assert_same(await ask(found, query, shipped.model.metrics), wanted, aggregation)


@pytest.mark.parametrize("knows", ["the moves", pytest.param("nothing", marks=pytest.mark.full)])
async def test_a_server_that_moves_is_one_series_and_the_later_row_wins(shipped: Shipped, knows: str) -> None:
    """After the move the last minute is sent again, with other values: both rows are in InfluxDB, in two series."""
    lines = [("a", MIDNIGHT + at * 1_000, [float(at), at * 2.0]) for at in range(0, 600, 10)]
    again = [(server, time, [value + 0.5 for value in values]) for server, time, values in lines[30:36]]
    if knows == "the moves":  # then it does not matter that the newest point of all has the earlier tags
        await shipped.ship_rows(SET, [("a", MIDNIGHT + 700_000, [9.0, 9.0])], {"a": descriptor("a", "staging")})
    await shipped.ship_rows(SET, lines[:36], {"a": descriptor("a", "staging")})
    await shipped.ship_rows(SET, again + lines[36:], {"a": descriptor("a", "production")})
    await shipped.ship_rows(SET, [("b", MIDNIGHT, [1.0, NAN])])
    asked: list[str] = []

    async def tags_of(server_id: str) -> Sequence[tuple[str, str]]:
        asked.append(server_id)
        return [("staging", "web"), ("production", "web")] if knows == "the moves" else []

    async with history(shipped.url, shipped.bucket, tags_of=tags_of) as found:
        for aggregation, step_s in itertools.product(Aggregation, (0, 60, 240)):
            metrics = ("requests_total",) if aggregation is Aggregation.RATE else None
            query = replace(EVERYTHING, metrics=metrics, step_ms=step_s * 1_000, aggregation=aggregation)
            wanted = shipped.model.query(query)
            compared = aggregation if step_s else None
            assert_same(await ask(found, query, shipped.model.metrics), wanted, compared)
        elsewhere = replace(EVERYTHING, end_ms=MIDNIGHT + 300_000, step_ms=60_000)
        asked.clear()
        assert_same(await ask(found, elsewhere, shipped.model.metrics), shipped.model.query(elsewhere), Aggregation.AVG)
        assert asked == [], "only the windows of the move are looked at"


HOSTILE = ('a" or true) or (r.server_id == "b', "${server}", 'q"uo\\te', "é ü", "a|b", "/^.*$/", "')--", "#x")


async def test_hostile_names_find_themselves_and_nothing_else(shipped: Shipped) -> None:
    secret = metric_set("secret", "secret{x}", "other")
    sets = [MetricSet(metrics=(Metric(name=name), Metric(name=name, labels=(("l", name),)))) for name in HOSTILE]
    await shipped.ship([(secret, rows(secret, [("b", MIDNIGHT, [7.0, 8.0, 9.0])]), {})])
    for of_set, name in zip(sets, HOSTILE, strict=True):
        await shipped.ship([(of_set, rows(of_set, [(name, MIDNIGHT, [1.0, 2.0])]), {})])
    async with history(shipped.url, shipped.bucket) as found:
        for name, known in itertools.product(HOSTILE, (shipped.model.metrics, {})):
            for query in (
                replace(EVERYTHING, metrics=(name,)),
                replace(EVERYTHING, metrics=(name,), server_ids=(name,)),
                replace(EVERYTHING, server_ids=(name,)),
                replace(EVERYTHING, metrics=(name,), server_ids=("b",)),
                replace(EVERYTHING, metrics=(name,), step_ms=60_000),
            ):
                wanted = shipped.model.query(query)
                assert_same(await ask(found, query, known), wanted)
        assert await ask(found, replace(EVERYTHING, server_ids=("\ud800",)), {}) == {}, "no text, so no server"


async def test_selectors_units_and_kinds(shipped: Shipped) -> None:
    of_set = MetricSet(
        metrics=(
            Metric(name="disk", unit="%", kind=MetricKind.GAUGE),
            Metric(name="disk", unit="By", kind=MetricKind.COUNTER, labels=(("mount", "/"),)),
            Metric(name="disk", unit="By", labels=(("mount", "/data"),)),
            Metric(name="disk_used", unit="By"),
            Metric(name="disk{weird"),
        )
    )
    await shipped.ship_rows(of_set, [("a", MIDNIGHT, [1.0, 2.0, 3.0, 4.0, 5.0])])
    known = {metric.key: metric for metric in of_set.metrics}
    selectors = [("disk",), ('disk{mount="/"}',), ("disk_used", "disk"), ("disk{weird",), (), ("nothing",), ("dis",)]
    async with history(shipped.url, shipped.bucket) as found:
        for selector, metrics in itertools.product(selectors, (known, {})):
            query = replace(EVERYTHING, metrics=selector)
            results = await results_of(found, query, metrics)
            assert [("a", result.metric_key) for result in results] == list(shipped.model.query(query)), selector
            for result in results:
                metric = metrics.get(result.metric_key, Metric(name=""))
                assert (result.unit, result.kind, result.resolution_ms) == (metric.unit, metric.kind, 0)
        rate = replace(EVERYTHING, metrics=("disk",), step_ms=60_000, aggregation=Aggregation.RATE)
        with pytest.raises(InvalidArgument, match="RATE wants a counter, disk is a gauge"):
            await ask(found, rate, known)
        with pytest.raises(InvalidArgument, match="starts after its end"):
            await ask(found, replace(EVERYTHING, start_ms=2, end_ms=1), known)
        assert await ask(found, replace(EVERYTHING, start_ms=5, end_ms=5), known) == {}


async def test_many_servers_come_in_order_however_they_are_asked_for(
    shipped: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOGETHER_POINTS", 60)
    monkeypatch.setattr(module, "MAX_SERVERS_TOGETHER", 5)
    monkeypatch.setattr("services.timeseries.remote.annotated_csv.FLUSH_ROWS", 3)
    told = {f"s{number}": descriptor(f"s{number}", "zyx"[number % 3]) for number in range(30)}
    lines = [(server, MIDNIGHT + at * 1_000, [float(at), 1.0]) for server in told for at in range(10)]
    await shipped.ship_rows(SET, lines, told)
    async with history(shipped.url, shipped.bucket) as found:
        for step_ms, server_ids in itertools.product((0, 2_000), (None, ("s7", "s3", "no", "s3"), tuple(told))):
            query = replace(EVERYTHING, step_ms=step_ms, server_ids=server_ids)
            assert_same(await ask(found, query, shipped.model.metrics), shipped.model.query(query), query.aggregation)


@pytest.mark.parametrize(
    ("bounds", "query", "reason"),
    [
        (EngineSettings(max_points=119), EVERYTHING, "MAX_POINTS"),
        (EngineSettings(max_points=39), replace(EVERYTHING, step_ms=3_000), "MAX_POINTS"),
        (EngineSettings(max_series=3), EVERYTHING, "MAX_SERIES"),
        (EngineSettings(max_scanned_points=119), EVERYTHING, "MAX_SCANNED_POINTS"),
        (
            EngineSettings(max_scanned_points=59),
            replace(EVERYTHING, metrics=("requests_total",), step_ms=60_000, aggregation=Aggregation.RATE),
            "MAX_SCANNED_POINTS",
        ),
    ],
)
async def test_a_bound_that_is_reached_is_said(
    shipped: Shipped, bounds: EngineSettings, query: Query, reason: str
) -> None:
    lines = [(server, MIDNIGHT + at * 1_000, [float(at), 1.0]) for server in "ab" for at in range(30)]
    await shipped.ship_rows(SET, lines)
    async with history(shipped.url, shipped.bucket, bounds=bounds) as found:
        with pytest.raises(ResourceExhausted) as caught:
            await ask(found, query, shipped.model.metrics)
        assert caught.value.reason == reason
    enough = EngineSettings(max_points=120, max_series=4, max_scanned_points=120)
    async with history(shipped.url, shipped.bucket, bounds=enough) as found:
        assert await ask(found, query, shipped.model.metrics) == shipped.model.query(query)


async def test_an_answer_that_is_too_large_to_hold_is_said(shipped: Shipped, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HELD_POINTS", 19)
    await shipped.ship_rows(SET, [("a", MIDNIGHT + at, [1.0, 2.0]) for at in range(10)])
    async with history(shipped.url, shipped.bucket) as found:
        with pytest.raises(ResourceExhausted, match="MAX_HELD_POINTS = 19"):
            await ask(found, EVERYTHING, {})


async def test_what_is_away_or_refused_is_an_outage_in_clear_words(
    influx: InfluxServer, shipped: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shipped.ship_rows(SET, [("a", MIDNIGHT, [1.0, 2.0])])
    write_only = await influx.make_token(shipped.bucket, "write")
    read_only = await influx.make_token(shipped.bucket, "read")
    wanted = shipped.model.query(EVERYTHING)

    async def said(url: str, bucket: str, token: str) -> str:
        async with history(url, bucket, token=token) as found:
            with pytest.raises(Unavailable) as caught:
                await ask(found, EVERYTHING, {})
            assert token not in str(caught.value)
            return caught.value.message

    assert "InfluxDB refuses INFLUXDB_TOKEN" in await said(influx.url, shipped.bucket, "a-wrong-token-nobody-may-see")
    assert "INFLUXDB_TOKEN may not read it" in await said(influx.url, shipped.bucket, write_only.text)
    assert "INFLUXDB_BUCKET 'nothing' does not exist" in await said(influx.url, "nothing", TOKEN)
    assert "does not answer" in await said("http://127.0.0.1:9", shipped.bucket, TOKEN)
    async with fault_proxy(influx.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        async with history(url, shipped.bucket, token=read_only.text) as found:
            assert await ask(found, EVERYTHING, {}) == wanted
            await read_only.revoke()
            with pytest.raises(Unavailable, match="INFLUXDB_TOKEN"):
                await ask(found, EVERYTHING, {})
            await read_only.restore()
            assert await ask(found, EVERYTHING, {}) == wanted
            proxy.half_open()
            with monkeypatch.context() as impatient:
                impatient.setattr(connection, "QUERY_TIMEOUT_S", 1.0)
                with pytest.raises(Unavailable, match="has not answered a query within 1 s"):
                    await ask(found, EVERYTHING, {})
            await proxy.restore()
            assert await ask(found, EVERYTHING, {}) == wanted
            await proxy.cut()
            with pytest.raises(Unavailable, match="does not answer"):
                await ask(found, EVERYTHING, {})
            await proxy.restore()
            assert await ask(found, EVERYTHING, {}) == wanted


async def large(shipped: Shipped) -> None:
    """30,000 points, 2 MB of CSV."""
    await shipped.ship_rows(SET, [("a", MIDNIGHT + at, [float(at), 2.0]) for at in range(15_000)])


async def test_an_answer_that_breaks_off_is_no_answer(
    influx: InfluxServer, shipped: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    await large(shipped)
    begun = threading.Event()

    def watched(lines: Iterable[str]) -> Iterator[Table]:
        for table in tables(lines):
            begun.set()
            yield table

    monkeypatch.setattr(module, "tables", watched)
    monkeypatch.setattr("services.timeseries.remote.annotated_csv.FLUSH_ROWS", 10)
    async with fault_proxy(influx.port) as proxy, history(f"http://127.0.0.1:{proxy.port}", shipped.bucket) as found:
        proxy.bandwidth = 300_000
        asking = asyncio.create_task(ask(found, replace(EVERYTHING, server_ids=("a",)), {}))
        await eventually(begun.is_set, within_s=20)
        proxy.reset()
        with pytest.raises(Unavailable):
            await asking


@pytest.mark.parametrize(
    "page",
    [
        b"<html>who are you?</html>",
        b'{"data": []}',
        b",result,table\r\n,_result,0\r\n",
        b",result,table,_time,_value,_field,server_id\r\n,_result\r\n",
        b"#datatype,,,,double,,\r\n,result,table,_time,_value,_field,server_id\r\n,_result,0,soon,many,cpu_usage,a\r\n",
        b"\xff\xfe\r\n",
    ],
)
async def test_a_page_that_answers_in_its_place_is_an_outage(page: bytes) -> None:
    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await stream.readuntil(b"\r\n\r\n")).decode().lower()
        await stream.readexactly(int(head.partition("content-length: ")[2].partition("\r\n")[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(page), page))
        writer.close()

    async with (
        await asyncio.start_server(serve, "127.0.0.1", 0) as server,
        history(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "bucket") as found,
    ):
        with pytest.raises(Unavailable, match="INFLUXDB_URL does not answer as InfluxDB") as caught:
            await ask(found, EVERYTHING, {})
        assert caught.value.reason == "STORE_UNREADABLE"


async def test_a_caller_that_goes_away_stops_the_work_and_harms_nobody(influx: InfluxServer, shipped: Shipped) -> None:
    await large(shipped)
    async with fault_proxy(influx.port) as proxy, history(f"http://127.0.0.1:{proxy.port}", shipped.bucket) as found:
        proxy.bandwidth = 50_000  # 40 s for all of it
        query = replace(EVERYTHING, server_ids=("a",))
        callers = [asyncio.create_task(ask(found, query, {})) for _ in range(connection.CONCURRENT + 2)]
        await eventually(lambda: proxy.accepted == connection.CONCURRENT, within_s=20)
        for caller in callers:
            caller.cancel()
        answers = await asyncio.gather(*callers, return_exceptions=True)
        assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
        await eventually(lambda: not proxy._connections, within_s=20)
        proxy.bandwidth = None
        assert await ask(found, query, {}) == shipped.model.query(query)


async def test_what_other_programs_wrote_is_left_out_or_said(influx: InfluxServer, shipped: Shipped) -> None:
    await shipped.ship_rows(SET, [("a", MIDNIGHT, [1.0, 2.0])])
    await influx.write(
        shipped.bucket,
        f'server_metrics,server_id=a note="some text",count=3i {MIDNIGHT}\n'
        f"server_metrics,host=x cpu_usage=5 {MIDNIGHT}\nelsewhere,server_id=a cpu_usage=6 {MIDNIGHT}",
    )
    async with history(shipped.url, shipped.bucket) as found:
        expected = shipped.model.query(EVERYTHING) | {("a", "count"): [(MIDNIGHT, 3.0)]}
        assert await ask(found, EVERYTHING, {}) == dict(sorted(expected.items()))
        named = replace(EVERYTHING, metrics=("cpu_usage",), step_ms=60_000)
        assert await ask(found, named, {}) == shipped.model.query(named)
        with pytest.raises(FailedPrecondition, match="InfluxDB cannot answer"):
            await ask(found, replace(named, metrics=("note",)), {})


def test_an_error_in_the_midst_of_an_answer_is_an_error() -> None:
    head = "#datatype,string,long,dateTime:RFC3339,double,string\r\n,result,table,_time,_value,server_id\r\n"
    row = ",_result,0,2023-11-14T22:13:20.001Z,1,a\r\n"
    (table,) = tables((head + row + "\r\n").splitlines(keepends=True))
    assert (table.server_id, table.times_ms.tolist(), table.values.tolist()) == ("a", [1_700_000_000_001], [1.0])
    error = "#datatype,string,string\r\n,error,reference\r\n,the engine is closed,\r\n"
    with pytest.raises(Unavailable, match="broke the answer off: the engine is closed"):
        list(tables((head + row + "\r\n" + error).splitlines(keepends=True)))
