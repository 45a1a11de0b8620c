"""Starts the cache service: `python -m services.cache`."""

import random
import secrets

from fleet.status import StoreStatusServicer
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import status_pb2
from runtime.process import Process, run_process, takes_no_arguments
from runtime.server import bind
from services.cache.core import Cache
from services.cache.servicer import CacheServicer
from services.cache.settings import CacheSettings
from services.cache.store import StateStore
from services.cache.store_memory import MemoryStateStore
from services.cache.store_redis import RedisStateStore


async def serve(settings: CacheSettings, process: Process[CacheSettings]) -> None:
    """Runs until the process is told to stop."""
    store: StateStore = MemoryStateStore(process.clock)
    if settings.redis_url is not None:
        store = RedisStateStore(settings.redis_url.get_secret_value())
    cache = Cache(store, process.clock, epoch=secrets.token_hex(8), rng=random.Random())  # noqa: S311  jitter
    async with cache, cache.monitor("redis" if settings.redis_url else None) as monitor:
        await process.serve_grpc(
            settings.cache_address,
            [
                bind(cache_pb2.DESCRIPTOR.services_by_name["CacheService"], CacheServicer(cache)),
                bind(status_pb2.DESCRIPTOR.services_by_name["StoreStatusService"], StoreStatusServicer(monitor)),
            ],
            address_setting="CACHE_ADDRESS",
        )


def main() -> None:
    """Runs the process."""
    run_process("cache", CacheSettings, serve)


if __name__ == "__main__":
    takes_no_arguments("services.cache", "The state of the fleet as it is now: serves it.")
    main()
