"""Each scenario shows where it should, with its consequences, and leaves nothing behind but what counters counted."""

import asyncio

import numpy as np
import pytest

from fleet.model import MetricKind
from runtime.errors import InvalidArgument, NotFound
from services.simulator.catalogue import CATALOGUE, COLUMN
from services.simulator.fleet import build_fleet
from services.simulator.noise import Floats
from services.simulator.scenarios import FLAP_TICKS, ScenarioKind
from services.simulator.synthetic import MAX_BATCH_POINTS, SyntheticSource
from tests.simulator.support import INTERVAL_MS, NOON, SEED, generator

COUNTERS = np.array([spec.metric.kind is MetricKind.COUNTER for spec in CATALOGUE])
TICKS = 30
VICTIM = "web-02"
VICTIM_ROW = 4
EFFECTS = {
    "cpu-spike": ["cpu_usage", "load_1m", "load_15m", "http_latency_p99_seconds", "cpu_core_03_usage"],
    "memory-leak": ["memory_usage", "memory_used_bytes", "swap_usage", "service_application_memory_bytes"],
    "disk-fill": ["disk_usage", "filesystem_root_used_bytes", "disk_nvme0_busy_usage"],
    "packet-loss": ["network_packet_loss_usage", "tcp_round_trip_seconds", "http_error_usage"],
    "network-saturation": ["network_eth0_usage", "network_eth0_receive_bytes_per_second", "network_packet_loss_usage"],
    "thrashing": ["swap_usage", "cpu_iowait_usage", "disk_nvme0_busy_usage", "load_1m", "http_latency_p99_seconds"],
}
COUNTED = {
    "cpu-spike": "cpu_user_seconds",
    "packet-loss": "tcp_segments_retransmitted",
    "network-saturation": "network_eth0_transmit_bytes",
    "thrashing": "page_major_faults",
}


def _source(servers: int = 20) -> SyntheticSource:
    fleet = build_fleet(servers, seed=SEED, interval_ms=INTERVAL_MS)
    return SyntheticSource(fleet, seed=SEED, interval_ms=INTERVAL_MS)


def _play(source: SyntheticSource, ticks: range) -> Floats:
    """Values of shape (ticks, servers, metrics), a silent server's being NaN."""
    ids = [server.descriptor.server_id for server in build_fleet(20, seed=SEED, interval_ms=INTERVAL_MS)]
    played = np.full((len(ticks), 20, len(CATALOGUE)), np.nan)
    for index, tick in enumerate(ticks):
        for batch in asyncio.run(source.batches(tick, tick * INTERVAL_MS)):
            rows = [ids.index(server_id) for server_id in batch.rows.server_ids]
            played[index, rows] = batch.rows.values
    return played


def _healthy(ticks: range) -> Floats:
    source = generator()
    return np.stack([source.values(tick) for tick in ticks])


def _inject(
    source: SyntheticSource, kind: str, ticks: int = TICKS, server_id: str = VICTIM, at: int = NOON + 1
) -> None:
    source.inject(server_id, kind, ticks * INTERVAL_MS / 1000.0, at * INTERVAL_MS)


@pytest.mark.parametrize("kind", sorted(EFFECTS))
def test_a_scenario_shows_on_its_server_alone_and_ends(kind: str) -> None:
    source = _source()
    _inject(source, kind)
    during, after = range(NOON, NOON + 1 + TICKS), range(NOON + 1 + TICKS, NOON + 10 + TICKS)
    bent, healthy = _play(source, during), _healthy(during)
    others = np.arange(20) != VICTIM_ROW
    assert np.array_equal(bent[:, others], healthy[:, others])
    assert np.array_equal(bent[0], healthy[0])  # it begins with its start
    for name in EFFECTS[kind]:
        assert bent[-1, VICTIM_ROW, COLUMN[name]] > 1.2 * healthy[-1, VICTIM_ROW, COLUMN[name]], name
    ended, well = _play(source, after), _healthy(after)
    assert np.array_equal(ended[:, :, ~COUNTERS], well[:, :, ~COUNTERS])
    assert source.injections == ()


@pytest.mark.parametrize("kind", sorted(EFFECTS))
def test_counters_never_step_back_in_a_scenario_or_after_it(kind: str) -> None:
    source = _source()
    _inject(source, kind)
    ticks = range(NOON, NOON + 2 * TICKS)
    bent, healthy = _play(source, ticks), _healthy(ticks)
    assert (np.diff(bent[:, VICTIM_ROW, COUNTERS], axis=0) >= 0).all()
    if kind in COUNTED:
        column = COLUMN[COUNTED[kind]]
        grown = np.ptp(bent[:, VICTIM_ROW, column]), np.ptp(healthy[:, VICTIM_ROW, column])
        assert grown[0] > 1.3 * grown[1]


@pytest.mark.parametrize(
    ("kind", "metric", "critical"),
    [("cpu-spike", "cpu_usage", 95), ("memory-leak", "memory_usage", 95), ("disk-fill", "disk_usage", 95)],
)
def test_a_scenario_takes_its_headline_metric_past_critical(kind: str, metric: str, critical: float) -> None:
    source = _source()
    _inject(source, kind)
    values = _play(source, range(NOON, NOON + 1 + TICKS))[:, VICTIM_ROW, COLUMN[metric]]
    assert values[-1] >= critical
    if kind != "cpu-spike":  # it grows steadily
        assert (np.diff(values[1:]) > 0).mean() > 0.8


def test_an_outage_is_silence_and_ends_with_a_reboot() -> None:
    source = _source()
    _inject(source, "outage", 5)
    played = _play(source, range(NOON, NOON + 12))
    silent = np.isnan(played[:, VICTIM_ROW]).all(axis=1)
    assert silent.tolist() == [False] + [True] * 5 + [False] * 6
    assert not np.isnan(np.delete(played, VICTIM_ROW, axis=1)).any()
    back = played[6, VICTIM_ROW]
    assert back[COLUMN["uptime_seconds"]] == 0
    assert back[COLUMN["boot_time_seconds"]] == (NOON + 6) * INTERVAL_MS / 1000
    assert back[COLUMN["cpu_user_seconds"]] < played[0, VICTIM_ROW, COLUMN["cpu_user_seconds"]]
    assert (np.diff(played[6:, VICTIM_ROW, COUNTERS], axis=0) >= 0).all()


def test_a_reboot_forgets_what_a_scenario_made_counters_grow() -> None:
    spiked, plain = _source(), _source()
    _inject(spiked, "cpu-spike", 10)
    for source in (spiked, plain):
        _inject(source, "outage", 5, at=NOON + 12)
    ticks = range(NOON, NOON + 20)
    one, other = _play(spiked, ticks)[:, VICTIM_ROW], _play(plain, ticks)[:, VICTIM_ROW]
    assert one[11, COLUMN["cpu_user_seconds"]] > other[11, COLUMN["cpu_user_seconds"]] + 100
    assert np.array_equal(one[17:], other[17:])


def test_flapping_alternates() -> None:
    source = _source()
    _inject(source, "flapping", 4 * FLAP_TICKS)
    played = _play(source, range(NOON + 1, NOON + 1 + 5 * FLAP_TICKS))
    silent = np.isnan(played[:, VICTIM_ROW, 0]).reshape(5, FLAP_TICKS)
    assert silent.all(axis=1).tolist() == [True, False, True, False, False]
    assert silent.any(axis=1).tolist() == [True, False, True, False, False]


def test_scenarios_compose_on_one_server_and_on_several() -> None:
    source = _source()
    _inject(source, "cpu-spike", 20)
    _inject(source, "disk-fill", 20)
    _inject(source, "packet-loss", 20, server_id="web-01")
    played, healthy = (play(range(NOON, NOON + 21)) for play in (lambda ticks: _play(source, ticks), _healthy))
    assert played[-1, VICTIM_ROW, COLUMN["cpu_usage"]] > 95
    assert played[-1, VICTIM_ROW, COLUMN["disk_usage"]] > 95
    assert played[-1, 0, COLUMN["network_packet_loss_usage"]] > 5
    assert healthy[-1, VICTIM_ROW, COLUMN["disk_usage"]] < 85


def test_clearing_ends_at_once_and_tells_what_it_ended() -> None:
    source = _source()
    _inject(source, "cpu-spike")
    _inject(source, "outage", server_id="web-01")
    _play(source, range(NOON, NOON + 4))
    ended = source.clear(VICTIM, "", (NOON + 3) * INTERVAL_MS)
    assert [injection.kind for injection in ended] == [ScenarioKind.CPU_SPIKE]
    ticks = range(NOON + 4, NOON + 6)
    played, healthy = _play(source, ticks), _healthy(ticks)
    assert np.array_equal(played[:, VICTIM_ROW, ~COUNTERS], healthy[:, VICTIM_ROW, ~COUNTERS])
    assert np.isnan(played[:, 0]).all()
    assert len(source.clear("", "", (NOON + 6) * INTERVAL_MS)) == 1
    assert not np.isnan(_play(source, range(NOON + 6, NOON + 7))[:, 0]).any()
    assert source.clear("", "", NOON * INTERVAL_MS) == ()


@pytest.mark.parametrize(
    ("server_id", "kind", "duration_s", "error", "field"),
    [
        (VICTIM, "earthquake", 60.0, InvalidArgument, "name"),
        (VICTIM, "", 60.0, InvalidArgument, "name"),
        (VICTIM, "outage", 0.5, InvalidArgument, "duration"),
        (VICTIM, "outage", -60.0, InvalidArgument, "duration"),
        (VICTIM, "outage", float("nan"), InvalidArgument, "duration"),
        (VICTIM, "outage", 8 * 86_400.0, InvalidArgument, "duration"),
        ("web-99", "outage", 60.0, NotFound, "server_id"),
        ("", "outage", 60.0, InvalidArgument, "server_id"),
    ],
)
def test_bad_injections_name_their_field(
    server_id: str, kind: str, duration_s: float, error: type[NotFound], field: str
) -> None:
    source = _source()
    with pytest.raises(error) as caught:
        source.inject(server_id, kind, duration_s, NOON * INTERVAL_MS)
    assert caught.value.field == field
    assert source.injections == ()


async def test_a_large_fleet_comes_in_batches_that_fit_a_message() -> None:
    source = _source(2_000)
    batches = await source.batches(NOON, NOON * INTERVAL_MS)
    assert len(batches) == 2
    assert sum(len(batch.rows.server_ids) for batch in batches) == 2_000
    assert all(batch.rows.values.size <= MAX_BATCH_POINTS for batch in batches)
    assert all(len(batch.servers) == len(batch.rows.server_ids) for batch in batches)
