"""Short words for what the tests of followers write and start."""

import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from fleet.model import Metric, MetricSet, Rows, ServerDescriptor
from runtime.clock import SystemClock
from services.timeseries.engine import Engine
from services.timeseries.followers.follower import Follower
from services.timeseries.followers.influxdb import InfluxBackend
from services.timeseries.followers.influxdb_api import InfluxTarget
from tests.harness import eventually
from tests.harness.influxdb import ORG, TOKEN

NOON_MS = 1_700_000_000_000
CLOCK = SystemClock()


def metric_set(*names: str) -> MetricSet:
    return MetricSet(metrics=tuple(Metric(name=name) for name in names))


def rows(of_set: MetricSet, lines: Iterable[tuple[str, int, Sequence[float]]]) -> Rows:
    listed = list(lines)
    return Rows(
        metric_set_id=of_set.id,
        server_ids=tuple(server for server, _, _ in listed),
        times_ms=np.array([time for _, time, _ in listed], np.int64),
        values=np.array([values for _, _, values in listed], np.float64).reshape(len(listed), len(of_set)),
    )


def tick(of_set: MetricSet, number: int, servers: Sequence[str] = ("a",)) -> Rows:
    """A row of every server at the number's time."""
    return rows(of_set, [(server, NOON_MS + number, [float(number)] * len(of_set)) for server in servers])


def descriptor(server: str, environment: str = "production", role: str = "web") -> ServerDescriptor:
    return ServerDescriptor(server_id=server, hostname=f"{server}.example", environment=environment, role=role)


def backend(url: str, bucket: str, token: str = TOKEN, retention_s: float | None = None) -> InfluxBackend:
    return InfluxBackend(InfluxTarget(url=url, token=token, org=ORG, bucket=bucket), retention_s)


@asynccontextmanager
async def following(
    folder: Path, url: str, bucket: str, token: str = TOKEN, retention_s: float | None = None
) -> AsyncIterator[tuple[Engine, Follower]]:
    """An engine of a folder and its follower."""
    async with (
        Engine.open(folder, clock=CLOCK) as engine,
        Follower(engine, backend(url, bucket, token, retention_s), CLOCK, random.Random(1)) as follower,
    ):
        yield engine, follower


async def caught_up(engine: Engine, within_s: float = 60.0) -> None:
    """Waits until the durable cursor is at the journal's end."""

    async def at_end() -> bool:
        followers = (await engine.status()).followers
        return bool(followers) and followers[0].cursor == engine.last_sequence

    await eventually(at_end, within_s=within_s)
