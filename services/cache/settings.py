"""What the cache can be told."""

from typing import Annotated

from pydantic import AfterValidator, SecretStr

from runtime.settings import Address, CommonSettings, setting
from services.cache.redis_url import parse_redis_url


def _redis_url(url: SecretStr) -> SecretStr:
    """Refuses what is no Redis URL."""
    parse_redis_url(url.get_secret_value())
    return url


RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]


class CacheSettings(CommonSettings):
    """Settings of `python -m services.cache`."""

    cache_address: Address = setting("CACHE_ADDRESS", "127.0.0.1:50051", "Where the cache listens for gRPC.")
    redis_url: RedisUrl | None = setting(
        "REDIS_URL",
        None,
        "Redis that follows the current state: redis://host:port, redis+sentinel://host:port,host:port/service or "
        "redis+cluster://host:port,host:port; rediss for TLS; unset: none.",
    )
