"""One running product for all tests that only look at it: a fixture, loaded by tests/conftest.py."""

from collections.abc import Iterator

import pytest

from tests.harness.launched import Launched, within

METRICS = 511
SERVERS = 20


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """Everything as `make run` starts it, but for free ports and a tick a second, with a few ticks in it."""
    with Launched(tmp_path_factory.mktemp("product"), SIMULATOR_INTERVAL="1s") as launched:
        within(30, lambda: launched.get("/v1/servers").json["totalSize"] == SERVERS)
        within(30, lambda: states(launched) == {"STORE_STATE_UP"})
        yield launched


def states(launched: Launched) -> set[str]:
    """The states of all stores."""
    return {store["state"] for store in launched.get("/v1/storage/status").json["stores"]}
