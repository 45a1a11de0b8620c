"""The catalogue is the contract of the default load: 511 plain, unique, described metrics."""

import re

import pytest

from fleet.model import HEADLINE_METRICS, MetricKind
from fleet.validation import check_metric_set
from services.simulator.catalogue import CATALOGUE, COLUMN, METRIC_COUNT, METRIC_SET
from services.simulator.catalogue_words import counter
from services.simulator.drivers import Driver

UNITS = {"%", "1", "1/s", "By", "By/s", "s", "Hz", "Cel", "W", "J", "d", "[ppm]", "{rpm}"}


def test_has_exactly_511_unique_metrics() -> None:
    assert METRIC_COUNT == 511
    assert len(CATALOGUE) == len(METRIC_SET) == len(set(METRIC_SET.keys)) == METRIC_COUNT


def test_names_are_plain_and_mean_something() -> None:
    for metric in METRIC_SET.metrics:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", metric.name), metric.name
        assert not re.fullmatch(r"(metric|value|field|misc)_?\d+", metric.name)
        assert metric.labels == ()
        assert metric.key == metric.name


def test_units_and_kinds_are_given_and_fit_the_names() -> None:
    for metric in METRIC_SET.metrics:
        assert metric.unit in UNITS, metric
        assert metric.kind in {MetricKind.GAUGE, MetricKind.COUNTER}
        for ending, unit in {"_usage": "%", "_bytes": "By", "_bytes_per_second": "By/s", "_celsius": "Cel"}.items():
            if metric.name.endswith(ending):
                assert metric.unit == unit, metric
    assert sum(metric.kind is MetricKind.COUNTER for metric in METRIC_SET.metrics) > 100
    check_metric_set(METRIC_SET, "metrics")


def test_headline_metrics_are_percentages() -> None:
    for name in HEADLINE_METRICS:
        assert METRIC_SET.metrics[COLUMN[name]].unit == "%"
    assert {"load_1m", "cpu_core_00_usage", "memory_used_bytes", "network_eth0_receive_bytes"} <= COLUMN.keys()


def test_a_counter_needs_a_driver_with_an_integral() -> None:
    with pytest.raises(AssertionError, match="LATENCY"):
        counter("slowness", "s", Driver.LATENCY, 1.0)
