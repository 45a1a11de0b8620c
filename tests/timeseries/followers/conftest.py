"""A real InfluxDB for the tests that need one, and a bucket of its own for each."""

import itertools
from collections.abc import AsyncIterator

import pytest_asyncio

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
