"""Real Prometheus-compatible stores for the tests that need one, or each of them."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.harness.prometheus import PrometheusServer, StoreServer, prometheus_server
from tests.harness.victoria import VictoriaServer, victoria_server


@pytest_asyncio.fixture(scope="module")
async def prometheus() -> AsyncIterator[PrometheusServer]:
    async with prometheus_server() as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def strict() -> AsyncIterator[PrometheusServer]:
    """As Prometheus comes: nothing out of order is taken."""
    async with prometheus_server(out_of_order="0s") as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def victoria() -> AsyncIterator[VictoriaServer]:
    async with victoria_server() as server:
        yield server


@pytest.fixture(params=["prometheus", "victoria"])
def server(request: pytest.FixtureRequest) -> StoreServer:
    found: StoreServer = request.getfixturevalue(request.param)
    return found
