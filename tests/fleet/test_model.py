"""Identities must not depend on order, process or language; they are on disk and on the wire."""

import hashlib

import pytest

from fleet.model import Metric, MetricKind, MetricSet, metric_key


def test_key_of_a_plain_metric_is_its_name() -> None:
    assert Metric(name="cpu_usage").key == "cpu_usage"


def test_key_sorts_labels_and_escapes_values() -> None:
    assert metric_key("disk", [("mount", '/a"b\\c\nd'), ("dev", "sda")]) == 'disk{dev="sda",mount="/a\\"b\\\\c\\nd"}'


def test_set_id_is_as_documented() -> None:
    metric_set = MetricSet(
        (
            Metric(name="cpu", unit="%", kind=MetricKind.GAUGE),
            Metric(name="disk", kind=MetricKind.COUNTER, labels=(("mount", "/"),)),
        )
    )
    documented = b"3:cpu1:%1:1;4:disk0:1:25:mount1:/;"
    assert metric_set.id == hashlib.sha256(documented).hexdigest()[:32]


@pytest.mark.parametrize(
    "other",
    [
        Metric(name="a", unit="bc"),
        Metric(name="abc"),
        Metric(name="ab", unit="c", kind=MetricKind.GAUGE),
        Metric(name="ab", unit="c", labels=(("x", "y"),)),
    ],
)
def test_sets_that_differ_have_different_ids(other: Metric) -> None:
    assert MetricSet((Metric(name="ab", unit="c"),)).id != MetricSet((other,)).id
