"""A store that hangs: so many wait for it, more are sent away at once, and nobody else notices."""

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc, history_pb2, history_pb2_grpc
from runtime.errors import ResourceExhausted, carried_error
from tests.harness import eventually
from tests.harness.product import Product

PLACES = 8
OFFERED = 40
SERVER = "web-01"


def question() -> history_pb2.QueryHistoryRequest:
    start, end = Timestamp(seconds=int(time.time()) - 60), Timestamp(seconds=int(time.time()) + 60)
    return history_pb2.QueryHistoryRequest(server_ids=[SERVER], metrics=["cpu_usage"], start_time=start, end_time=end)


async def test_so_many_wait_for_a_store_that_hangs_and_nobody_else_does(tmp_path: Path) -> None:
    async with Product(tmp_path, GATEWAY_MAX_WAITING_CALLS=str(PLACES)) as product:
        await product.start("metadata", "timeseries", "cache", "gateway")
        rows = {
            "metrics": [{"name": "cpu_usage"}],
            "rows": [{"serverId": SERVER, "time": time.time()}],
            "values": [1.0],
        }
        assert (await product.http("/v1/metrics:write", body=rows)).status == 200

        async def is_shown() -> bool:
            return (await product.http(f"/v1/servers/{SERVER}")).status == 200

        await eventually(is_shown, within_s=20)
        store = product.running["timeseries"].pid
        async with product.channel("gateway") as channel:
            history = history_pb2_grpc.HistoryServiceStub(channel.grpc)

            async def ask() -> BaseException | None:
                try:
                    async for _ in history.QueryHistory(question(), timeout=60):
                        pass
                except grpc.aio.AioRpcError as error:
                    return carried_error(error) or error
                return None

            assert await ask() is None
            os.kill(store, signal.SIGSTOP)
            try:
                calls = [asyncio.create_task(ask()) for _ in range(OFFERED)]
                await eventually(lambda: sum(call.done() for call in calls) == OFFERED - PLACES, within_s=20)
                for call in calls:
                    if call.done():
                        error = call.result()
                        assert isinstance(error, ResourceExhausted) and error.reason == "OVERLOADED", error
                        assert error.retry_after_s == 1.0
                refused = await product.http(
                    f"/v1/servers/{SERVER}/history?metric=cpu_usage&start_time=-1m&end_time=now"
                )
                assert refused.status == 429 and refused.headers["retry-after"] == "1"
                for _ in range(3):  # of another service, and from memory
                    assert (await product.http(f"/v1/servers/{SERVER}")).status == 200
                    assert (await product.http("/v1/ai/interactions")).status == 200
                    answer = await fleet_pb2_grpc.FleetServiceStub(channel.grpc).ListServers(
                        fleet_pb2.ListServersRequest()
                    )
                    assert answer.total_size == 1
            finally:
                os.kill(store, signal.SIGCONT)
            ends = await asyncio.gather(*calls)
            assert ends.count(None) == PLACES, "those that waited are answered"
            assert await ask() is None
