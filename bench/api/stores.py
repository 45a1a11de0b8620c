"""The unmodified stores that a dashboard would otherwise ask for current values: the same points, an instant query.

Both are given the points by the follower's own remote write, so that they hold the same series. The last tick is at a
fixed time, which is what is asked for: VictoriaMetrics answers nothing newer than 30 s, both look 5 min back.
"""

import asyncio
import os
import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from bench import peers
from bench.api.checks import http_answer, series_values
from bench.load import INTERVAL_MS, Mix
from bench.peers import BenchError, Server, free_port, running, wait
from fleet.model import Rows
from runtime.clock import SystemClock
from services.timeseries.followers.backend import TaggedRows
from services.timeseries.followers.prometheus import PrometheusBackend

PROMETHEUS: Final = "prometheus"
TICKS: Final = 12
TOGETHER: Final = 4
AGE_MS: Final = 60_000
"""How old the last tick is when the stores are started."""
VISIBLE_BOUND_S: Final = 30.0
WRITE_PATH: Final = "/api/v1/write"


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A store that holds the points."""

    server: Server
    at_s: float
    """The time of the last tick."""

    def path(self, server_id: str) -> str:
        """The instant query for all metrics of one server."""
        query = urllib.parse.urlencode({"query": f'{{server_id="{server_id}"}}', "time": f"{self.at_s:.3f}"})
        return f"/api/v1/query?{query}"


@contextmanager
def prometheus(folder: Path) -> Iterator[Server]:
    """Prometheus, which scrapes nobody and takes remote write."""
    address = f"127.0.0.1:{free_port()}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text("global: {scrape_interval: 1h}\n")
    program = shutil.which(PROMETHEUS)
    if program is None:
        raise BenchError("prometheus is not on the PATH")
    flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    flags += [f"--web.listen-address={address}", "--web.enable-remote-write-receiver", "--log.level=error"]
    with running(PROMETHEUS, address, folder, [program, *flags], dict(os.environ)) as server:
        wait(server, lambda: b"Ready" in http_answer(address, "/-/ready", {}))
        yield server


def missing() -> list[str]:
    """Programs of stores that are not on the PATH."""
    return [program for program in (PROMETHEUS, peers.PROGRAMS[peers.VICTORIA]) if shutil.which(program) is None]


@contextmanager
def holding(folder: Path, mix: Mix, now_ms: int) -> Iterator[tuple[list[Store], int]]:
    """The stores that are there, holding the last minutes of the fleet; and the tick that they were told last."""
    at_ms = (now_ms - AGE_MS) // INTERVAL_MS * INTERVAL_MS
    with ExitStack() as stack:
        servers = []
        lacking = missing()
        if PROMETHEUS not in lacking:
            servers.append(stack.enter_context(prometheus(folder / PROMETHEUS)))
        if peers.PROGRAMS[peers.VICTORIA] not in lacking:
            servers.append(stack.enter_context(peers.victoria(folder / peers.VICTORIA)))
        found = [Store(server=server, at_s=at_ms / 1_000) for server in servers]
        for store in found:
            asyncio.run(_ship(store.server.address, mix, at_ms))
            _wait_until_visible(store, mix)
        yield found, TICKS - 1


async def _ship(address: str, mix: Mix, at_ms: int) -> None:
    backend = PrometheusBackend(write_urls=[f"http://{address}{WRITE_PATH}"], clock=SystemClock())
    try:
        ticks = [_tick(mix, tick, at_ms - (TICKS - 1 - tick) * INTERVAL_MS) for tick in range(TICKS)]
        for at in range(0, TICKS, TOGETHER):
            receipt = await backend.ship(ticks[at : at + TOGETHER])
            if receipt.refused:
                raise BenchError(f"{address} refuses {dict(receipt.refused)}")
    finally:
        await backend.close()


def _tick(mix: Mix, tick: int, time_ms: int) -> TaggedRows:
    times = np.full(len(mix.servers), time_ms, np.int64)
    ids, values = mix.server_ids, mix.values(tick)
    rows = Rows(metric_set_id=mix.metric_set.id, server_ids=ids, times_ms=times, values=values)
    return TaggedRows(metric_set=mix.metric_set, rows=rows, descriptors=mix.servers)


def _wait_until_visible(store: Store, mix: Mix) -> None:
    """What VictoriaMetrics acknowledged shows in answers a second or more later."""
    for server_id in mix.server_ids:
        path = store.path(server_id)
        wait(store.server, lambda path=path: bool(values_in(store, path)), VISIBLE_BOUND_S)  # type: ignore[misc]


def values_in(store: Store, path: str) -> list[float]:
    """What the store answers, in order of size; BenchError when it is not every metric."""
    return series_values(http_answer(store.server.address, path, {}))
