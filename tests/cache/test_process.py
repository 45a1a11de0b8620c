"""`python -m services.cache` as a real process: killed, restarted, and stopped."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from openmanager.cache.v1 import cache_pb2, cache_pb2_grpc
from openmanager.fleet.v1 import status_pb2, status_pb2_grpc
from runtime.channel import Channel
from tests.cache.samples import descriptor, ids, request, tick
from tests.harness import eventually, free_port
from tests.harness.redis import RedisServer

ROOT = Path(__file__).parents[2]
SECRET = "a-secret-of-the-test-suite"


@asynccontextmanager
async def process(folder: Path, port: int, **environment: str) -> AsyncIterator["subprocess.Popen[bytes]"]:
    given = {"DATA_DIR": str(folder), "CACHE_ADDRESS": f"127.0.0.1:{port}", "SERVICE_SECRET": SECRET, **environment}
    started = await asyncio.to_thread(
        subprocess.Popen,
        [sys.executable, "-m", "services.cache"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **given},
        stderr=subprocess.PIPE,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        assert started.stderr is not None
        started.stderr.close()


async def answered(call: Callable[[], Any]) -> Any:
    """What a call answers once the process is up."""

    async def attempt() -> Any:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            raise AssertionError(error.details()) from error

    return await eventually(attempt, within_s=60)


async def test_a_killed_process_comes_back_with_what_redis_has(redis: RedisServer, tmp_path: Path) -> None:
    port = free_port()
    async with Channel(f"127.0.0.1:{port}", secret=SECRET) as channel, redis.client() as raw:
        stub: Any = cache_pb2_grpc.CacheServiceStub(channel.grpc)
        servers = [descriptor(server_id) for server_id in ids(20)]
        message = request(tick(20, time.time_ns() // 1_000_000, cpu=90), servers=servers)
        everything = cache_pb2.ListServerStatesRequest()
        async with process(tmp_path, port, REDIS_URL=redis.url) as first:
            await answered(lambda: stub.UpdateServers(message))
            before = await stub.ListServerStates(everything)
            await eventually(lambda: raw.exists("server:server-00019"))
            first.send_signal(signal.SIGKILL)
            first.wait()
        async with process(tmp_path, port, REDIS_URL=redis.url) as second:
            after = await answered(lambda: stub.ListServerStates(everything))
            assert [state.descriptor for state in after.states] == [state.descriptor for state in before.states]
            assert {state.status for state in after.states} == {status_pb2.SERVER_STATUS_WARNING}
            assert [state.observed_time for state in after.states] == [state.observed_time for state in before.states]
            assert all(len(state.samples[0].values) == 511 for state in after.states)
            assert after.version.epoch != before.version.epoch
            stores: Any = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)
            found = await stores.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
            assert [store.name for store in found.stores] == ["redis"]
            second.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(second.wait, 30) == 0


async def test_a_bad_redis_url_does_not_start_and_is_named(tmp_path: Path) -> None:
    async with process(tmp_path, free_port(), REDIS_URL="http://user:hunter2@host") as started:
        _, said = await asyncio.to_thread(started.communicate, None, 20)
        assert started.returncode == 2
        assert b"REDIS_URL" in said
        assert b"hunter2" not in said
        assert b"Traceback" not in said


async def test_a_wrong_password_shows_as_down_and_is_not_shown(redis: RedisServer, tmp_path: Path) -> None:
    async with redis.client() as raw:
        await raw.config_set("requirepass", "hunter2-very-secret")
    port = free_port()
    url = redis.url.replace("redis://", "redis://:wrong-hunter2@")
    async with process(tmp_path, port, REDIS_URL=url), Channel(f"127.0.0.1:{port}", secret=SECRET) as channel:
        stores: Any = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)

        async def down() -> Any:
            answer = await answered(lambda: stores.ListStoreStatuses(status_pb2.ListStoreStatusesRequest()))
            return answer.stores[0] if answer.stores[0].state == status_pb2.STORE_STATE_DOWN else None

        found = await eventually(down, within_s=60)  # the process starts first
        assert "password" in found.last_error
        assert "hunter2" not in str(found)
