"""Four gateway processes on one port are one gateway to those who come back to another one; one may die."""

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import eventually
from tests.harness.product import Product

WORKERS = 4
SERVERS = [f"web-{number:02}" for number in range(12)]


@asynccontextmanager
async def served(folder: Path, **settings: str) -> AsyncIterator[Product]:
    async with Product(folder, GATEWAY_WORKERS=str(WORKERS), **settings) as product:
        await product.start("metadata", "timeseries", "cache", "gateway")
        # Whoever of them answers first says that it serves; one that dies before the first process has heard of all
        # could not start, which ends them.
        await eventually(lambda: "workers serve" in product.log("gateway").read_text(), within_s=30)
        await write(product, 1.0)
        await eventually(lambda: all_have(product, 1.0), within_s=30)
        # The record of a new server follows what it reported: a change of its own, which is to be over.
        await eventually(lambda: are_recorded(product), within_s=30)
        yield product


async def write(product: Product, value: float, servers: list[str] = SERVERS) -> None:
    body = {
        "metrics": [{"name": "cpu_usage", "unit": "%"}],
        "rows": [{"serverId": name, "time": time.time()} for name in servers],
        "values": [value] * len(servers),
    }
    answer = await product.http("/v1/metrics:write", body=body)
    assert answer.status == 200 and answer.json["acceptedPoints"] == len(servers), answer.body


def workers(product: Product) -> list[psutil.Process]:
    found = psutil.Process(product.running["gateway"].pid).children()
    return sorted(found, key=lambda process: process.pid)


async def all_have(product: Product, value: float) -> bool:
    """Whether every worker shows it: each request goes by a connection of its own, and the kernel spreads those."""
    for _ in range(8 * WORKERS):
        answer = await product.http(f"/v1/servers/{SERVERS[0]}")
        if answer.status != 200 or answer.json["metrics"].get("cpu_usage") != value:
            return False
    return True


async def are_recorded(product: Product) -> bool:
    """Whether every worker shows of every server which revision its record has."""
    for _ in range(8 * WORKERS):
        page = (await product.http("/v1/servers?view=SERVER_VIEW_FULL&page_size=100")).json
        if not all(server.get("etag") for server in page["servers"]):
            return False
    return True


@pytest.mark.full
async def test_a_caller_may_come_back_to_any_of_them(tmp_path: Path) -> None:
    async with served(tmp_path) as product:
        assert len(workers(product)) == WORKERS
        for _ in range(4 * WORKERS):  # pages
            seen, token = [], ""
            while True:
                page = (await product.http(f"/v1/servers?page_size=5&page_token={token}")).json
                seen += [server["id"] for server in page["servers"]]
                if not (token := page["nextPageToken"]):
                    break
            assert seen == SERVERS
        tag = (await product.http("/v1/servers")).headers["etag"]
        for _ in range(4 * WORKERS):  # entity tags
            answer = await product.http("/v1/servers", headers={"if-none-match": tag})
            assert answer.status == 304 and answer.headers["etag"] == tag


async def events(product: Product, last_id: str = "") -> AsyncIterator[dict[str, str]]:
    host, _, port = product.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    header = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
    writer.write(f"GET /v1/fleet/watch HTTP/1.1\r\nHost: {product.http_address}\r\n{header}\r\n".encode())
    try:
        event: dict[str, str] = {}
        async for raw in reader:
            line = raw.decode().rstrip("\r\n")
            name, colon, value = line.partition(": ")
            if colon and name in {"event", "data", "id"}:
                event[name] = value
            elif not line and event.get("event"):
                yield event
                event = {}
    finally:
        writer.close()


async def test_a_reader_that_was_cut_off_goes_on_at_any_of_them(tmp_path: Path) -> None:
    """He sees each change once, whichever worker he comes to, and none a second time."""
    async with served(tmp_path) as product:
        last_id, known = "", dict[str, float]()
        for value in range(2, 2 + 3 * WORKERS):
            seen: list[str] = []
            stream = events(product, last_id)
            async for event in stream:
                server: dict[str, Any] = json.loads(event["data"])
                if event["event"] == "server":
                    seen.append(server["id"])
                    known[server["id"]] = server["metrics"]["cpu_usage"]
                assert event["event"] == "server" or value == 2, "a snapshot is sent to who has nothing only"
                if "id" in event:
                    last_id = event["id"]
                    if len(known) == len(SERVERS) and set(known.values()) == {float(value - 1)}:
                        break
            await stream.aclose()
            assert len(seen) == len(set(seen)) == len(SERVERS)
            await write(product, float(value))
            known.clear()


@pytest.mark.full
async def test_one_that_dies_is_started_again_and_the_others_go_on(tmp_path: Path) -> None:
    async with served(tmp_path) as product:
        before = workers(product)
        before[1].kill()

        async def is_back() -> bool:
            with suppress(OSError):  # a connection that the kernel had given to the dead one: clients try again
                assert (await product.http("/v1/fleet/summary")).status == 200
            return len(workers(product)) == WORKERS and before[1] not in workers(product)

        await eventually(is_back, within_s=30)
        said = product.log("gateway")
        await eventually(lambda: re.search(r"worker 2 is back", said.read_text()) is not None, within_s=30)
        assert set(before) - {before[1]} <= set(workers(product)), "the others were left alone"


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.full)])
@pytest.mark.full
async def test_they_end_with_the_first(tmp_path: Path, how: signal.Signals) -> None:
    async with served(tmp_path) as product:
        before = workers(product)
        process = product.running["gateway"]
        await product.kill("gateway", how=how)
        assert process.returncode == (0 if how == signal.SIGTERM else -how)
        await eventually(lambda: not any(worker.is_running() for worker in before), within_s=30)


async def what_it_says(product: Product) -> str:
    """Of a gateway that cannot start."""
    starting = asyncio.create_task(product.start("gateway"))
    await eventually(lambda: "gateway" in product.running)
    status = await product.running.pop("gateway").wait()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    said = product.log("gateway").read_text()
    assert status == 1, said
    return said


async def test_an_address_that_is_taken_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        async with Product(tmp_path, GATEWAY_WORKERS=str(WORKERS), GATEWAY_HTTP_ADDRESS=taken) as product:
            said = await what_it_says(product)
    assert f"address {taken} is already in use (set GATEWAY_HTTP_ADDRESS)" in said
    assert "worker" not in said


async def test_a_worker_that_cannot_start_ends_all_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "data" / "gateway").mkdir(parents=True, mode=0o700)
    (tmp_path / "data" / "gateway" / "worker-2").write_text("in the way")
    async with Product(tmp_path, GATEWAY_WORKERS=str(WORKERS)) as product:
        said = await what_it_says(product)
    assert "cannot use folder" in said and "worker 2 could not start, for the reason above" in said
