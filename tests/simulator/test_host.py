"""The machine that the tests run on, measured."""

import socket
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from fleet.model import MetricKind
from fleet.validation import check_descriptors, check_metric_set
from services.simulator.host import HostSource
from tests.harness import eventually


def _busy(seconds: float) -> None:
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        pass


async def test_this_machine_appears_with_its_own_metrics() -> None:
    source = HostSource(interval_ms=10_000)
    await source.batches(0, 0)
    (batch,) = await source.batches(1, 1_760_000_000_000)
    check_metric_set(batch.metric_set, "metrics")
    check_descriptors(batch.servers)
    assert batch.rows.server_ids == (socket.gethostname(),)
    assert batch.rows.times_ms.tolist() == [1_760_000_000_000]
    values = dict(zip(batch.metric_set.keys, batch.rows.values[0].tolist(), strict=True))
    for name in ("cpu_usage", "memory_usage", "disk_usage"):
        assert 0.0 <= values[name] <= 100.0, name
    for name in ("load_1m", "process_count", "boot_time_seconds", "uptime_seconds", "swap_total_bytes"):
        assert values[name] >= 0.0
    assert values["process_count"] >= 1
    assert values["memory_total_bytes"] == psutil.virtual_memory().total
    assert values['filesystem_usage{mount="/"}'] == values["disk_usage"]
    assert 'cpu_core_usage{core="0"}' in values
    interface = next(iter(psutil.net_io_counters(pernic=True)))
    assert f'network_receive_bytes{{interface="{interface}"}}' in values
    assert np.isfinite(batch.rows.values).all()
    assert source.metric_count == len(values)


async def test_a_busy_loop_shows_within_two_ticks() -> None:
    cores = psutil.cpu_count() or 1

    async def shows() -> bool:
        source = HostSource(interval_ms=10_000)
        await source.batches(0, 0)
        _busy(0.6)
        (batch,) = await source.batches(1, 1_000)
        values = dict(zip(batch.metric_set.keys, batch.rows.values[0].tolist(), strict=True))
        of_cores = [value for name, value in values.items() if name.startswith("cpu_core_usage")]
        return values["cpu_usage"] > 60.0 / cores and max(of_cores) > 50.0  # one was kept busy by us alone

    await eventually(shows, within_s=20)  # once more where the machine itself stood still meanwhile


async def test_counters_are_counters_and_the_set_is_stable() -> None:
    source = HostSource(interval_ms=1_000)
    (first,) = await source.batches(0, 0)
    (second,) = await source.batches(1, 1_000)
    assert first.metric_set.id == second.metric_set.id
    counters = [metric.kind is MetricKind.COUNTER for metric in first.metric_set.metrics]
    assert sum(counters) > 10
    assert (second.rows.values[0][counters] >= first.rows.values[0][counters]).all()


async def test_an_interface_that_comes_and_goes_changes_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    source = HostSource(interval_ms=1_000)
    (before,) = await source.batches(0, 0)
    real = psutil.net_io_counters

    def with_another(pernic: bool = False) -> object:
        counters = real(pernic=pernic)
        return {**counters, "veth7": next(iter(counters.values()))} if pernic else counters

    monkeypatch.setattr(psutil, "net_io_counters", with_another)
    (during,) = await source.batches(1, 1_000)
    monkeypatch.setattr(psutil, "net_io_counters", real)
    (after,) = await source.batches(2, 2_000)
    assert 'network_receive_bytes{interface="veth7"}' in set(during.metric_set.keys) - set(before.metric_set.keys)
    assert after.metric_set == before.metric_set


@pytest.mark.parametrize(
    ("function", "answer", "part", "lacks", "error"),
    [
        ("virtual_memory", OSError("no such device"), "memory", "memory_usage", "OSError: no such device"),
        ("cpu_stats", ValueError("what is this line?"), "context switches and interrupts", "interrupts", "ValueError"),
        ("cpu_stats", SimpleNamespace(ctx_switches=None, interrupts=1), "context switches and interrupts", "", "TypeE"),
        ("swap_memory", KeyError("SwapTotal:"), "swap", "swap_usage", "KeyError"),
        ("disk_io_counters", ValueError("15 fields"), "disks", "disk_read_bytes_per_second", "ValueError: 15 fields"),
    ],
)
async def test_a_part_that_cannot_be_measured_leaves_the_rest_and_is_named_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    answer: object,
    part: str,
    lacks: str,
    error: str,
) -> None:
    caplog.set_level("INFO")
    source = HostSource(interval_ms=1_000)
    await source.batches(0, 0)

    def broken(**_: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with monkeypatch.context() as broken_psutil:
        broken_psutil.setattr(psutil, function, broken)
        for tick in (1, 2):
            (batch,) = await source.batches(tick, tick * 1_000)
    assert {"cpu_usage", "load_1m", "network_receive_bytes_per_second", "uptime_seconds"} <= set(batch.metric_set.keys)
    assert lacks not in batch.metric_set.keys
    named = [vars(record)["error"] for record in caplog.records if vars(record).get("part") == part]
    assert len(named) == 1 and named[0].startswith(error)
    (after,) = await source.batches(3, 3_000)
    assert set(after.metric_set.keys) >= set(batch.metric_set.keys) | ({lacks} if lacks else set())
    assert caplog.messages[-1] == "part of the machine can be measured again"
