"""Starts the timeseries service: `python -m services.timeseries`; with an argument, a command of `commands.py`."""

import random
import sys
from contextlib import AsyncExitStack
from functools import partial

from fleet.status import Probe, StoreMonitor, StoreStatusServicer
from openmanager.fleet.v1 import status_pb2
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.process import Process, run_process
from runtime.server import bind
from services.timeseries import commands
from services.timeseries.engine.engine import Engine
from services.timeseries.external import backends, histories
from services.timeseries.followers.follower import Follower, forget_others
from services.timeseries.remote.reader import Reader
from services.timeseries.remote.replica import Peer
from services.timeseries.servicer import TimeSeriesServicer, probe
from services.timeseries.settings import TimeSeriesSettings


async def _reader(
    settings: TimeSeriesSettings,
    process: Process[TimeSeriesSettings],
    engine: Engine,
    stack: AsyncExitStack,
) -> Reader | None:
    """What reads elsewhere, too; None: everything is here."""
    if settings.read == "local":
        return None
    bounds = settings.engine()
    peers = [
        Peer(await stack.enter_async_context(process.open_channel(target)), process.clock, bounds.max_points)
        for target in settings.peers
    ]
    remote = histories(settings, process.clock, bounds, engine)[0]
    stack.push_async_callback(remote.close)
    return Reader(engine, remote, peers=peers, max_points=bounds.max_points)


async def serve(settings: TimeSeriesSettings, process: Process[TimeSeriesSettings]) -> None:
    """Runs until the process is told to stop."""
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(
            Engine.open(process.folder, clock=process.clock, settings=settings.engine())
        )
        probes: dict[str, tuple[str, Probe]] = {"engine": ("primary", partial(probe, engine))}
        followed = backends(settings, process.clock)
        await forget_others(engine, {backend.name for backend in followed})
        followers: dict[str, Follower] = {}
        for backend in followed:
            follower = Follower(engine, backend, process.clock, random.Random())  # noqa: S311  jitter
            followers[backend.name] = await stack.enter_async_context(follower)
            probes[backend.name] = ("follower", follower.probe)
        monitor = await stack.enter_async_context(StoreMonitor("timeseries", probes, process.clock))
        for name, follower in followers.items():
            follower.tell_errors(partial(monitor.record_error, name))
        await process.serve_grpc(
            settings.address,
            [
                bind(
                    timeseries_pb2.DESCRIPTOR.services_by_name["TimeSeriesService"],
                    TimeSeriesServicer(
                        engine,
                        process.clock,
                        reader=await _reader(settings, process, engine, stack),
                        followers=tuple(followers.values()) if settings.ack == "follower" else (),
                    ),
                ),
                bind(status_pb2.DESCRIPTOR.services_by_name["StoreStatusService"], StoreStatusServicer(monitor)),
            ],
            address_setting="TIMESERIES_ADDRESS",
            ready=lambda: not engine.needs_restart,
        )


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(commands.main(sys.argv[1:]))
    run_process("timeseries", TimeSeriesSettings, serve)
