"""Prometheus-compatible stores as the tests of reading back use them: what is shipped, and what is asked."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np

from fleet.model import Metric, MetricKind, MetricSet, Rows
from runtime.clock import Clock, SystemClock
from services.timeseries.engine import Query
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.prometheus import PrometheusBackend
from services.timeseries.remote.prometheus import PrometheusHistory
from tests.harness.prometheus import PrometheusApi
from tests.timeseries.engine.model import Answer
from tests.timeseries.followers.samples import descriptor

CLOCK = SystemClock()
DAY_MS = 86_400_000


async def nothing() -> None:
    """What is written is visible at once."""


class Store(NamedTuple):
    """A running store, how to make what was written visible, and how many digits it keeps."""

    api: PrometheusApi
    write_urls: list[str]
    query_urls: list[str]
    flush: Callable[[], Any] = nothing
    digits: int | None = None


@asynccontextmanager
async def reading(urls: Iterable[str], clock: Clock = CLOCK, **bounds: Any) -> AsyncIterator[PrometheusHistory]:
    history = PrometheusHistory(query_urls=list(urls), clock=clock, **bounds)
    try:
        yield history
    finally:
        await history.close()


def tagged(of_set: MetricSet, batch: Rows, environment: str = "production") -> TaggedRows:
    told = tuple(descriptor(server, environment) for server in batch.server_ids)
    return TaggedRows(metric_set=of_set, rows=batch, descriptors=told)


async def shipped(store: Store, batches: list[TaggedRows]) -> None:
    backend = PrometheusBackend(write_urls=store.write_urls, clock=CLOCK)
    for batch in batches:
        receipt = await backend.ship([batch])
        assert (receipt.shipped, dict(receipt.refused)) == (batch.rows.points, {})
    await backend.close()
    await store.flush()


async def ask(history: PrometheusHistory, query: Query, metrics: dict[str, Metric]) -> Answer:
    """The answer in the oracle's form; asserts the order of the series."""
    results = [result async for result in history.query(query, metrics)]
    names = [(result.server_id, result.metric_key) for result in results]
    assert names == sorted(names)
    for result in results:
        assert result.times_ms.dtype == np.int64
        known = metrics.get(result.metric_key)
        assert (result.unit, result.kind) == ((known.unit, known.kind) if known else ("", MetricKind.UNSPECIFIED))
    return {
        name: list(zip(result.times_ms.tolist(), result.values.tolist(), strict=True))
        for name, result in zip(names, results, strict=True)
    }
