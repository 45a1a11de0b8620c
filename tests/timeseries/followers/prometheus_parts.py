"""A follower of Prometheus-compatible stores, and rows for them."""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.timeseries.engine import Engine
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.follower import Follower
from services.timeseries.followers.prometheus import PrometheusBackend
from tests.timeseries.followers.samples import CLOCK, descriptor, metric_set, rows

SET = metric_set("cpu_usage", "memory_usage", "disk_usage")
WIDE = metric_set(*(f"metric_{number}" for number in range(511)))


def backend(*urls: str, query_urls: Sequence[str] = (), token: str = "") -> PrometheusBackend:
    return PrometheusBackend(write_urls=urls, query_urls=query_urls, bearer_token=token, clock=CLOCK)


@asynccontextmanager
async def following(folder: Path, *urls: str, token: str = "") -> AsyncIterator[tuple[Engine, Follower]]:
    async with (
        Engine.open(folder, clock=CLOCK) as engine,
        Follower(engine, backend(*urls, token=token), CLOCK, random.Random(1)) as follower,
    ):
        yield engine, follower


def tagged(lines: list[tuple[str, int, list[float]]], of_set: Any = SET, environment: str = "production") -> TaggedRows:
    batch = rows(of_set, lines)
    told = tuple(descriptor(server, environment) for server in batch.server_ids)
    return TaggedRows(metric_set=of_set, rows=batch, descriptors=told)
