"""Streamed answers: JSON lines and Server-Sent Events, their faults, and callers that leave or do not read."""

import asyncio
import socket
from typing import Any

import orjson

from gateway.http.streams import HEARTBEAT_INTERVAL_S
from openmanager.gateway.v1 import fleet_pb2
from runtime.clock import ManualClock
from runtime.errors import PermissionDenied, Unavailable
from tests.gateway.http.serving import read_answer, read_chunk, read_head, serving
from tests.harness import eventually

PROMPTLY_S = 10.0
"""Sooner than the next heartbeat would show it."""


def tick(version: str, *servers: str, removed: tuple[str, ...] = ()) -> fleet_pb2.WatchFleetResponse:
    return fleet_pb2.WatchFleetResponse(
        version=version,
        servers=[fleet_pb2.Server(id=name) for name in servers],
        removed=[fleet_pb2.RemovedServer(id=name) for name in removed],
    )


def events(text: bytes) -> list[dict[str, str]]:
    """The blocks of an event stream as a browser reads them."""
    blocks = [block for block in text.decode().split("\n\n") if block]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


async def test_the_last_event_id_is_where_the_reader_goes_on() -> None:
    async with serving() as served:
        for query, header, asked in (
            ("", "e-7", "e-7"),
            ("?after_version=e-3", "e-7", "e-7"),
            ("?after_version=e-3", "", "e-3"),
        ):
            served.servicer.ticks.put_nowait(None)
            await served.call("GET", f"/v1/fleet/watch{query}", headers={"last-event-id": header})
            assert served.servicer.requests[-1].after_version == asked


async def test_a_snapshot_is_an_event_of_its_own() -> None:
    async with serving() as served:
        snapshot = tick("e-1", "a")
        snapshot.snapshot = True
        served.servicer.ticks.put_nowait(snapshot)
        served.servicer.ticks.put_nowait(None)
        answer = await served.get("/v1/fleet/watch")
    found = [block for block in events(answer.body) if "event" in block]
    assert [block["event"] for block in found] == ["snapshot", "server"]
    assert [block.get("id") for block in found] == ["0", "e-1"], "who has only the first has dropped what he had"


async def test_who_is_cut_off_in_a_snapshot_is_not_taken_for_one_who_still_has_what_was_before_it() -> None:
    """At another worker the id that he had before could be known, and only what changed since would follow."""
    async with serving() as served:
        whole = tick("e-7", "a", "b")
        whole.snapshot = True
        for message in (tick("e-3", "a", "b"), whole, None):
            served.servicer.ticks.put_nowait(message)
        answer = await served.get("/v1/fleet/watch")
        *_, snapshot, server, last = events(answer.body)
        last_id = ""
        for event in (snapshot, server):
            last_id = event.get("id", last_id)
        assert (snapshot["event"], last_id, last["id"]) == ("snapshot", "0", "e-7")
        empty = tick("e-8")
        empty.snapshot = True
        for message in (empty, None):
            served.servicer.ticks.put_nowait(message)
        (*_, only) = events((await served.get("/v1/fleet/watch")).body)
        assert (only["event"], only["id"]) == ("snapshot", "e-8"), "it is all that there is"


async def test_json_lines() -> None:
    async with serving() as served:
        answer = await served.call("POST", "/v1/history:query", {"metrics": ["cpu"]})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.body.endswith(b"\n")
    lines = [orjson.loads(line) for line in answer.body.splitlines()]
    assert [line["series"][0]["serverId"] for line in lines] == ["server-0", "server-1", "server-2"]


async def test_a_fault_before_the_first_line_is_an_http_error() -> None:
    async with serving() as served:
        refused = await served.call("POST", "/v1/history:query", {"metrics": ["refused"]})
        malformed = await served.call("POST", "/v1/history:query", {"metrics": 5})
    assert (refused.status, refused.field()) == (404, "metrics")
    assert (malformed.status, malformed.field()) == (400, "metrics")


async def test_a_fault_in_mid_stream_is_the_last_line() -> None:
    async with serving() as served:
        answer = await served.call("POST", "/v1/history:query", {"metrics": ["broken"]})
    lines = [orjson.loads(line) for line in answer.body.splitlines()]
    assert answer.status == 200
    assert len(lines) == 3
    assert lines[2]["error"]["code"] == 13
    assert lines[2]["error"]["details"][0]["reason"] == "BROKEN"


async def test_the_deadline_of_a_stream_is_its_last_line() -> None:
    async with serving() as served:
        for wait in ("100ms", "2s", "20s"):  # on a busy machine it may be over before the stream begins
            answer = await served.call("POST", "/v1/history:query", {"metrics": ["endless"]}, {"request-timeout": wait})
            if answer.status == 200:
                break
    lines = [orjson.loads(line) for line in answer.body.splitlines()]
    assert "series" in lines[0]
    assert lines[-1]["error"]["code"] == 4


async def test_server_sent_events() -> None:
    async with serving() as served:
        served.servicer.ticks.put_nowait(tick("e-1", "a", "b"))
        served.servicer.ticks.put_nowait(tick("e-2", "b", removed=("a",)))
        served.servicer.ticks.put_nowait(tick("e-3"))
        served.servicer.ticks.put_nowait(None)
        answer = await served.call("GET", "/v1/fleet/watch?view=basic", headers={"last-event-id": "e-0"})
        context, request = served.servicer.contexts.pop(), served.servicer.requests.pop()
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert ("last-event-id", "e-0") in context.invocation_metadata()
    assert request.view == fleet_pb2.SERVER_VIEW_BASIC
    retry, *rest = events(answer.body)
    assert retry == {"retry": "2000"}
    assert [(event.get("event"), event.get("id")) for event in rest] == [
        ("server", None),  # the id comes with the last event of a message: whoever has it has them all
        ("server", "e-1"),
        ("server", None),
        ("removed", "e-2"),
        (None, "e-3"),
    ]
    assert orjson.loads(rest[0]["data"])["id"] == "a"
    assert orjson.loads(rest[0]["data"])["metrics"] == {}
    assert orjson.loads(rest[3]["data"]) == {"id": "a"}


async def test_a_fault_of_an_event_stream() -> None:
    async with serving() as served:
        served.servicer.ticks.put_nowait(PermissionDenied("no"))
        early = await served.get("/v1/fleet/watch")
        served.servicer.ticks.put_nowait(tick("e-1", "a"))
        served.servicer.ticks.put_nowait(Unavailable("cache is away"))
        late = await served.get("/v1/fleet/watch")
    assert early.status == 403
    assert late.status == 200
    last = events(late.body)[-1]
    assert last["event"] == "error"
    assert orjson.loads(last["data"])["code"] == 14


async def test_the_events_of_a_tick_are_there_at_once() -> None:
    async with serving() as served:
        reader, writer = await served.send("GET", "/v1/fleet/watch")
        for version in ("e-1", "e-2"):
            served.servicer.ticks.put_nowait(tick(version, "a"))
            if version == "e-1":
                assert (await read_head(reader))[0] == 200
            assert version.encode() in await asyncio.wait_for(read_chunk(reader), 20)
        writer.close()


async def test_a_watcher_that_leaves_ends_the_method_promptly() -> None:
    async with serving() as served:
        _reader, writer = await served.send("GET", "/v1/fleet/watch")
        await eventually(lambda: served.servicer.running == 1)
        writer.close()
        await eventually(lambda: served.servicer.running == 0, within_s=PROMPTLY_S)
        assert served.servicer.cancelled == 1
        await eventually(lambda: served.app.in_flight == 0)


async def test_a_watcher_that_leaves_between_ticks_ends_the_method_promptly() -> None:
    async with serving() as served:
        reader, writer = await served.send("GET", "/v1/fleet/watch")
        served.servicer.ticks.put_nowait(tick("e-1", "a"))
        await read_head(reader)
        writer.close()
        await eventually(lambda: served.servicer.running == 0, within_s=PROMPTLY_S)


async def test_a_silent_stream_is_kept_alive() -> None:
    clock = ManualClock()
    async with serving(clock=clock) as served:
        reader, writer = await served.send("GET", "/v1/fleet/watch")
        await eventually(lambda: served.servicer.running == 1 and clock.sleepers == 1)
        clock.advance(HEARTBEAT_INTERVAL_S)
        assert (await read_head(reader))[0] == 200
        assert await read_chunk(reader) == b"retry: 2000\n\n: still here\n\n"
        served.servicer.ticks.put_nowait(tick("e-1", "a"))
        assert b"event: server" in await read_chunk(reader)
        await eventually(lambda: clock.sleepers == 1)
        clock.advance(HEARTBEAT_INTERVAL_S)
        assert await read_chunk(reader) == b": still here\n\n"
        writer.close()
    await eventually(lambda: clock.sleepers == 0)


async def test_a_reader_that_does_not_read_stops_the_method() -> None:
    """What is ahead of a paused reader stays under 16 MiB of the 64 MiB that the method would send."""
    async with serving() as served:
        sent = 0

        async def flood(_request: Any, _context: Any) -> Any:
            nonlocal sent
            for _ in range(1_024):
                sent += 1 << 16
                yield fleet_pb2.WatchFleetResponse(servers=[fleet_pb2.Server(id="x" * (1 << 16))])

        served.app.bridge.endpoint("FleetService", "WatchFleet").behaviour = flood
        with socket.create_connection((served.host, served.port)) as paused:
            paused.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(
                paused, b"GET /v1/fleet/watch HTTP/1.1\r\nhost: localhost\r\n\r\n"
            )
            before = -1

            async def settled() -> bool:
                nonlocal before
                same, before = sent == before and sent > 0, sent
                await asyncio.sleep(0.1)
                return same

            await eventually(settled)
            assert sent < 16 << 20
        await eventually(lambda: served.app.in_flight == 0)


async def test_streams_end_when_the_server_stops_and_say_so() -> None:
    async with serving(grace_s=60) as served:
        reader, writer = await served.send("GET", "/v1/fleet/watch")
        served.servicer.ticks.put_nowait(tick("e-1", "a"))
        lines_reader, lines_writer = await served.send("POST", "/v1/history:query", b'{"metrics":["endless"]}')
        await eventually(lambda: len(served.servicer.requests) == 2)
        served.stopping.set()
        async with asyncio.timeout(20):  # they do not wait for all of the grace
            watch, lines = await read_answer(reader), await read_answer(lines_reader)
            writer.close()
            lines_writer.close()
            await asyncio.shield(served.task)
    assert events(watch.body)[-1]["event"] == "error"
    assert b"SHUTTING_DOWN" in watch.body
    assert b"SHUTTING_DOWN" in lines.body.splitlines()[-1]
