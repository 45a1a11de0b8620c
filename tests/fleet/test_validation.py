"""Structural faults refuse the batch, row faults only the row, and both name the field."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet import validation
from fleet.codec import rows_to_pb
from fleet.model import Metric, MetricSet, Rows, ServerDescriptor
from runtime.errors import InvalidArgument

NOW_MS = 1_750_000_000_000
HOUR_MS = 3_600_000


def rows_of(*pairs: tuple[str, int], columns: int = 1) -> Rows:
    return Rows(
        metric_set_id="s",
        server_ids=tuple(server_id for server_id, _ in pairs),
        times_ms=np.array([ms for _, ms in pairs], np.int64),
        values=np.ones((len(pairs), columns)),
    )


@pytest.mark.parametrize(
    ("metrics", "field"),
    [
        ((), "metrics"),
        ((Metric(name=""),), "metrics[0].name"),
        ((Metric(name="a"), Metric(name="a")), "metrics[1]"),
        ((Metric(name="a"), Metric(name="x" * 256)), "metrics[1].name"),
        ((Metric(name="a\n"),), "metrics[0].name"),
        ((Metric(name="a", unit="u" * 64),), "metrics[0].unit"),
        ((Metric(name="a", labels=(("", "v"),)),), "metrics[0].labels"),
        ((Metric(name="a", labels=tuple((f"l{i}", "") for i in range(33))),), "metrics[0].labels"),
    ],
)
def test_bad_sets_are_refused_by_field(metrics: tuple[Metric, ...], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        validation.check_metric_set(MetricSet(metrics), "metrics")
    assert refused.value.field == field


def test_a_set_under_another_id_is_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        validation.check_metric_set(MetricSet((Metric(name="a"),)), "metrics", "0" * 32)
    assert refused.value.field == "metric_set_id"


def test_values_must_be_rows_times_metrics() -> None:
    batch = rows_to_pb(rows_of(("a", NOW_MS), columns=3))
    validation.check_batch(batch, 3)
    with pytest.raises(InvalidArgument) as refused:
        validation.check_batch(batch, 4)
    assert refused.value.field == "values"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Disque\u00a0dur", "U+00A0, after 'Disque'"),
        ("\u200bweb", "U+200B, at its beginning"),
        ("a" * 50 + "\n", f"U+000A, after {'a' * 20!r}"),
    ],
)
def test_a_character_that_nobody_sees_is_told_by_its_number_and_place(text: str, words: str) -> None:
    assert words in validation.server_id_fault(text)
    with pytest.raises(InvalidArgument) as refused:
        validation.check_metric_set(MetricSet((Metric(name="a", labels=(("mount", text),)),)), "metrics")
    assert (refused.value.field, words in refused.value.message) == ("metrics[0].labels", True)
    with pytest.raises(InvalidArgument) as refused:
        validation.check_descriptors([ServerDescriptor(server_id="a", hostname="a", location=text)])
    assert (refused.value.field, words in refused.value.message) == ("servers[0].location", True)


def test_row_faults_name_row_field_and_reason() -> None:
    rows = rows_of(
        ("ok", NOW_MS),
        ("", NOW_MS),
        ("a/b", NOW_MS),
        ("future", NOW_MS + HOUR_MS + 1),
        ("edge", NOW_MS + HOUR_MS),
        ("before 1970", -1),
        ("x" * 256, NOW_MS),
        ("1970", 0),
        ("..", NOW_MS),
    )
    keep, errors = validation.row_faults(rows, NOW_MS)
    assert keep.tolist() == [True, False, False, False, True, False, False, True, False]
    assert [(e.row, e.field, e.reason) for e in errors] == [
        (1, "rows[1].server_id", "BAD_SERVER_ID"),
        (2, "rows[2].server_id", "BAD_SERVER_ID"),
        (3, "rows[3].time", "TIME_IN_FUTURE"),
        (5, "rows[5].time", "TIME_OUT_OF_RANGE"),
        (6, "rows[6].server_id", "BAD_SERVER_ID"),
        (8, "rows[8].server_id", "BAD_SERVER_ID"),
    ]


@given(
    st.lists(
        st.text(max_size=4) | st.sampled_from(["a/b", "x" * 255, "x" * 256, "\ud800", ".", "..", "..."]), min_size=1
    )
)
def test_ids_judged_together_are_judged_as_one_by_one(server_ids: list[str]) -> None:
    keep, errors = validation.row_faults(rows_of(*((server_id, NOW_MS) for server_id in server_ids)), NOW_MS)
    assert keep.tolist() == [validation.server_id_fault(server_id) == "" for server_id in server_ids]
    assert [error.row for error in errors] == np.flatnonzero(~keep).tolist()


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize(
    ("ms", "reason"),
    [
        (-1, "TIME_OUT_OF_RANGE"),
        (NOW_MS - HOUR_MS, None),
        (NOW_MS - HOUR_MS - 1, "TOO_LATE"),
        (NOW_MS + HOUR_MS, None),
        (NOW_MS + HOUR_MS + 1, "TIME_IN_FUTURE"),
        (validation.MAX_TIME_MS + 1, "TIME_OUT_OF_RANGE"),
    ],
)
def test_one_time_at_fault_is_found_among_many(rows: int, ms: int, reason: str | None) -> None:
    pairs = [("a", NOW_MS)] * rows
    pairs[1] = ("a", ms)
    keep, errors = validation.row_faults(rows_of(*pairs), NOW_MS, NOW_MS - HOUR_MS)
    assert [(error.row, error.reason) for error in errors] == ([(1, reason)] if reason else [])
    assert keep.tolist() == [number != 1 or reason is None for number in range(rows)]


@pytest.mark.parametrize(
    ("server", "field"),
    [
        (ServerDescriptor(server_id="", hostname="h"), "servers[0].server_id"),
        (ServerDescriptor(server_id="a", hostname="h" * 256), "servers[0].hostname"),
        (ServerDescriptor(server_id="a", hostname="h", environment="e" * 51), "servers[0].environment"),
        (ServerDescriptor(server_id="a", hostname="h", role="\0"), "servers[0].role"),
        (ServerDescriptor(server_id="a", hostname="h", report_interval_ms=-1), "servers[0].report_interval"),
    ],
)
def test_bad_servers_are_refused_by_field(server: ServerDescriptor, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        validation.check_descriptors([server])
    assert refused.value.field == field
