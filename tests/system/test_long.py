"""The long versions: a real recording of three months through the whole product, and many deaths in a row."""

import csv
import gzip
import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.harness.data import recording
from tests.harness.launched import Launched, within
from tests.harness.product import Product
from tests.system.test_durability import Sender, check, stored

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

ROUNDS = 15
VICTIMS = ("timeseries", "cache", "metadata", "gateway")


async def test_many_deaths_lose_and_double_nothing(tmp_path: Path) -> None:
    rng = random.Random(11)
    async with Product(tmp_path) as product:
        await product.start(*VICTIMS)
        async with Sender(product) as sender:
            for _ in range(ROUNDS):
                await sender.reaches(len(sender.acknowledged) + rng.randrange(1, 300))
                victims = rng.sample(VICTIMS, rng.randrange(1, len(VICTIMS) + 1))
                await product.kill(*victims, how=signal.SIGKILL)
                await product.start(*victims)
            await sender.reaches(len(sender.acknowledged) + 50)
        check(await stored(product), set(sender.acknowledged), sender.tick)


def test_twenty_machines_and_three_months_are_all_there(tmp_path: Path) -> None:
    path = recording("bitbrains-20.csv.gz")
    expected: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    with gzip.open(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            place = (row["server_id"], row["time"])
            if row["cpu_usage"] and place not in seen:
                expected[row["server_id"]] += 1
            seen.add(place)
    settings = {"SIMULATOR_REPLAY_FILE": str(path), "SIMULATOR_REPLAY_SPEED": "max", "SIMULATOR_REPLAY_TIMES": "keep"}
    settings["TIMESERIES_RETENTION_1H"] = "20000d"  # older than points and 5 min roll-ups are kept: for the others
    with Launched(tmp_path, SIMULATOR_MODE="replay", **settings) as launched:

        def played() -> bool:
            status = launched.get("/v1/simulator").json
            done: bool = int(status["replayedRows"]) == int(status["replayTotalRows"]) > 0
            return done and status["waitingTicks"] == 0

        within(600, played)
        for server_id, count in sorted(expected.items()):
            query = "metric=cpu_usage&start_time=2013-06-01T00:00:00Z&end_time=2013-12-01T00:00:00Z"
            answer = launched.get(f"/v1/servers/{server_id}/history?{query}&step=1d&aggregation=COUNT")
            assert sum(answer.json["series"][0]["values"]) == count, server_id
