"""What counts as a resource, and what as a counter of errors."""

import pytest

from fleet.model import Metric, MetricKind
from services.analytics.detect import SetColumns
from services.analytics.prediction.words import Role, role_of
from services.simulator.catalogue import METRIC_SET

GAUGE, COUNTER = MetricKind.GAUGE, MetricKind.COUNTER


@pytest.mark.parametrize(
    ("name", "unit", "kind", "role"),
    [
        ("disk_usage", "%", GAUGE, Role.RESOURCE),
        ("filesystem_usage", "%", GAUGE, Role.RESOURCE),
        ("memory_usage", "", GAUGE, Role.RESOURCE),
        ("swap_used_percent", "%", GAUGE, Role.RESOURCE),
        ("filesystem_root_inodes_usage", "%", GAUGE, Role.RESOURCE),
        ("system.memory.usage", "%", MetricKind.UNSPECIFIED, Role.RESOURCE),
        ("memory_used_bytes", "By", GAUGE, Role.NONE),
        ("memory_free_percent", "%", GAUGE, Role.NONE),
        ("cpu_usage", "%", GAUGE, Role.NONE),
        ("disk_nvme0_busy_usage", "%", GAUGE, Role.NONE),
        ("pressure_memory_full_10s", "%", GAUGE, Role.NONE),
        ("postgres_cache_hit_usage", "%", GAUGE, Role.NONE),
        ("network_usage", "%", GAUGE, Role.NONE),
        ("network_eth0_receive_errors", "1", COUNTER, Role.ERRORS),
        ("tcp_segments_retransmitted", "1", COUNTER, Role.ERRORS),
        ("http_responses_5xx", "1", COUNTER, Role.ERRORS),
        ("http_error_usage", "%", GAUGE, Role.NONE),
        ("disk_reads", "1", COUNTER, Role.NONE),
    ],
)
def test_a_metric_is_known_by_unit_kind_and_name(name: str, unit: str, kind: MetricKind, role: Role) -> None:
    assert role_of(Metric(name=name, unit=unit, kind=kind)) is role


def test_roles_lie_beside_the_series_of_a_set() -> None:
    columns = SetColumns.of(METRIC_SET)
    by_name = {name: Role(role) for name, _, role in columns.series}
    assert [role for _, _, role in columns.series] == columns.roles.tolist()
    assert by_name == {metric.key: role_of(metric) for metric in METRIC_SET.metrics}
    resources = [name for name, role in by_name.items() if role is Role.RESOURCE]
    assert {"disk_usage", "memory_usage", "swap_usage", "filesystem_var_log_usage"} <= set(resources)
    assert len(resources) == 16
    assert sum(role is Role.ERRORS for role in by_name.values()) > 40
