"""One trace from an update to its write in Redis, and silence from work that nobody asked for."""

import random
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from runtime import telemetry
from runtime.clock import SystemClock
from services.cache.core import Cache
from services.cache.state import Update
from services.cache.store_redis import RedisStateStore
from tests.cache.samples import WIDE, tick
from tests.harness import eventually
from tests.harness.redis import RedisServer


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    telemetry.configure("cache-test", exporter=exporter)
    yield exporter
    telemetry.shutdown()


async def test_the_write_to_redis_belongs_to_the_update_that_caused_it(
    spans: InMemorySpanExporter, redis: RedisServer
) -> None:
    async with Cache(RedisStateStore(redis.url), SystemClock(), epoch="e", rng=random.Random(1)) as cache:
        await eventually(cache.follower.probe)
        cache.follower.mark_everything()
        await eventually(lambda: cache.follower._life and not cache.follower._everything)
        assert spans.get_finished_spans() == ()
        with telemetry.tracer("test").start_as_current_span("update") as update:
            await cache.update(Update(batches=[tick(20, time.time_ns() // 1_000_000)]), [WIDE])
        names = {"update", "cache.follow", "PIPELINE"}
        await eventually(lambda: names <= {span.name for span in spans.get_finished_spans()})
    by_name = {span.name: span for span in spans.get_finished_spans()}
    assert set(by_name) == names
    follow, pipeline = by_name["cache.follow"], by_name["PIPELINE"]
    assert follow.parent is not None
    assert pipeline.parent is not None
    assert follow.parent.span_id == update.get_span_context().span_id
    assert pipeline.parent.span_id == follow.context.span_id
    assert follow.context.trace_id == pipeline.context.trace_id == update.get_span_context().trace_id
    assert follow.attributes is not None
    assert follow.attributes["openmanager.servers"] == 20
    assert "cpu_usage" not in str(pipeline.attributes)
