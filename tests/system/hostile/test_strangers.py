"""Who has no token cannot make the gateway keep anything of what he sends."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.harness.hostile import Attacked, attacked
from tests.harness.http2 import DATA, FRAME_BYTES, HEADERS, RST_STREAM, SETTINGS, Connection, message

STREAMS = 60
EACH = 15 << 20
"""Of a message of 16 MiB on each stream, as much as its window lets through: 900 MiB of all, if they were kept."""
LITTLE_MB = 80
METHODS = ("FleetService/GetServer", "FleetService/WatchFleet", "IngestService/WriteMetrics", "Nobody/Knows")
OPEN = ("openmanager.gateway.v1.AccessService/SetUp", "grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch")
WITHIN_S = 30.0


@pytest_asyncio.fixture(scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Attacked]:
    async with attacked(tmp_path_factory.mktemp("attacked"), GATEWAY_TOKEN=secrets.token_urlsafe(24)) as running:
        yield running


class Windows:
    """How much may be sent on a connection, as it is told."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left = {0: 65_535}
        self.first = 65_535
        self.answers: dict[int, bytes] = {}
        self.ended: set[int] = set()

    async def listen(self) -> None:
        """Until the connection is closed."""
        while (got := await self._connection.receive()) is not None:
            if got.kind == 8:
                self._left[got.stream] = self._left.get(got.stream, self.first) + int.from_bytes(got.payload, "big")
            elif got.kind == HEADERS:
                self.answers[got.stream] = self.answers.get(got.stream, b"") + got.payload
            if got.kind == RST_STREAM or (got.kind == HEADERS and got.flags & 1):
                self.ended.add(got.stream)

    def take(self, stream: int, size: int) -> bool:
        """Whether so much may be sent on a stream now."""
        left = self._left.setdefault(stream, self.first)
        if stream in self.ended or min(left, self._left[0]) < size:
            return False
        self._left[stream] -= size
        self._left[0] -= size
        return True


@pytest.mark.parametrize("method", METHODS)
async def test_messages_that_never_end_are_not_kept(target: Attacked, method: str) -> None:
    answers = await unfinished(target, f"/openmanager.gateway.v1.{method}")
    assert {answer.count(b"grpc-status\x0216") for answer in answers} == {1}, "all UNAUTHENTICATED"


@pytest.mark.full
@pytest.mark.parametrize("method", OPEN)
async def test_nor_of_methods_that_are_open_to_all(target: Attacked, method: str) -> None:
    assert len(await unfinished(target, f"/{method}")) == STREAMS


async def unfinished(target: Attacked, path: str) -> list[bytes]:
    """How calls are answered that send as much of their messages as they may, but not all."""
    async with target.endures(LITTLE_MB), await Connection.open(target.grpc) as connection:
        assert await connection.until(SETTINGS) is not None
        windows = Windows(connection)
        listening = asyncio.create_task(windows.listen())
        streams = [connection.call(path) for _ in range(STREAMS)]
        for stream in streams:
            if windows.take(stream, 5):
                connection.send(DATA, 0, stream, message(16 << 20))
        try:
            async with asyncio.timeout(WITHIN_S):
                await send(connection, windows, streams)
        finally:
            listening.cancel()
        return [windows.answers[stream] for stream in streams]


async def send(connection: Connection, windows: Windows, streams: list[int]) -> None:
    """Sends on every stream what its window lets through, until each is ended."""
    sent = dict.fromkeys(streams, 0)
    piece = b"x" * FRAME_BYTES
    while not windows.ended.issuperset(streams):
        for stream in streams:
            while sent[stream] < EACH and windows.take(stream, FRAME_BYTES):
                connection.send(DATA, 0, stream, piece)
                sent[stream] += FRAME_BYTES
        with contextlib.suppress(ConnectionError):
            await connection.writer.drain()
        await asyncio.sleep(0.005)
        if all(count >= EACH for count in sent.values()):
            raise AssertionError(f"{sum(sent.values()) >> 20} MiB of unfinished messages were taken")
