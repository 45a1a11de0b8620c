"""Servers keep their names, whatever the size of the fleet."""

from fleet.validation import check_descriptors
from services.simulator.fleet import MAX_SERVERS, build_fleet


def test_the_default_fleet_has_stable_names_and_all_environments() -> None:
    servers = [server.descriptor for server in build_fleet(20, seed=1, interval_ms=10_000)]
    ids = [server.server_id for server in servers]
    assert len(set(ids)) == 20
    assert {"web-01", "db-02", "cache-01", "worker-03"} <= set(ids)
    assert {server.environment for server in servers} == {"production", "staging", "development"}
    assert all(server.hostname.startswith(server.server_id + ".") and server.location for server in servers)
    assert {server.report_interval_ms for server in servers} == {10_000}


def test_the_seed_decides_and_a_larger_fleet_begins_with_the_smaller() -> None:
    assert build_fleet(33, seed=5, interval_ms=1_000) == build_fleet(200, seed=5, interval_ms=1_000)[:33]
    assert build_fleet(20, seed=5, interval_ms=1_000) != build_fleet(20, seed=6, interval_ms=1_000)


def test_twenty_thousand_servers_are_distinct_and_valid() -> None:
    servers = [server.descriptor for server in build_fleet(MAX_SERVERS, seed=1, interval_ms=10_000)]
    assert len({server.server_id for server in servers}) == 20_000
    check_descriptors(servers)
