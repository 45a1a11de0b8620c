"""An UpdateServersRequest as the domain's values, or the error that refuses it.

What must stay true: a request is refused before anything of it is applied; the error names the field of the request.
"""

import asyncio

from fleet.codec import descriptor_from_pb, details_from_pb, metric_set_from_pb, rows_from_pb
from fleet.model import MetricSet, Rows
from fleet.validation import check_batch, check_descriptors, check_metric_set, metric_set_unknown, row_faults
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import metric_pb2
from runtime.errors import InvalidArgument
from services.cache.metric_sets import MetricSets
from services.cache.state import Update

_LARGE_SET_METRICS = 2_000  # decoding, checking and hashing take 3-4 us a metric: larger sets go to a thread


async def decode_update(
    request: cache_pb2.UpdateServersRequest, sets: MetricSets, now_ms: int
) -> tuple[Update, list[MetricSet], int]:
    """Decodes and checks a request.

    Args:
        request: what came.
        sets: the sets known already; not changed.
        now_ms: our clock, for rows that lie too far ahead of it.

    Returns:
        What to apply, the sets to learn, and how many rows cannot be taken (time too far ahead, bad server id).

    Raises:
        InvalidArgument: a structural fault.
        FailedPrecondition: METRIC_SET_UNKNOWN.
    """
    new_sets = {
        metric_set.id: metric_set
        for index, message in enumerate(request.metric_sets)
        if not message.id or sets.get(message.id) is None
        for metric_set in [await _decode_set(message, f"metric_sets[{index}]")]
    }
    descriptors = [descriptor_from_pb(message) for message in request.servers]
    check_descriptors(descriptors)
    told_before = [descriptor_from_pb(message) for message in request.servers_again]
    check_descriptors(told_before, "servers_again")
    batches, refused_rows = [], 0
    for index, batch in enumerate(request.batches):
        metric_set = new_sets.get(batch.metric_set_id) or sets.get(batch.metric_set_id)
        if metric_set is None:
            raise metric_set_unknown(batch.metric_set_id, f"batches[{index}].metric_set_id")
        rows, refused = _decode_rows(batch, metric_set, f"batches[{index}]", now_ms)
        batches.append((metric_set, rows))
        refused_rows += refused
    update = Update(
        descriptors=descriptors,
        told_before=told_before,
        batches=batches,
        admit_removed=request.admit_removed,
        details={recorded.server_id: details_from_pb(recorded.details) for recorded in request.details},
    )
    return update, list(new_sets.values()), refused_rows


async def _decode_set(message: metric_pb2.MetricSet, field: str) -> MetricSet:
    def decode() -> MetricSet:
        metric_set = metric_set_from_pb(message)
        check_metric_set(metric_set, f"{field}.metrics")
        if message.id not in ("", metric_set.id):
            raise InvalidArgument(
                f"the id does not belong to these metrics, theirs is {metric_set.id}", field=f"{field}.id"
            )
        return metric_set

    return decode() if len(message.metrics) <= _LARGE_SET_METRICS else await asyncio.to_thread(decode)


def _decode_rows(batch: metric_pb2.MetricBatch, metric_set: MetricSet, field: str, now_ms: int) -> tuple[Rows, int]:
    try:
        check_batch(batch, len(metric_set))
    except InvalidArgument as error:
        raise InvalidArgument(error.message, reason=error.reason, field=f"{field}.{error.field}") from None
    rows = rows_from_pb(batch, len(metric_set))
    keep, _ = row_faults(rows, now_ms)
    if keep.all():
        return rows, 0
    return rows.select(keep), int(len(keep) - keep.sum())
