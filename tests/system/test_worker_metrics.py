"""Metrics of three gateway processes on one port: whoever is asked tells of all, also while one of them is stuck."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from gateway.siblings import UP
from tests.harness import eventually
from tests.harness.product import Product

WORKERS = 3
CALLS = 40
METHOD = "openmanager.gateway.v1.FleetService/GetFleetSummary"
WITHIN_S = 30.0


@pytest_asyncio.fixture(scope="module")
async def product(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Product]:
    async with Product(tmp_path_factory.mktemp("workers"), GATEWAY_WORKERS=str(WORKERS)) as running:
        await running.start("cache", "gateway")
        await eventually(lambda: "workers serve" in running.log("gateway").read_text(), within_s=WITHIN_S)
        yield running


def processes(product: Product) -> list[psutil.Process]:
    return psutil.Process(product.running["gateway"].pid).children()


class Kept:
    """A connection, and the process to which the kernel gave it."""

    def __init__(self, product: Product, connection: socket.socket) -> None:
        self._product = product
        self._connection = connection

    def get(self, path: str) -> bytes:
        """The body of an answer."""
        self._connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._product.http_address}\r\n\r\n".encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._more()
        head, _, body = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(body) < length:
            body += self._more()
        return body

    def _more(self) -> bytes:
        found = self._connection.recv(65_536)
        assert found, "the connection was closed"
        return found

    def samples(self) -> list[Sample]:
        """The page of metrics."""
        families = text_string_to_metric_families(self.get("/metrics").decode())
        return [sample for family in families for sample in family.samples]

    def up(self) -> dict[str, float]:
        """What it says of the workers."""
        return {sample.labels["worker"]: sample.value for sample in self.samples() if sample.name == UP}

    def calls(self) -> dict[str, float]:
        """Worker -> calls of METHOD."""
        name = "rpc_server_call_duration_seconds_count"
        found = (sample for sample in self.samples() if sample.name == name and sample.labels["rpc_method"] == METHOD)
        counts: dict[str, float] = {}
        for sample in found:
            counts[sample.labels["worker"]] = counts.get(sample.labels["worker"], 0) + sample.value
        return counts

    def process(self) -> psutil.Process:
        """Whose it is."""
        for process in processes(self._product):
            for connection in process.net_connections("tcp"):
                if connection.raddr and tuple(connection.raddr) == self._connection.getsockname():
                    return process
        raise AssertionError("nobody has the connection")


@contextmanager
def kept(product: Product) -> Iterator[Kept]:
    host, port = product.http_address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), WITHIN_S) as connection:
        yield Kept(product, connection)


async def test_whoever_is_asked_tells_of_all(product: Product) -> None:
    for _ in range(CALLS):
        assert (await product.http("/v1/fleet/summary")).status == 200

    def ask() -> tuple[dict[str, float], dict[str, float]]:
        with kept(product) as connection:
            return connection.up(), connection.calls()

    async def whole() -> dict[str, float] | None:
        """Calls, once all answer whoever is asked: on a busy machine one may take longer than its second."""
        up, calls = await asyncio.to_thread(ask)
        return calls if up == {str(number): 1.0 for number in range(1, WORKERS + 1)} else None

    for _ in range(4 * WORKERS):
        calls = await eventually(whole, within_s=WITHIN_S)
        assert sum(calls.values()) == CALLS
        assert len(calls) > 1, "the kernel has spread the connections"


async def all_are_up(product: Product) -> bool:
    """By the word of whoever is asked; a connection that the kernel had given to one that died is no word."""

    def ask() -> bool:
        with suppress(OSError), kept(product) as connection:
            return set(connection.up().values()) == {1.0}
        return False

    return await asyncio.to_thread(ask)


async def one_away(connection: Kept) -> dict[str, float]:
    """What it says once the other two answer: on a busy machine one of them, too, may take longer than its second."""

    async def told() -> dict[str, float] | None:
        up = await asyncio.to_thread(connection.up)
        return up if sorted(up.values()) == [0.0, 1.0, 1.0] else None

    return await eventually(told, within_s=WITHIN_S)


async def test_one_that_is_stuck_does_not_block_the_page(product: Product) -> None:
    with kept(product) as connection:
        await asyncio.to_thread(connection.get, "/healthz")
        stuck = next(process for process in processes(product) if process != connection.process())
        stuck.send_signal(signal.SIGSTOP)
        try:
            up = await one_away(connection)
            calls = await asyncio.to_thread(connection.calls)
        finally:
            stuck.send_signal(signal.SIGCONT)
        (away,) = [name for name, value in up.items() if not value]
        assert away not in calls
        await eventually(lambda: all_are_up(product), within_s=WITHIN_S)


async def test_one_that_is_killed_is_missing_until_it_is_back(product: Product) -> None:
    with kept(product) as connection:
        await asyncio.to_thread(connection.get, "/healthz")
        killed = next(process for process in processes(product) if process != connection.process())
        first = product.running["gateway"]
        first.send_signal(signal.SIGSTOP)  # it would start another one, maybe before anybody looks
        try:
            killed.send_signal(signal.SIGKILL)
            await eventually(lambda: killed.status() == psutil.STATUS_ZOMBIE, within_s=WITHIN_S)
            await one_away(connection)
        finally:
            first.send_signal(signal.SIGCONT)
        await eventually(lambda: all_are_up(product), within_s=WITHIN_S)
