"""The product with a real Redis, watching this machine, and playing a recording."""

import gzip
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import redis

from tests.harness.launched import Launched, within
from tests.harness.redis import redis_server
from tests.harness.shared_product import METRICS, SERVERS


async def test_redis_agrees_with_the_api(tmp_path: Path) -> None:
    async with redis_server() as server:
        with Launched(tmp_path, REDIS_URL=server.url, SIMULATOR_INTERVAL="1s") as launched:
            client = redis.Redis(port=server.port, decode_responses=True)
            within(30, lambda: client.get("servers:count") == str(SERVERS))
            summary = launched.get("/v1/fleet/summary").json
            assert client.get("servers:healthy") == str(summary["healthy"])
            lifetimes = {"servers:all": 60, "servers:count": 300, "servers:healthy": 60, "server:web-01": 300}
            for key, lifetime_s in lifetimes.items():
                left_s = client.ttl(key)
                assert isinstance(left_s, int)
                assert lifetime_s - 30 < left_s <= lifetime_s, key

            def same() -> bool:
                api = launched.get("/v1/servers/web-01").json
                ours = json.loads(str(client.get("server:web-01")))
                assert (ours["id"], ours["hostname"], ours["status"]) == (api["id"], api["hostname"], "healthy")
                return len(api["metrics"]) == METRICS and all(ours[k] == v for k, v in api["metrics"].items())

            within(20, same)
            listed = json.loads(str(client.get("servers:all")))
            assert {one["id"] for one in listed} == {one["id"] for one in launched.get("/v1/servers").json["servers"]}
            stores = {store["name"]: store for store in launched.get("/v1/storage/status").json["stores"]}
            assert (stores["redis"]["role"], stores["redis"]["state"]) == ("follower", "STORE_STATE_UP")

            server.kill()
            within(30, lambda: state_of(launched, "redis") == "STORE_STATE_DOWN")
            assert launched.get("/v1/fleet/summary").json["total"] == SERVERS
            client.close()


def state_of(launched: Launched, name: str) -> str:
    stores = launched.get("/v1/storage/status").json["stores"]
    return next(str(store["state"]) for store in stores if store["name"] == name)


def spin(seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass


def test_host_mode_shows_this_machine(tmp_path: Path) -> None:
    with Launched(tmp_path, SIMULATOR_MODE="host", SIMULATOR_INTERVAL="1s") as launched:
        servers = within(30, lambda: launched.get("/v1/servers").json["servers"])
        assert [server["hostname"] for server in servers] == [socket.gethostname()]
        path = f"/v1/servers/{servers[0]['id']}"
        assert {"cpu_usage", "memory_usage", "disk_usage"} <= set(servers[0]["metrics"])

        def cpu() -> float:
            value: float = launched.get(path).json["metrics"]["cpu_usage"]
            return value

        with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:  # they end with it
            pool.map_async(spin, [100.0] * (os.cpu_count() or 1))
            within(60, lambda: cpu() > 90)


def test_a_recording_is_played_into_the_history(tmp_path: Path) -> None:
    recording = tmp_path / "recording.csv.gz"
    lines = ["time,server_id,cpu_usage,disk_read_bytes_per_second"]
    lines += [f"{1_700_000_000 + 300 * tick},vm-{vm},{tick + vm / 10},{tick}" for vm in range(3) for tick in range(200)]
    with gzip.open(recording, "wt") as file:
        file.write("\n".join(lines) + "\n")
    settings = {
        "SIMULATOR_REPLAY_FILE": str(recording),
        "SIMULATOR_REPLAY_SPEED": "max",
        "SIMULATOR_REPLAY_TIMES": "keep",
    }
    with Launched(tmp_path, SIMULATOR_MODE="replay", **settings) as launched:
        within(30, lambda: int(launched.get("/v1/simulator").json["replayedRows"]) == 600)
        query = "metric=cpu_usage&start_time=2023-11-14T00:00:00Z&end_time=2023-11-16T00:00:00Z"
        series = launched.get(f"/v1/servers/vm-1/history?{query}").json["series"][0]
        assert series["values"] == [tick + 0.1 for tick in range(200)]
        assert series["times"] == [1_700_000_000.0 + 300 * tick for tick in range(200)]
        assert series["unit"] == "%"
