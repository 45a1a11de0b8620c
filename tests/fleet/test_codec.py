"""Encoding and decoding lose nothing: times to the millisecond, values bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fleet import codec
from fleet.model import Metric, MetricKind, MetricSet, Rows, ServerDescriptor
from fleet.validation import row_faults
from openmanager.fleet.v1 import metric_pb2
from openmanager.gateway.v1 import ingest_pb2

TIMES = st.integers(0, 9_223_372_036_854)


@given(TIMES)
def test_timestamps_round_trip(ms: int) -> None:
    assert codec.ms_from_timestamp(codec.timestamp_from_ms(ms)) == ms


@given(st.integers(-(10**12), 10**12))
def test_durations_round_trip(ms: int) -> None:
    assert codec.ms_from_duration(codec.duration_from_ms(ms)) == ms


@settings(max_examples=50)
@given(
    st.tuples(st.integers(0, 9), st.integers(1, 30)).flatmap(
        lambda shape: st.tuples(
            hnp.arrays(np.uint64, shape),  # every bit pattern, NaN payloads and subnormals included
            st.lists(TIMES, min_size=shape[0], max_size=shape[0]),
        )
    )
)
def test_rows_round_trip_bit_for_bit(drawn: tuple[np.ndarray, list[int]]) -> None:
    bits, times = drawn
    values = bits.view(np.float64)
    rows = Rows(
        metric_set_id="s",
        server_ids=tuple(f"server-{index}" for index in range(len(times))),
        times_ms=np.array(times, np.int64),
        values=values,
    )
    wire = codec.rows_to_pb(rows).SerializeToString()
    back = codec.rows_from_pb(metric_pb2.MetricBatch.FromString(wire), values.shape[1])
    assert back.server_ids == rows.server_ids
    assert back.times_ms.tolist() == times
    assert back.values.view(np.uint64).tolist() == bits.tolist()


def test_fast_encoding_equals_the_ordinary_one() -> None:
    rows = Rows(
        metric_set_id="s",
        server_ids=("a", "b"),
        times_ms=np.array([1500, 2001]),
        values=np.array([[1.0, 2.0], [3.0, 4.0]]),
    )
    plain = metric_pb2.MetricBatch(metric_set_id="s", values=[1.0, 2.0, 3.0, 4.0])
    for server_id, ms in (("a", 1500), ("b", 2001)):
        plain.rows.add(server_id=server_id, time=codec.timestamp_from_ms(ms))
    assert codec.rows_to_pb(rows) == plain


@pytest.mark.parametrize("seconds", [-(1 << 63), (1 << 63) - 1])
def test_a_time_that_no_int64_holds_in_ms_is_the_fault_of_its_row_alone(seconds: int) -> None:
    batch = metric_pb2.MetricBatch(metric_set_id="s", values=[1.0, 2.0])
    batch.rows.add(server_id="a").time.seconds = seconds
    batch.rows.add(server_id="b").time.seconds = 1_750_000_000
    rows = codec.rows_from_pb(batch, 1)
    assert rows.times_ms.tolist() == [(1 << 63) - 1 if seconds > 0 else -(1 << 63), 1_750_000_000_000]
    keep, errors = row_faults(rows, 1_750_000_000_000)
    assert keep.tolist() == [False, True]
    assert [(error.row, error.reason) for error in errors] == [(0, "TIME_OUT_OF_RANGE")]


def test_a_row_without_a_time_stays_one_on_its_way_to_a_replica() -> None:
    batch = metric_pb2.MetricBatch(metric_set_id="s", values=[1.0])
    batch.rows.add(server_id="a")
    for _ in range(2):
        rows = codec.rows_from_pb(batch, 1)
        _, errors = row_faults(rows, 1_750_000_000_000)
        assert [(error.field, error.reason) for error in errors] == [("rows[0].time", "TIME_MISSING")]
        batch = codec.rows_to_pb(rows)


def test_sets_and_servers_round_trip() -> None:
    metric_set = MetricSet((Metric(name="a", unit="By", kind=MetricKind.COUNTER, labels=(("k", "v"), ("l", "w"))),))
    message = codec.metric_set_to_pb(metric_set)
    assert message.id == metric_set.id
    assert codec.metric_set_from_pb(message) == metric_set
    server = ServerDescriptor(
        server_id="i", hostname="h", environment="e", role="r", location="l", report_interval_ms=1500
    )
    assert codec.descriptor_from_pb(codec.descriptor_to_pb(server)) == server


def test_an_unknown_metric_kind_of_a_newer_sender_is_unspecified() -> None:
    message = metric_pb2.Metric.FromString(metric_pb2.Metric(name="a").SerializeToString() + b"\x18\x63")
    assert codec.metric_from_pb(message).kind is MetricKind.UNSPECIFIED


def test_the_public_batch_begins_with_the_fields_of_the_inner_one() -> None:
    """gateway.servicers.ingest hands the bytes on; drift of a number or a type would corrupt them."""
    outer = ingest_pb2.WriteMetricsRequest.DESCRIPTOR.fields_by_number
    for number, inner in metric_pb2.MetricBatch.DESCRIPTOR.fields_by_number.items():
        assert (outer[number].name, outer[number].type, outer[number].message_type) == (
            inner.name,
            inner.type,
            inner.message_type,
        )
