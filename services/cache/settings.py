"""What the cache can be told."""

from typing import Annotated, Final
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, SecretStr

from runtime.settings import Address, CommonSettings, setting

_SCHEMES: Final = ("redis", "rediss")
_TLS_OPTIONS: Final = frozenset({"ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile"})
"""What a rediss:// URL may say behind a question mark."""


def _redis_url(url: SecretStr) -> SecretStr:
    """Refuses what is no Redis URL; no message holds any part of it but its scheme, since it may hold a password."""
    try:
        parts = urlsplit(url.get_secret_value())
        port = parts.port
    except ValueError:
        raise ValueError("is not a URL such as redis://host:6379 or rediss://user:password@host:6379/0") from None
    if parts.scheme not in _SCHEMES:
        raise ValueError("must begin with redis:// or rediss://")
    if not parts.hostname or port == 0:
        raise ValueError(f"names no host or port, such as {parts.scheme}://host:6379")
    database = parts.path.removeprefix("/")
    if database and not (database.isascii() and database.isdecimal()):
        raise ValueError("must end with the number of a database or nothing behind host:port")
    options = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    if options and (parts.scheme != "rediss" or not options <= _TLS_OPTIONS):
        raise ValueError(f"may have no options but, with rediss://, {', '.join(sorted(_TLS_OPTIONS))}")
    return url


RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]


class CacheSettings(CommonSettings):
    """Settings of `python -m services.cache`."""

    cache_address: Address = setting("CACHE_ADDRESS", "127.0.0.1:50051", "Where the cache listens for gRPC.")
    redis_url: RedisUrl | None = setting(
        "REDIS_URL", None, "Redis that follows the current state, redis:// or rediss://; unset: none."
    )
