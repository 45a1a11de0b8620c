"""Running products that several tests share: fixtures, loaded by tests/conftest.py."""

import json
from collections.abc import Iterator

import pytest

from tests.harness.launched import Launched, within

METRICS = 511
SERVERS = 20


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """For tests that only look at it: everything as `make run` starts it, but for free ports and a tick a second, with
    a few ticks in it."""
    with Launched(tmp_path_factory.mktemp("product"), first_start=True, SIMULATOR_INTERVAL="1s") as launched:
        within(30, lambda: launched.get("/v1/servers").json["totalSize"] == SERVERS)
        within(30, lambda: states(launched) == {"STORE_STATE_UP"})
        yield launched


@pytest.fixture(scope="module")
def abused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    """For tests that send it whatever comes to their mind; `unharmed` says what must be true of it afterwards."""
    with Launched(tmp_path_factory.mktemp("abused"), SIMULATOR_INTERVAL="1s", SIMULATOR_SERVERS="3") as launched:
        within(30, lambda: launched.get("/v1/servers").json["totalSize"] == 3)
        within(30, lambda: states(launched) == {"STORE_STATE_UP"})
        yield launched


def unharmed(launched: Launched) -> None:
    """It runs as it was started, all stores are up, it takes and gives, and nobody logged an error."""
    assert "starting it again" not in launched.printed
    within(30, lambda: states(launched) == {"STORE_STATE_UP"})
    row = {"serverId": "unharmed", "time": "now"}
    batch = {"metrics": [{"name": "pulse"}], "rows": [row], "values": [1]}
    assert launched.post("/v1/metrics:write", batch).json["acceptedPoints"] == 1
    assert within(30, lambda: launched.get("/v1/servers/unharmed").json.get("metrics")) == {"pulse": 1.0}
    logs = [line for log in (launched.data / "logs").glob("*.log") for line in log.read_text().splitlines()]
    assert logs
    assert [line for line in logs if json.loads(line)["level"] in {"ERROR", "CRITICAL"}] == []


def states(launched: Launched) -> set[str]:
    """The states of all stores."""
    return {store["state"] for store in launched.get("/v1/storage/status").json["stores"]}
