"""What a Prometheus-compatible store takes from the follower: `python -m bench.shipping URL[,URL...] [--ticks N]`.

Ticks of 20 servers x 511 metrics go to an address of remote write as the follower ships them: one a request, as they
come, and four a request, as after an outage (`MAX_SHIP_POINTS`). The store should be an empty one: what is written
stays there. Printed is a row for each: points a second, the time of one tick, and our own processor time a point.
"""

import argparse
import asyncio
import sys
import time
from typing import Final

import numpy as np

from fleet.model import Metric, MetricSet, Rows, ServerDescriptor
from runtime.clock import SystemClock
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.prometheus import PrometheusBackend
from services.timeseries.settings import split_urls

SERVERS: Final = 20
METRICS: Final = 511
INTERVAL_MS: Final = 10_000
TOGETHER: Final = (1, 4)
_SET: Final = MetricSet(metrics=tuple(Metric(name=f"metric_{number}_usage") for number in range(METRICS)))


def _tick(servers: tuple[str, ...], time_ms: int, rng: np.random.Generator) -> TaggedRows:
    rows = Rows(
        metric_set_id=_SET.id,
        server_ids=servers,
        times_ms=np.full(SERVERS, time_ms, np.int64),
        values=np.round(rng.normal(50, 20, (SERVERS, METRICS)), 2),
    )
    told = tuple(ServerDescriptor(server_id=one, hostname=one, environment="bench", role="web") for one in servers)
    return TaggedRows(metric_set=_SET, rows=rows, descriptors=told)


async def measure(urls: list[str], ticks: int, together: int) -> str:
    """Ships so many ticks, some of them together; returns a row for people."""
    rng = np.random.default_rng(1)
    backend = PrometheusBackend(write_urls=urls, clock=SystemClock())
    servers = tuple(f"bench-{together}-{number:02}" for number in range(SERVERS))
    begins_ms = int(time.time() * 1_000) - (ticks + together) * INTERVAL_MS
    all_of = [_tick(servers, begins_ms + number * INTERVAL_MS, rng) for number in range(ticks + together)]
    await backend.ship(all_of[:together])  # the series are new with the first ones
    started_s, used_s = time.perf_counter(), time.process_time()
    shipped = 0
    for at in range(together, len(all_of), together):
        receipt = await backend.ship(all_of[at : at + together])
        shipped += receipt.shipped
        if receipt.refused:
            raise SystemExit(f"the store refuses {dict(receipt.refused)}")
    took_s, used_s = time.perf_counter() - started_s, time.process_time() - used_s
    version = (await backend.probe()).version
    await backend.close()
    return (
        f"{together} a request: {shipped / took_s:,.0f} points/s, {1_000 * took_s / ticks:.1f} ms a tick of "
        f"{SERVERS * METRICS:,} points, {1e6 * used_s / shipped:.2f} us of our processor a point, {version}"
    )


def main(arguments: list[str]) -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.shipping", description=__doc__)
    parser.add_argument("urls", help="address of remote write; several with commas between them")
    parser.add_argument("--ticks", type=int, default=200)
    given = parser.parse_args(arguments)
    for together in TOGETHER:
        print(asyncio.run(measure(split_urls(given.urls), given.ticks, together)))


if __name__ == "__main__":
    main(sys.argv[1:])
