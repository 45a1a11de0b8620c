"""From rows to a finding, in real time with real processes: found, kept, watched, scored, judged, and found once over
deaths. What the detector needs days to learn, it was shown before.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.analytics.checkpoint import CheckpointFile
from services.analytics.core import Snapshot
from services.analytics.fleet_detector import FleetDetector
from tests.analytics.fakes import BROKEN_METRICS, LEARN_TICKS, METRIC_SET, METRICS, SERVERS, rows_of, show, usual
from tests.harness import eventually
from tests.harness.product import Product

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

MINUTE_MS = 60_000
EVERY_S = 2.0
FOUND_WITHIN_S = 240.0


def knowing_what_is_usual(end_ms: int) -> Snapshot:
    """The state of an analytics that has seen two days up to a time, a row a minute."""
    detector = FleetDetector()
    for tick in range(LEARN_TICKS, 0, -1):
        time_ms = end_ms - tick * MINUTE_MS
        assert show(detector, rows_of(SERVERS, [time_ms] * 3, usual(0, time_ms=time_ms))) == []
    assert detector.learned == 1.0
    return Snapshot(next_sequence=1, verdicts_until=0, detector=detector.state(), waiting=())


class Senders:
    """Three servers that send at an interval, one of which can fall ill."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self.is_ill = False

    async def send(self) -> None:
        while True:
            now_ms = int(time.time() * 1_000)
            values = usual(0, time_ms=now_ms)
            if self.is_ill:
                values[0, [METRICS.index(name) for name in BROKEN_METRICS]] = 97.0
            batch = {
                "metrics": [{"name": one.name, "kind": one.kind.name.lower()} for one in METRIC_SET.metrics],
                "rows": [{"serverId": server_id, "time": now_ms / 1_000} for server_id in SERVERS],
                "values": np.asarray(values).ravel().tolist(),
            }
            while (answer := await self._product.http("/v1/metrics:write", body=batch, method="POST")).status == 503:
                await asyncio.sleep(EVERY_S)  # timeseries is dead
            assert answer.json["acceptedPoints"] == 3 * len(METRICS), answer.json
            await asyncio.sleep(EVERY_S)


@asynccontextmanager
async def watched(folder: Path) -> AsyncIterator[tuple[Product, Senders]]:
    folder_of_state = folder / "data" / "analytics"
    folder_of_state.mkdir(parents=True)
    async with Product(folder, ANALYTICS_CHECKPOINT_INTERVAL="1s") as product:
        await product.start("metadata", "timeseries", "cache")
        CheckpointFile(folder_of_state).save(knowing_what_is_usual(int(time.time() // 60) * MINUTE_MS))
        await product.start("analytics", "gateway")
        senders = Senders(product)
        task = asyncio.create_task(senders.send())
        try:
            yield product, senders
            assert not task.done(), task.exception()
        finally:
            task.cancel()


async def findings(product: Product, query: str = "") -> list[Any]:
    answer = await product.http(f"/v1/anomalies?detector=departure{query}")
    return list(answer.json["anomalies"]) if answer.status == 200 else []


async def test_a_server_that_falls_ill_is_found_once_and_what_people_say_of_it_counts(tmp_path: Path) -> None:
    async with watched(tmp_path) as (product, senders):
        assert (await product.http("/v1/anomalies")).json["learned"] == 1.0
        senders.is_ill = True
        (one,) = await eventually(lambda: findings(product), within_s=FOUND_WITHIN_S)
        assert (one["serverId"], "endTime" in one) == ("server-0", False)
        assert {part["metric"] for part in one["contributions"][:4]} == set(BROKEN_METRICS)

        for name in ("analytics", "metadata", "timeseries"):  # each dies while it goes on
            await product.kill(name)
            await product.start(name)
        senders.is_ill = False

        async def score() -> list[float]:
            path = "/v1/servers/server-0/history?metric=anomaly_score&start_time=-10m&end_time=now"
            answer = await product.http(path)
            series = answer.json.get("series", []) if answer.status == 200 else []
            return list(series[0]["values"]) if series and max(series[0]["values"]) > 0.5 else []

        assert 0.5 < max(await eventually(score, within_s=FOUND_WITHIN_S)) < 1.0

        async def judged() -> Any:  # refused until the gateway is connected to the metadata that was started again
            answer = await product.http(f"/v1/anomalies/{one['id']}:feedback", body={"verdict": "false"}, method="POST")
            return answer.status != 503 and answer.json

        assert (await eventually(judged, within_s=60.0))["verdict"] == "ANOMALY_VERDICT_FALSE"

        async def is_less_sensitive() -> bool:
            answer = await product.http("/v1/analytics/report")
            return answer.status == 200 and answer.json["detection"]["lessSensitiveServers"] == 1

        await eventually(is_less_sensitive, within_s=60.0)
        report = (await product.http("/v1/analytics/report")).json
        (counted,) = [each for each in report["detection"]["detectors"] if each["detector"] == "departure"]
        assert (counted["found"], counted["saidFalse"], counted["precision"]) == ("1", "1", 0.0)
        assert [each["id"] for each in await findings(product)] == [one["id"]], "once, whoever died"
        live = (await product.http("/v1/servers/server-0")).json
        assert "anomaly_score" not in live["metrics"], json.dumps(live)
