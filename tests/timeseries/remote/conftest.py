"""Real Prometheus-compatible stores, one of each a module."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.harness.mimir import MimirCluster, mimir_cluster
from tests.harness.prometheus import PrometheusServer, prometheus_server
from tests.harness.victoria import VictoriaServer, victoria_server
from tests.timeseries.remote.prometheus_stores import Store


@pytest_asyncio.fixture(scope="module")
async def prometheus() -> AsyncIterator[PrometheusServer]:
    async with prometheus_server() as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def victoria() -> AsyncIterator[VictoriaServer]:
    async with victoria_server() as server:
        yield server


@pytest_asyncio.fixture(scope="module")
async def mimir() -> AsyncIterator[MimirCluster]:
    async with mimir_cluster() as cluster:
        yield cluster


@pytest.fixture(
    params=["prometheus", "victoria", pytest.param("mimir", marks=[pytest.mark.full, pytest.mark.timeout(300)])]
)
def store(request: pytest.FixtureRequest) -> Store:
    server = request.getfixturevalue(request.param)
    if isinstance(server, MimirCluster):
        return Store(server, server.write_urls, server.query_urls)
    if isinstance(server, VictoriaServer):  # it keeps decimal numbers of about 15 digits
        return Store(server, [server.write_url], [server.url], server.flush, digits=12)
    return Store(server, [server.write_url], [server.url])
