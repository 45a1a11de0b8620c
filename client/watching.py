"""The fleet as it changes, over as many connections as it takes.

What must stay true: after a connection was lost the first message is a snapshot again, so a reader that clears what it
holds at every snapshot is right; what cannot get better by waiting (a wrong token, a wrong address) is raised.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable

import grpc
import grpc.aio

from client.backoff import Backoff
from client.errors import OpenManagerError, from_rpc_error
from openmanager.gateway.v1 import fleet_pb2

Call = grpc.aio.UnaryStreamCall[fleet_pb2.WatchFleetRequest, fleet_pb2.WatchFleetResponse]
OnLost = Callable[[OpenManagerError, float], object]
"""Told what happened, and in how many seconds it is tried again."""


async def watch(
    call: Callable[[], Call], address: str, backoff: Backoff, on_lost: OnLost | None
) -> AsyncGenerator[fleet_pb2.WatchFleetResponse, None]:
    """Runs `call` again and again; ends with an error only."""
    connected, failures = False, 0
    while True:
        stream = call()
        try:
            async for message in stream:
                connected, failures = True, 0
                yield message
            error = OpenManagerError(grpc.StatusCode.UNAVAILABLE, f"{address} ended the stream")
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed, address)
            if not connected or not error.is_transient:
                raise error from failed
        finally:
            stream.cancel()
        delay_s = backoff.delay_s(failures, error)
        failures += 1
        if on_lost is not None:
            on_lost(error, delay_s)
        await asyncio.sleep(delay_s)
