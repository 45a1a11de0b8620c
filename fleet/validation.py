"""What a batch must be before anything is kept of it, and which of its rows are taken.

Two kinds of fault, and they must stay apart (docs/architecture.md, "The write path"): a *structural* fault means that
the sender and we do not understand each other, so the whole batch is refused and nothing is kept; a *row* fault is the
matter of one row, so the other rows are durable and the answer names the row. Timeseries alone decides; the gateway
calls the same functions only to refuse early.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fleet.model import NO_TIME_MS, MetricSet, RowError, Rows, ServerDescriptor
from openmanager.fleet.v1 import metric_pb2
from runtime.errors import FailedPrecondition, InvalidArgument

MAX_SET_METRICS = 100_000
MAX_NAME_BYTES = 255
MAX_UNIT_BYTES = 63
MAX_LABELS = 32
MAX_LABEL_BYTES = 1024
MAX_BATCH_ROWS = 100_000
MAX_BATCH_VALUES = 2_000_000
MAX_SERVER_ID_CHARACTERS = 255
_DOT_SEGMENTS = (".", "..")
MAX_REPORT_INTERVAL_MS = 86_400_000
MAX_AHEAD_MS = 3_600_000
MAX_ROW_ERRORS = 100
"""How many row errors an answer lists; all rejected points are counted."""

MIN_TIME_MS = 0
MAX_TIME_MS = 9_223_372_036_854  # 2262-04-11, the last instant that nanoseconds in an int64 can name

_TEXT_LIMITS = {"hostname": 255, "environment": 50, "role": 50, "location": 100}


def check_metric_set(metric_set: MetricSet, field: str, stated_id: str = "") -> None:
    """Refuses a set that cannot serve as a dictionary.

    Args:
        metric_set: the set.
        field: what to call it in the error, for example ``metrics``.
        stated_id: the id that the sender gave; empty when it gave none.

    Raises:
        InvalidArgument: no or too many metrics, an identity twice, a bad name, unit or label, or a wrong id.
    """
    if not 1 <= len(metric_set) <= MAX_SET_METRICS:
        raise InvalidArgument(
            f"a metric set has 1 to {MAX_SET_METRICS} metrics (MAX_SET_METRICS), not {len(metric_set)}", field=field
        )
    seen: set[str] = set()
    for index, metric in enumerate(metric_set.metrics):
        where = f"{field}[{index}]"
        _check_text(metric.name, f"{where}.name", MAX_NAME_BYTES, required=True)
        _check_text(metric.unit, f"{where}.unit", MAX_UNIT_BYTES)
        if len(metric.labels) > MAX_LABELS:
            raise InvalidArgument(f"a metric has at most {MAX_LABELS} labels (MAX_LABELS)", field=f"{where}.labels")
        for label, value in metric.labels:
            _check_text(label, f"{where}.labels", MAX_LABEL_BYTES, required=True)
            _check_text(value, f"{where}.labels", MAX_LABEL_BYTES)
        key = metric_set.keys[index]
        if key in seen:
            raise InvalidArgument(f"the metric {key} is there twice", field=where)
        seen.add(key)
    if stated_id and stated_id != metric_set.id:
        raise InvalidArgument(
            f"the metric set id {stated_id[:64]} does not belong to these metrics, theirs is {metric_set.id}",
            field="metric_set_id",
        )


def check_batch(batch: metric_pb2.MetricBatch, metric_count: int) -> None:
    """Refuses a batch whose parts do not fit together.

    Raises:
        InvalidArgument: too many rows or values, or values that are not rows x metrics.
    """
    if len(batch.rows) > MAX_BATCH_ROWS:
        raise InvalidArgument(
            f"a batch has at most {MAX_BATCH_ROWS} rows (MAX_BATCH_ROWS), not {len(batch.rows)}", field="rows"
        )
    if len(batch.values) > MAX_BATCH_VALUES:
        raise InvalidArgument(
            f"a batch has at most {MAX_BATCH_VALUES} values (MAX_BATCH_VALUES), not {len(batch.values)}", field="values"
        )
    expected = len(batch.rows) * metric_count
    if len(batch.values) != expected:
        raise InvalidArgument(
            f"{len(batch.rows)} rows x {metric_count} metrics need {expected} values, not {len(batch.values)}",
            field="values",
        )


def metric_set_unknown(metric_set_id: str, field: str) -> FailedPrecondition:
    """The error that asks a sender for its set."""
    return FailedPrecondition(
        f"the metric set {metric_set_id[:64] or '(none given)'} is not known here: send it again with its metrics",
        reason="METRIC_SET_UNKNOWN",
        field=field,
    )


def row_faults(
    rows: Rows, now_ms: int, oldest_ms: int = MIN_TIME_MS, rolled_up: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.bool_], list[RowError]]:
    """Judges each row by itself.

    Args:
        rows: the rows as sent.
        now_ms: the receiver's clock.
        oldest_ms: the first instant of which the receiver keeps rows.
        rolled_up: which rows (n) are for roll-ups whose points are gone; None: none.

    Returns:
        Which rows are taken (bool, shape (n,)), and an error for each of the others.
    """
    times = rows.times_ms
    if rolled_up is None and _ids_are_good(
        rows.server_ids
    ):  # nearly always; one by one the rows of a tick of 20 take five times as long
        first, last = rows.span_ms
        if max(MIN_TIME_MS, oldest_ms) <= first and last <= min(MAX_TIME_MS, now_ms + MAX_AHEAD_MS):
            return np.ones(len(times), np.bool_), []
    ahead = times > now_ms + MAX_AHEAD_MS
    out_of_range = (times < MIN_TIME_MS) | (times > MAX_TIME_MS)
    too_old = times < oldest_ms
    too_late = too_old if rolled_up is None else too_old | rolled_up
    bad_ids = {server_id for server_id in set(rows.server_ids) if server_id_fault(server_id)}
    bad_id = np.fromiter((server_id in bad_ids for server_id in rows.server_ids), np.bool_, len(rows.server_ids))
    faulty = ahead | out_of_range | too_late | bad_id
    errors = []
    for row in np.flatnonzero(faulty).tolist():
        if bad_id[row]:
            name, reason = "server_id", "BAD_SERVER_ID"
            message = server_id_fault(rows.server_ids[row])
        elif times[row] == NO_TIME_MS:
            name, reason, message = "time", "TIME_MISSING", "the row has no time"
        elif out_of_range[row]:
            name, reason = "time", "TIME_OUT_OF_RANGE"
            message = "the time lies outside 1970-01-01 to 2262-04-11"
        elif too_late[row]:
            name, reason = "time", "TOO_LATE"
            message = (
                f"the time lies {(oldest_ms - int(times[row])) / 1000:.0f} s before the oldest rows that are kept"
                if too_old[row]
                else "the points of that time are gone, and what they were rolled up to is final"
            )
        else:
            name, reason = "time", "TIME_IN_FUTURE"
            message = (
                f"the time lies {(int(times[row]) - now_ms) / 1000:.0f} s ahead of our clock; at most 3600 s are taken"
            )
        errors.append(RowError(row=row, field=f"rows[{row}].{name}", reason=reason, message=message))
    return ~faulty, errors


def _ids_are_good(server_ids: tuple[str, ...]) -> bool:
    """Whether there are ids and `server_id_fault` finds fault with none, asked of all at once."""
    if not all(server_ids) or max(map(len, server_ids), default=0) > MAX_SERVER_ID_CHARACTERS:
        return False
    if any(segment in server_ids for segment in _DOT_SEGMENTS):
        return False
    together = "".join(server_ids)
    return bool(together) and together.isprintable() and "/" not in together


def server_id_fault(server_id: str) -> str:
    """Says what is wrong with a server id; empty when nothing is."""
    if not server_id:
        return "the server id is empty"
    if len(server_id) > MAX_SERVER_ID_CHARACTERS:
        return f"the server id is longer than {MAX_SERVER_ID_CHARACTERS} characters"
    if "/" in server_id:
        return "the server id has a '/'"
    if not server_id.isprintable():
        return f"the server id has {_unprintable(server_id)}"
    if server_id in _DOT_SEGMENTS:
        return "the server id is '.' or '..', which every client of HTTP takes out of a path"
    return ""


def check_descriptors(descriptors: Iterable[ServerDescriptor], field: str = "servers") -> None:
    """Refuses descriptions of servers that no store could keep.

    Raises:
        InvalidArgument: naming the field.
    """
    for index, descriptor in enumerate(descriptors):
        where = f"{field}[{index}]"
        fault = server_id_fault(descriptor.server_id)
        if fault:
            raise InvalidArgument(fault, field=f"{where}.server_id")
        for name, limit in _TEXT_LIMITS.items():
            text: str = getattr(descriptor, name)
            if len(text) > limit:
                raise InvalidArgument(f"{name} is longer than {limit} characters", field=f"{where}.{name}")
            if text and not text.isprintable():
                raise InvalidArgument(f"{name} has {_unprintable(text)}", field=f"{where}.{name}")
        if not 0 <= descriptor.report_interval_ms <= MAX_REPORT_INTERVAL_MS:
            raise InvalidArgument("report_interval lies outside 0 s to 1 day", field=f"{where}.report_interval")


def _check_text(text: str, field: str, limit_bytes: int, *, required: bool = False) -> None:
    if required and not text:
        raise InvalidArgument("the text is empty", field=field)
    if len(text.encode()) > limit_bytes:
        raise InvalidArgument(f"the text is longer than {limit_bytes} bytes", field=field)
    if text and not text.isprintable():
        raise InvalidArgument(f"the text has {_unprintable(text)}", field=field)


def _unprintable(text: str) -> str:
    """Names the first character that nobody could see, by its number and where it is."""
    place, bad = next((place, one) for place, one in enumerate(text) if not one.isprintable())
    before = f"after {text[max(0, place - 20) : place]!r}" if place else "at its beginning"
    return f"a character that cannot be shown, U+{ord(bad):04X}, {before}"
