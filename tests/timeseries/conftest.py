"""What tests of the history share: an engine that does not sync, and a real InfluxDB with a bucket for each test."""

import itertools
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import apsw
import pytest
import pytest_asyncio

from services.timeseries.engine import database, journal, partitions
from tests.harness.influxdb import InfluxServer, influx_server

_numbers = itertools.count(1)


@pytest_asyncio.fixture(scope="session")
async def influx() -> AsyncIterator[InfluxServer]:
    async with influx_server() as server:
        yield server


@pytest_asyncio.fixture
async def bucket(influx: InfluxServer) -> str:
    name = f"metrics-{next(_numbers)}"
    await influx.make_bucket(name)
    return name


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written and not synced: what is copied, or left by a kill, is the same; many small tests are quick."""

    def without_syncs(connect: Callable[..., apsw.Connection]) -> Callable[..., apsw.Connection]:
        def connected(path: Path, *more: Any) -> apsw.Connection:
            db = connect(path, *more)
            db.pragma("synchronous", 0)
            return db

        return connected

    monkeypatch.setattr(os, "fsync", lambda _: None)
    for module in (journal, partitions):
        monkeypatch.setattr(module, "connect", without_syncs(database.connect))
