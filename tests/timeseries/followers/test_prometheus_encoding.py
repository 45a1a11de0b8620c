"""Remote write messages as protobuf itself reads them, and names that come back as they were."""

import math
from collections import Counter
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.model import Metric, MetricKind, MetricSet, metric_key
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.remote_write import Encoded, RemoteWriteEncoder, single
from services.timeseries.followers.remote_write_labels import Version
from services.timeseries.prometheus.labels import (
    EMPTY_LABELS,
    METRIC,
    escaped_label,
    escaped_name,
    key_of,
    labels_of,
    unescaped,
)
from tests.timeseries.followers.samples import NOON_MS, descriptor, metric_set, rows

Series = dict[tuple[tuple[str, str], ...], list[tuple[int, float]]]
NAN = math.nan
_FIELD = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, list[tuple[str, int, int, str]]] = {
    "Label": [("name", 1, _FIELD.TYPE_STRING, ""), ("value", 2, _FIELD.TYPE_STRING, "")],
    "Sample": [("value", 1, _FIELD.TYPE_DOUBLE, ""), ("timestamp", 2, _FIELD.TYPE_INT64, "")],
    "TimeSeries": [("labels", 1, _FIELD.TYPE_MESSAGE, "*Label"), ("samples", 2, _FIELD.TYPE_MESSAGE, "*Sample")],
    "WriteRequest": [("timeseries", 1, _FIELD.TYPE_MESSAGE, "*TimeSeries")],
    "Metadata": [
        ("type", 1, _FIELD.TYPE_INT32, ""),
        ("help_ref", 3, _FIELD.TYPE_UINT32, ""),
        ("unit_ref", 4, _FIELD.TYPE_UINT32, ""),
    ],
    "TimeSeriesV2": [
        ("labels_refs", 1, _FIELD.TYPE_UINT32, "*"),
        ("samples", 2, _FIELD.TYPE_MESSAGE, "*Sample"),
        ("metadata", 5, _FIELD.TYPE_MESSAGE, "Metadata"),
    ],
    "Request": [("symbols", 4, _FIELD.TYPE_STRING, "*"), ("timeseries", 5, _FIELD.TYPE_MESSAGE, "*TimeSeriesV2")],
}


def _message(name: str) -> Any:
    """A message class made of the specification's field numbers, apart from the code under test."""
    file = descriptor_pb2.FileDescriptorProto(name="remote_write_test.proto", package="test", syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for field_name, number, kind, more in fields:
            field = message.field.add(name=field_name, number=number, type=kind, label=_FIELD.LABEL_OPTIONAL)  # type: ignore[arg-type]
            if more.startswith("*"):
                field.label = _FIELD.LABEL_REPEATED
            if more.strip("*"):
                field.type_name = f".test.{more.strip('*')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"test.{name}"))


WRITE_REQUEST, REQUEST = _message("WriteRequest"), _message("Request")


def decoded(encoded: Encoded, version: Version) -> Series:
    """Series by labels; asserts what the specification demands."""
    if version is Version.V1:
        message = WRITE_REQUEST.FromString(encoded.body())
        listed = [([(pair.name, pair.value) for pair in one.labels], one.samples) for one in message.timeseries]
    else:
        message = REQUEST.FromString(encoded.body())
        symbols = list(message.symbols)
        assert symbols[0] == "" and len(set(symbols)) == len(symbols)
        listed = []
        for one in message.timeseries:
            texts = [symbols[ref] for ref in one.labels_refs]
            listed.append((list(zip(texts[::2], texts[1::2], strict=True)), one.samples))
    found: Series = {}
    for labels, samples in listed:
        assert labels == sorted(labels) and len(dict(labels)) == len(labels) and all(map(all, labels))
        times = [sample.timestamp for sample in samples]
        assert times == sorted(set(times)) and times
        assert tuple(labels) not in found, "a series is in a request once"
        found[tuple(labels)] = [(sample.timestamp, sample.value) for sample in samples]
    return found


def encode(version: Version, *batch: TaggedRows) -> tuple[Encoded, Counter[str]]:
    refused: Counter[str] = Counter()
    return RemoteWriteEncoder().encode(batch, version, refused), refused


def tagged(of_set: MetricSet, lines: list[tuple[str, int, list[float]]], environment: str = "prod") -> TaggedRows:
    batch = rows(of_set, lines)
    told = tuple(descriptor(server, environment) for server in batch.server_ids)
    return TaggedRows(metric_set=of_set, rows=batch, descriptors=told)


def series(name: str, server: str, environment: str = "prod", **more: str) -> tuple[tuple[str, str], ...]:
    labels = {"__name__": name, "server_id": server, "environment": environment, "role": "web"} | more
    return tuple(sorted((label, value) for label, value in labels.items() if value))


@pytest.mark.parametrize("version", Version)
def test_messages_are_what_the_specification_says(version: Version) -> None:
    labelled = Metric(name="disk", labels=(("A", "1"), ("mount", "/"), ("run", "x"), ("sort", "y"), ("zone", "z")))
    of_set = MetricSet(metrics=(Metric(name="cpu", unit="%", kind=MetricKind.GAUGE), labelled, Metric(name="count")))
    batch = tagged(of_set, [("a", NOON_MS, [1.5, NAN, math.inf]), ("b", NOON_MS, [NAN, -0.0, 0.0])])
    encoded, refused = encode(version, batch)
    own = {"A": "1", "mount": "/", "run": "x", "sort": "y", "zone": "z"}
    assert decoded(encoded, version) == {
        series("cpu", "a"): [(NOON_MS, 1.5)],
        series("count", "a"): [(NOON_MS, math.inf)],
        series("disk", "b", **own): [(NOON_MS, 0.0)],
        series("count", "b"): [(NOON_MS, 0.0)],
    }
    assert encoded.points == 4 and not refused
    if version is Version.V2:
        message = REQUEST.FromString(encoded.body())
        first = message.timeseries[0].metadata
        assert (first.type, message.symbols[first.unit_ref]) == (2, "%")
        assert not message.timeseries[1].HasField("metadata")


@pytest.mark.parametrize("version", Version)
def test_samples_of_a_series_are_together_in_order_and_the_later_row_wins(version: Version) -> None:
    first, second = metric_set("cpu", "load"), metric_set("load", "more")
    batch = [
        tagged(first, [("a", NOON_MS + 5, [1.0, 1.0]), ("a", NOON_MS + 3, [2.0, 2.0]), ("a", NOON_MS + 5, [3.0, NAN])]),
        tagged(second, [("a", NOON_MS + 4, [7.0, 7.0]), ("a", NOON_MS + 3, [8.0, 8.0])]),
        tagged(second, [("a", NOON_MS + 4, [9.0, 9.0])], "staging"),
        tagged(first, [("a", NOON_MS + 4, [4.0, 5.0])]),
    ]
    encoded, _ = encode(version, *batch)
    assert decoded(encoded, version) == {
        series("cpu", "a"): [(NOON_MS + 3, 2.0), (NOON_MS + 4, 4.0), (NOON_MS + 5, 3.0)],
        series("load", "a"): [(NOON_MS + 3, 8.0), (NOON_MS + 4, 5.0), (NOON_MS + 5, 1.0)],
        series("more", "a"): [(NOON_MS + 3, 8.0), (NOON_MS + 4, 7.0)],
        series("load", "a", "staging"): [(NOON_MS + 4, 9.0)],
        series("more", "a", "staging"): [(NOON_MS + 4, 9.0)],
    }


@pytest.mark.parametrize("version", Version)
def test_any_time_and_any_split(version: Version) -> None:
    of_set = metric_set(*(f"m{number}" for number in range(40)))
    times = [0, 1, 127, 128, 1 << 34, 1 << 42, 9_223_372_036_854]
    batch = tagged(of_set, [("a" * 200, time, [float(time)] * 40) for time in times])
    encoded, _ = encode(version, batch)
    whole = decoded(encoded, version)
    assert all(points == [(time, float(time)) for time in times] for points in whole.values()) and len(whole) == 40
    found: Series = {}
    parts = list(encoded.split(1_000))
    assert len(parts) > 5 and max(len(part.body()) - len(part.head) for part in parts) < 1_000
    for part in parts:
        found |= decoded(part, version)
    assert found == whole
    waiting, single_samples = [encoded], 0
    while waiting:
        halves = waiting.pop()
        if halves.halves() is None:
            single_samples += 1
            assert halves.points == 1
        else:
            first, second = halves.halves()  # type: ignore[misc]
            assert first.points + second.points == halves.points
            waiting += (first, second)
    assert single_samples == encoded.points == 280
    assert decoded(single(version, "probe", 5, 1.0), version) == {(("__name__", "probe"),): [(5, 1.0)]}


def test_a_label_that_is_too_long_to_be_stored_everywhere_is_counted() -> None:
    of_set = MetricSet(
        metrics=(Metric(name="fits", labels=(("n" * 256, "v"),)), Metric(name="x", labels=(("n" * 257, "v"),)))
    )
    encoded, refused = encode(Version.V1, tagged(of_set, [("a", 1, [1.0, 2.0]), ("a", 2, [1.0, NAN])]))
    assert encoded.points == 2 and refused == {"NAME_NOT_REPRESENTABLE": 1}


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
_AWKWARD = st.sampled_from(
    ["server_id", "role", "environment", "__name__", "__x", "U__", "U__a_", EMPTY_LABELS, METRIC, "a:b", "9", "_5f_"]
)
_NAMES = st.one_of(_TEXT, _AWKWARD)


@settings(deadline=None, database=None)
@given(_NAMES, st.dictionaries(_NAMES, st.one_of(st.just(""), _TEXT), max_size=4))
def test_every_key_comes_back_from_its_labels(name: str, own: dict[str, str]) -> None:
    labels = labels_of(name, own.items())
    assert labels is not None and all(labels.values())
    stored = labels | {"server_id": "a", "environment": "e", "role": "r"}
    assert len(stored) == len(labels) + 3, "none of a metric's labels is taken for ours"
    assert key_of(stored) == metric_key(name, own.items())


@settings(deadline=None, database=None)
@given(_NAMES, _NAMES)
def test_names_are_plain_there_and_no_two_are_the_same(name: str, other: str) -> None:
    for escape, more in ((escaped_name, ":"), (escaped_label, "")):
        escaped = escape(name)
        assert set(escaped) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_" + more)
        assert not escaped[0].isdigit() and unescaped(escaped) == name
        assert (escaped == escape(other)) == (name == other)


def test_names_are_escaped_as_prometheus_does() -> None:
    assert [escaped_name(name) for name in ("cpu_usage", "a:b", "no:de é", "a_b c", "5x", "U__x")] == [
        "cpu_usage",
        "a:b",
        "U__no_3a_de_20__e9_",
        "U__a__b_20_c",
        "U___35_x",
        "U__U____x",
    ]
    assert [escaped_label(label) for label in ("mount", "role", "a:b", "__x")] == [
        "mount",
        "U__role",
        "U__a_3a_b",
        "U______x",
    ]
    assert unescaped("U__a_ffffff_") == "a_ffffff_" or unescaped("U__a_ffffff_")
