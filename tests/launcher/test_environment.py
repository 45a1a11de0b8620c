"""A process that is moved to another address is found there by the others, without a second variable."""

import pytest

from gateway.settings import GatewaySettings
from launcher.__main__ import environment
from services.analytics.settings import AnalyticsSettings
from services.simulator.settings import SimulatorSettings

MOVED = {
    "CACHE_ADDRESS": "127.0.0.1:51051",
    "TIMESERIES_ADDRESS": "127.0.0.1:51052",
    "METADATA_ADDRESS": "[::1]:51053",
    "SIMULATOR_ADDRESS": "localhost:51054",
    "ANALYTICS_ADDRESS": "127.0.0.1:51055",
}


def test_whoever_is_moved_is_dialled_where_he_is() -> None:
    given = environment({**MOVED, "GATEWAY_GRPC_ADDRESS": "127.0.0.1:51050"})
    gateway = GatewaySettings.load(given)
    assert gateway.cache_target == MOVED["CACHE_ADDRESS"]
    assert gateway.timeseries_targets == (MOVED["TIMESERIES_ADDRESS"],)
    assert gateway.metadata_target == MOVED["METADATA_ADDRESS"]
    assert gateway.simulator_target == MOVED["SIMULATOR_ADDRESS"]
    assert gateway.analytics_target == MOVED["ANALYTICS_ADDRESS"]
    simulator, analytics = SimulatorSettings.load(given), AnalyticsSettings.load(given)
    assert simulator.timeseries_targets == gateway.timeseries_targets
    assert (simulator.cache_target, simulator.metadata_target) == (gateway.cache_target, gateway.metadata_target)
    assert (analytics.timeseries_target,) == gateway.timeseries_targets
    assert analytics.metadata_target == gateway.metadata_target


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ({}, None),
        ({"CACHE_ADDRESS": ""}, None),
        ({"CACHE_ADDRESS": "127.0.0.1:1", "CACHE_TARGET": "dns:///cache:2"}, "dns:///cache:2"),
        ({"CACHE_ADDRESS": "127.0.0.1:1", "CACHE_TARGET": ""}, "127.0.0.1:1"),
        ({"CACHE_ADDRESS": "0.0.0.0:1"}, "127.0.0.1:1"),
        ({"CACHE_ADDRESS": "[::]:1"}, "127.0.0.1:1"),
        ({"CACHE_ADDRESS": "127.0.0.1:0"}, None),
        ({"CACHE_ADDRESS": "nonsense"}, None),
    ],
)
def test_a_target_that_is_set_counts_and_nonsense_is_left_to_the_process(
    given: dict[str, str], target: str | None
) -> None:
    assert environment(given).get("CACHE_TARGET") == target
