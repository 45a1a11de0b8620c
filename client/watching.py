"""The fleet as it changes, over as many connections as it takes.

What must stay true: after a lost connection it goes on behind the last change that came as a whole, or, where the
gateway cannot, begins with a snapshot again, so a reader that clears what it holds at every snapshot is right; what
cannot get better by waiting (a wrong token, a wrong address) is raised.
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
    call: Callable[[str], Call], address: str, backoff: Backoff, on_lost: OnLost | None
) -> AsyncGenerator[fleet_pb2.WatchFleetResponse, None]:
    """Runs `call`, given the version to go on behind, again and again; ends with an error only."""
    connected, failures, version = False, 0, ""
    while True:
        stream = call(version)
        try:
            async for message in stream:
                connected, failures = True, 0
                yield message
                if message.snapshot:
                    version = ""  # what was before is void: half a snapshot is nothing to go on behind
                if not message.continues:
                    version = message.version
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
