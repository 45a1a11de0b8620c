"""What a front before InfluxDB may answer in its place: each is either an outage, which loses nothing, or a refusal,
which is counted. The front is played; behind it is the real server."""

import asyncio
import contextlib
import email.utils
import gzip
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import urllib3

from services.timeseries.followers.influxdb_api import seconds_of
from tests.harness import eventually
from tests.harness.influxdb import InfluxServer
from tests.timeseries.followers.samples import caught_up, following, metric_set, tick

SET = metric_set("cpu_usage", "memory_usage")
SERVERS = tuple(f"server-{number:02}" for number in range(40))
LOST = b"lost"
"""The request is done, and its answer lost."""

Answer = bytes | None
"""A whole HTTP answer; None: InfluxDB's."""


def answer(status: str, text: str = "", **headers: str) -> bytes:
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n{head}\r\n{text}".encode()


@dataclass
class Front:
    """Asks `decide` what to answer to the lines of each write."""

    target: str
    decide: Callable[[bytes], Answer]
    url: str = ""
    asked_s: list[float] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    http: urllib3.PoolManager = field(default_factory=lambda: urllib3.PoolManager(retries=False))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                decided = None
                if body:
                    self.asked_s.append(time.monotonic())
                    decided = self.decide(gzip.decompress(body))
                if decided is None or decided is LOST:
                    method, path, _ = head[0].split(" ")
                    forwarded = await asyncio.to_thread(self._forward, method, path, headers, body)
                    if decided is LOST:
                        break
                    decided = forwarded
                writer.write(decided)
        writer.close()

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        names = ("authorization", "content-encoding", "content-type")
        kept = {name: headers[name] for name in names if name in headers}
        found = self.http.request(method, self.target + path, body=body, headers=kept)
        return answer(f"{found.status} {found.reason}", found.data.decode(), X_Influxdb_Version="v2")


@contextlib.asynccontextmanager
async def front(target: str, decide: Callable[[bytes], Answer]) -> AsyncIterator[Front]:
    found = Front(target, decide)
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        for writer in found.writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in found.writers), return_exceptions=True)
        found.http.clear()


async def test_a_page_that_answers_in_its_place_has_taken_nothing(
    influx: InfluxServer, bucket: str, tmp_path: Path
) -> None:
    """A proxy's log-in, or a web server that has a page for every path."""
    page: list[Answer] = [answer("200 OK", "<html>who are you?</html>", Content_Type="text/html")] * 3
    async with (
        front(influx.url, lambda _: page.pop() if page else None) as played,
        following(tmp_path, played.url, bucket) as (engine, follower),
    ):
        await engine.append(tick(SET, 1, SERVERS), metric_sets=(SET,))
        await eventually(lambda: "is no InfluxDB: it answers 200" in follower._last_error, within_s=20)
        await caught_up(engine)
        assert follower.shipped_points == 80 and not follower.refusals
    assert await influx.points(bucket) == {(server, "", ""): 2 for server in SERVERS}


@pytest.mark.full
async def test_what_passes_by_itself_is_waited_for_as_the_store_asks(
    influx: InfluxServer, bucket: str, tmp_path: Path
) -> None:
    answers: list[Answer] = [
        answer("503 Service Unavailable", "busy", Retry_After="1"),
        answer("429 Too Many Requests", "slow down", Retry_After="1"),
        answer("500 Internal Server Error"),
        answer("502 Bad Gateway", "<html>"),
        LOST,
    ]
    async with (
        front(influx.url, lambda _: answers.pop(0) if answers else None) as played,
        following(tmp_path, played.url, bucket) as (engine, follower),
    ):
        await engine.append(tick(SET, 1, SERVERS), metric_sets=(SET,))
        await eventually(lambda: "busy" in follower._last_error, within_s=20)
        await caught_up(engine)
        assert len(played.asked_s) == 6 and not follower.refusals and follower.shipped_points == 80
        pauses = [later - earlier for earlier, later in zip(played.asked_s, played.asked_s[1:], strict=False)]
        assert pauses[0] >= 1 and pauses[1] >= 1
    assert await influx.points(bucket) == {(server, "", ""): 2 for server in SERVERS}, "a repeated line is the same"


async def test_what_is_too_large_for_a_front_is_shipped_in_smaller_parts(
    influx: InfluxServer, bucket: str, tmp_path: Path
) -> None:
    def small_only(lines: bytes) -> Answer:
        return answer("413 Content Too Large", "no") if lines.count(b"\n") > 7 or b"server-13" in lines else None

    async with (
        front(influx.url, small_only) as played,
        following(tmp_path, played.url, bucket) as (engine, follower),
    ):
        await engine.append(tick(SET, 1, SERVERS), metric_sets=(SET,))
        await caught_up(engine)
        assert {reason: found.points for reason, found in follower.refusals.items()} == {"REFUSED_413": 2}
    expected = {(server, "", ""): 2 for server in SERVERS if server != "server-13"}
    assert await influx.points(bucket) == expected


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity"])
async def test_a_refusal_is_asked_about_once_for_each_half_and_never_for_ever(
    influx: InfluxServer, bucket: str, tmp_path: Path, status: str
) -> None:
    def never(lines: bytes) -> Answer:
        return answer(status, '{"code":"invalid","message":"no"}') if b"server-13" in lines else None

    async with (
        front(influx.url, never) as played,
        following(tmp_path, played.url, bucket) as (engine, follower),
    ):
        await engine.append(tick(SET, 1, SERVERS), metric_sets=(SET,))
        await engine.append(tick(SET, 2, SERVERS[:13]))
        await caught_up(engine)
        assert {reason: found.points for reason, found in follower.refusals.items()} == {f"REFUSED_{status[:3]}": 2}
        assert follower.shipped_points == (40 - 1 + 13) * 2
        assert len(played.asked_s) <= 16, "two for each halving of 53 rows"


def test_retry_after_may_be_a_date() -> None:
    assert seconds_of("17") == 17.0
    assert 50 < (seconds_of(email.utils.formatdate(time.time() + 60, usegmt=True)) or 0) < 61
    assert seconds_of(email.utils.formatdate(0, usegmt=True)) == 0.0
    assert seconds_of("soon") is None and seconds_of(None) is None
