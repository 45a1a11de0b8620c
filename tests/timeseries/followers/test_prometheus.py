"""The Prometheus-compatible follower against real stores: everything there, once, and what is not there is counted."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fleet.status import PROBE_TIMEOUT_S, StoreMonitor, StoreState
from runtime.errors import Unavailable
from services.timeseries.engine import Engine
from services.timeseries.followers import prometheus as adapter
from services.timeseries.followers.backend import MAX_SHIP_POINTS
from services.timeseries.followers.prometheus import PrometheusBackend
from tests.harness import eventually, free_port
from tests.harness.fault_proxy import fault_proxy
from tests.harness.prometheus import PrometheusServer, StoreServer, prometheus_server
from tests.harness.victoria import VictoriaServer
from tests.timeseries.followers.prometheus_parts import SET, WIDE, backend, following, tagged
from tests.timeseries.followers.samples import CLOCK, caught_up, descriptor, rows

SERVERS = tuple(f"server-{number:02}" for number in range(20))
SECRET = "a-bearer-token-nobody-may-see"


async def test_every_point_is_there_under_the_tags_of_its_time(server: StoreServer, tmp_path: Path) -> None:
    now_ms = CLOCK.now_ms() - 60_000
    ids = tuple(f"tags-{name}" for name in SERVERS)

    def tick(number: int, servers: Sequence[str]) -> Any:
        return rows(SET, [(name, now_ms + number, [float(number)] * 3) for name in servers])

    async with following(tmp_path, server.write_url) as (engine, follower):
        told = [descriptor(name, "staging") for name in ids]
        for number in range(30):
            servers = told if number == 0 else [descriptor(ids[0], role="db")] if number == 10 else []
            await engine.append(tick(number, ids), metric_sets=(SET,), servers=servers)
        await engine.append(servers=[descriptor(ids[1], environment="", role="")])
        await engine.append(tick(30, (*ids, "never-told")))
        await caught_up(engine)
        assert follower.shipped_points == (30 * 20 + 21) * 3 and not follower.refusals
    expected = {(name, "staging", "web"): 31 * 3 for name in ids[2:]}
    expected |= {(ids[0], "staging", "web"): 10 * 3, (ids[0], "production", "db"): 21 * 3}
    expected |= {(ids[1], "staging", "web"): 30 * 3, (ids[1], "", ""): 3, ("never-told", "", ""): 3}
    if isinstance(server, VictoriaServer):
        await server.flush()
    found = await server.points(CLOCK.now_ms())
    assert {name: count for name, count in found.items() if name[0] in {*ids, "never-told"}} == expected
    (series,) = await server.ask(f'memory_usage{{server_id="{ids[0]}",environment="staging"}}[1h]', CLOCK.now_ms())
    assert [(round(at * 1000) - now_ms, value) for at, value in series["values"]] == [(n, str(n)) for n in range(10)]


async def test_a_killed_store_stops_nobody_and_gets_everything_once(
    prometheus: PrometheusServer, tmp_path: Path
) -> None:
    now_ms, number = CLOCK.now_ms() - 600_000, 0
    ids = tuple(f"kill-{name}" for name in SERVERS)
    async with following(tmp_path, prometheus.write_url) as (engine, follower):

        async def write(ticks: int, pause_s: float = 0.0) -> None:
            nonlocal number
            for _ in range(ticks):
                environment = "staging" if number < 30 else "production"
                told = [descriptor(name, environment) for name in ids] if number in (0, 30) else []
                lines = [(name, now_ms + number, [float(number)] * 511) for name in ids]
                await engine.append(rows(WIDE, lines), metric_sets=(WIDE,), servers=told)
                number += 1
                await asyncio.sleep(pause_s)

        streaming = asyncio.create_task(write(20, 0.01))
        await eventually(lambda: follower.shipped_points > 0, within_s=20)
        prometheus.kill()
        async with asyncio.timeout(60):  # who waited for the store would wait for ever
            await streaming
            await write(30)
        away = await follower.probe()
        assert "does not answer: Failed to" in away.down and away.lag_points >= 30 * 10_220
        assert away.address == prometheus.write_url
        shipped_before = follower.shipped_points
    # the follower restarts while the store is still away: the tags of what was not shipped must come back too
    async with following(tmp_path, prometheus.write_url) as (engine, follower):
        await write_one(engine, ids, now_ms + number)
        await prometheus.start()
        await caught_up(engine)
        most = 51 * 10_220 + MAX_SHIP_POINTS  # from a minute before, behind what was on its way when it went back
        assert 51 * 10_220 - shipped_before <= follower.shipped_points <= most
        assert not follower.refusals and (await follower.probe()).lag_points == 0
    counts = await prometheus.points(CLOCK.now_ms())
    of_environment = [
        sum(counts[name, environment, "web"] for name in ids) for environment in ("staging", "production")
    ]
    assert of_environment == [30 * 10_220, 21 * 10_220]


async def write_one(engine: Engine, ids: Sequence[str], at_ms: int) -> None:
    await engine.append(rows(WIDE, [(name, at_ms, [1.0] * 511) for name in ids]), metric_sets=(WIDE,))


async def test_the_status_says_whether_late_rows_are_taken(
    prometheus: PrometheusServer, strict: PrometheusServer, victoria: VictoriaServer
) -> None:
    for server, takes, version in (
        (prometheus, "takes samples that are out of order, by an hour at least", "2.0"),
        (victoria, "takes samples that are out of order, by an hour at least", "1.0"),
        (strict, "takes no samples that are out of order, late rows are refused: set storage.tsdb.out_of_order", "2.0"),
    ):
        store = backend(server.write_url, query_urls=[server.query_url()])
        before = await store.probe()
        assert before.note == "", "a sample of now would make an hour's backlog too old"
        # an hour's backlog, which a strict Prometheus takes only as long as nothing newer is there
        await store.ship([tagged([(f"order-{at}", CLOCK.now_ms() - at, [1.0] * 3) for at in (5_000, 4_000)])])
        found = await store.probe()
        assert found.note.startswith(takes)
        assert store.address == server.write_url
        assert found.version.startswith("Prometheus API ") and found.version.endswith(f", remote write {version}")
        await store.close()


async def test_a_store_whose_clock_of_samples_lags_loses_no_backlog_to_the_probe(tmp_path: Path) -> None:
    """Prometheus takes nothing an hour older than its newest sample: the probe must not write that one."""
    async with (
        prometheus_server(out_of_order="0s") as server,
        following(tmp_path, server.write_url) as (engine, follower),
    ):
        begin_ms = CLOCK.now_ms() - 6 * 3_600_000
        for hour in range(6):
            await engine.append(rows(SET, [("a", begin_ms + hour * 3_600_000, [1.0] * 3)]), metric_sets=(SET,))
            await caught_up(engine)
            await follower.probe()
        assert follower.shipped_points == 18 and not follower.refusals


class PlayedStore:
    """Answers as it is told to; what was asked is kept."""

    def __init__(self, *answers: tuple[str, dict[str, str]]) -> None:
        self.answers = list(answers)
        self.delay_s = 0.0
        self.asked: list[dict[str, str]] = []
        self.words = "words"
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().splitlines()[1:-1]
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                await reader.readexactly(int(headers.get("content-length", "0")))
                self.asked.append(headers)
                await asyncio.sleep(self.delay_s)
                status, more = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                text = "".join(f"{name}: {value}\r\n" for name, value in more.items())
                length = f"Content-Length: {len(self.words)}"
                writer.write(f"HTTP/1.1 {status}\r\n{length}\r\n{text}\r\n{self.words}".encode())
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def played(*answers: tuple[str, dict[str, str]]) -> AsyncIterator[PlayedStore]:
    store = PlayedStore(*answers)
    server = await asyncio.start_server(store.serve, "127.0.0.1", 0)
    store.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/write"
    yield store
    server.close()


WRITTEN = "X-Prometheus-Remote-Write-Samples-Written"


@pytest.mark.parametrize(
    ("answers", "versions", "shipped"),
    [
        ([("204 No", {WRITTEN: "0"}), ("204 No", {WRITTEN: "3"})], ["2.0.0", "2.0.0"], 3),
        ([("204 No", {})], ["2.0.0", "0.1.0"], 3),
        ([("415 No", {}), ("200 OK", {})], ["2.0.0", "0.1.0"], 3),
        ([("400 No", {}), ("200 OK", {})], ["2.0.0", "0.1.0"], 3),
        ([("204 No", {WRITTEN: "0"}), ("415 No", {}), ("204 No", {})], ["2.0.0", "2.0.0", "0.1.0"], 3),
        ([("204 No", {WRITTEN: "0"}), ("204 No", {}), ("204 No", {})], ["2.0.0", "2.0.0", "0.1.0"], 3),
    ],
)
async def test_only_a_receiver_that_counts_is_written_to_by_2_0(
    answers: list[tuple[str, dict[str, str]]], versions: list[str], shipped: int
) -> None:
    async with played(*answers) as store:
        writing = backend(store.url)
        receipt = await writing.ship([tagged([("a", 1, [1.0, 2.0, 3.0])])])
        assert (receipt.shipped, dict(receipt.refused)) == (shipped, {})
        assert [headers["x-prometheus-remote-write-version"] for headers in store.asked] == versions
        await writing.close()


async def test_samples_that_thanos_calls_a_conflict_are_refused_and_stop_nobody() -> None:
    """It answers so to a request with a late sample, or with one that it had taken before it fell silent."""
    answers = ("200 OK", "409 Conflict", "200 OK", "409 Conflict", "200 OK", "409 Conflict")
    async with played(*((status, {}) for status in answers)) as store:
        store.words = "store locally for endpoint 127.0.0.1:10901: add 1 samples: out of order sample"
        writing = backend(store.url)
        receipt = await writing.ship([tagged([("a", 1, [1.0, 2.0, 3.0])])])
        assert (receipt.shipped, dict(receipt.refused)) == (2, {"OUT_OF_ORDER": 1})
        await writing.close()


async def test_a_probe_of_a_store_that_does_not_speak_2_0_any_more_finds_it_up() -> None:
    answers = [("204 No", {WRITTEN: "0"}), ("204 No", {WRITTEN: "0"}), ("415 No", {}), ("200 OK", {})]
    async with played(*answers) as store:
        probing = backend(store.url)
        assert [(await probing.probe()).version for _ in range(3)] == [
            "remote write 2.0",
            "remote write 2.0",
            "remote write 1.0",
        ]
        await probing.close()


async def test_a_page_that_answers_in_its_place_has_taken_nothing() -> None:
    """A proxy's log-in, or a web server that has a page for every path."""
    async with played(("200 OK", {"Content-Type": "text/html; charset=utf-8"})) as store:
        writing = backend(store.url)
        for call in (writing.ship([tagged([("a", 1, [1.0, 2.0, 3.0])])]), writing.probe()):
            with pytest.raises(Unavailable, match="PROMETHEUS_WRITE_URL is no address of remote write") as caught:
                await call
            assert caught.value.reason == "STORE_REFUSED"
        await writing.close()


@pytest.mark.parametrize(
    ("status", "reason", "said", "after_s"),
    [
        ("503 Away", "STORE_UNAVAILABLE", "answers 503", 7.0),
        ("429 Too Many", "STORE_THROTTLES", "answers 429", 7.0),
        ("401 No", "STORE_REFUSED", "PROMETHEUS_BEARER_TOKEN", None),
        ("403 No", "STORE_REFUSED", "PROMETHEUS_TENANT", None),
        ("404 No", "STORE_REFUSED", "PROMETHEUS_WRITE_URL is no address of remote write", None),
        ("302 Found", "STORE_REFUSED", "PROMETHEUS_WRITE_URL is no address of remote write", None),
    ],
)
async def test_what_an_operator_mends_is_an_outage_and_shows_no_secret(
    status: str, reason: str, said: str, after_s: float | None
) -> None:
    async with played((status, {"Retry-After": "7"})) as store:
        writing = PrometheusBackend(write_urls=[store.url], bearer_token=SECRET, tenant="fleet", clock=CLOCK)
        for call in (writing.ship([tagged([("a", 1, [1.0, 2.0, 3.0])])]), writing.probe()):
            with pytest.raises(Unavailable) as caught:
                await call
            assert (caught.value.reason, caught.value.retry_after_s) == (reason, after_s)
            assert said in caught.value.message and SECRET not in caught.value.message
        assert {headers["authorization"] for headers in store.asked} == {f"Bearer {SECRET}"}
        assert {headers["x-scope-orgid"] for headers in store.asked} == {"fleet"}
        await writing.close()


async def test_the_next_address_takes_over_and_keeps_the_work(strict: PrometheusServer) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/api/v1/write"
    async with played(("503 Away", {})) as away, fault_proxy(strict.port) as proxy:
        first = f"http://127.0.0.1:{proxy.port}/api/v1/write"
        store = backend(first, nowhere, away.url, strict.write_url)
        now_ms = CLOCK.now_ms()
        assert (await store.ship([tagged([("next", now_ms, [1.0] * 3)])])).shipped == 3
        assert (proxy.accepted, len(away.asked)) == (1, 0), "the first is asked as long as it answers"
        await proxy.cut()
        assert (await store.ship([tagged([("next", now_ms + 1, [1.0] * 3)])])).shipped == 3
        asked = len(away.asked)
        assert asked == 1
        await proxy.restore()
        assert (await store.ship([tagged([("next", now_ms + 2, [1.0] * 3)])])).shipped == 3
        assert (proxy.accepted, len(away.asked)) == (1, 1), "the one that works keeps it"
        await store.probe()
        await store.close()
    assert (await strict.points(now_ms + 10))["next", "production", "web"] == 9


async def say_nothing(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await stream.read()
    writer.close()


async def test_a_store_that_takes_rows_is_up_though_its_query_addresses_say_nothing() -> None:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(played(("204 No", {WRITTEN: "0"})))
        nodes = [await asyncio.start_server(say_nothing, "127.0.0.1", 0) for _ in range(2)]
        stack.callback(lambda: [node.close() for node in nodes])
        urls = [f"http://127.0.0.1:{node.sockets[0].getsockname()[1]}" for node in nodes]
        probing = backend(store.url, query_urls=urls)
        stack.push_async_callback(probing.close)
        for _ in range(3):
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                assert (await probing.probe()).version == "remote write 2.0"


async def test_a_store_whose_answers_take_half_a_second_is_up_and_what_it_takes_is_told() -> None:
    async with played(("204 No", {})) as store:
        probing = backend(store.url)
        assert (await probing.ship([tagged([("a", 1, [1.0, 2.0, 3.0])])])).shipped == 3
        store.delay_s = 0.45
        found = []
        while not (found and found[-1].note):
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                found.append(await probing.probe())
            assert len(found) < 10
        assert found[-1].note == "takes samples that are out of order, by an hour at least"
        await probing.close()


async def test_a_store_of_several_silent_addresses_shows_how_far_it_is_behind(tmp_path: Path) -> None:
    """Each of them has a time-out of its own, all together more than whoever asks for the status waits."""

    async with AsyncExitStack() as stack:
        nodes = [await asyncio.start_server(say_nothing, "127.0.0.1", 0) for _ in range(3)]
        stack.callback(lambda: [node.close() for node in nodes])
        urls = [f"http://127.0.0.1:{node.sockets[0].getsockname()[1]}/api/v1/write" for node in nodes]
        engine, follower = await stack.enter_async_context(following(tmp_path, *urls))
        probes = {"prometheus": ("follower", follower.probe)}
        monitor = await stack.enter_async_context(StoreMonitor("timeseries", probes, CLOCK))
        for number in range(1, 3):
            await engine.append(rows(SET, [("a", CLOCK.now_ms() + number, [1.0] * 3)]), metric_sets=(SET,))
            await eventually(lambda wanted=3 * number: monitor.statuses()[0].lag_points == wanted, within_s=20)  # type: ignore[misc]
            (status,) = monitor.statuses()
            assert status.state == StoreState.STORE_STATE_DOWN and "does not answer within" in status.last_error


@pytest.mark.full
async def test_a_slow_or_silent_store_is_away_and_holds_nobody_up(
    prometheus: PrometheusServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert adapter.PROBE_TIMEOUT_S < PROBE_TIMEOUT_S, "so that it still shows how far it is behind"
    monkeypatch.setattr(adapter, "WRITE_TIMEOUT_S", 2.0)
    now_ms = CLOCK.now_ms()
    async with fault_proxy(prometheus.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/api/v1/write"
        async with following(tmp_path, url, token=SECRET) as (engine, follower):
            for number in range(2):
                if number == 0:
                    proxy.delay_s = 60.0
                else:
                    proxy.half_open()
                async with asyncio.timeout(20):
                    for at in range(20):
                        lines = [(f"slow-{number}", now_ms + at, [1.0] * 3)]
                        await engine.append(rows(SET, lines), metric_sets=(SET,))
                async with asyncio.timeout(20):
                    probe = await follower.probe()
                assert "does not answer" in probe.down
                assert probe.lag_points == 60
                await eventually(lambda: follower._failures > 0, within_s=20)
                await proxy.restore()
                await caught_up(engine)
                assert (await follower.probe()).down == ""
        assert follower.shipped_points == 120
    counts = await prometheus.points(CLOCK.now_ms())
    assert [counts[f"slow-{number}", "", ""] for number in range(2)] == [60, 60]
    assert SECRET not in caplog.text


async def test_of_two_values_for_a_time_each_store_keeps_one(
    prometheus: PrometheusServer, victoria: VictoriaServer
) -> None:
    """What docs/operations.md says of rows that are sent again with another value."""
    now_ms = CLOCK.now_ms() - 10_000
    for server, kept, refused in ((prometheus, ["5", "5", "5"], 2), (victoria, ["5", "9", "5"], 0)):
        store = backend(server.write_url)
        await store.ship([tagged([("twice", now_ms, [5.0, 5.0, 5.0])])])
        receipt = await store.ship([tagged([("twice", now_ms, [3.0, 9.0, 5.0])])])
        assert receipt.refused.get("DUPLICATE_TIMESTAMP", 0) == refused and receipt.shipped == 3 - refused
        if isinstance(server, VictoriaServer):
            await server.flush()
        found = []
        for metric in SET.keys:
            (series,) = await server.ask(f'{metric}{{server_id="twice"}}[1h]', CLOCK.now_ms())
            ((_, value),) = series["values"]
            found.append(value)
        assert found == kept
        await store.close()
