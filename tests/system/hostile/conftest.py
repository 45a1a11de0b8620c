"""One gateway for all attacks of a file, so that each also meets what the ones before it have left."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.harness.hostile import Attacked, attacked


@pytest_asyncio.fixture(scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Attacked]:
    async with attacked(tmp_path_factory.mktemp("attacked")) as running:
        yield running
