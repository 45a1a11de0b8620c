"""What a REDIS_URL says.

    redis://[user:password@]host[:port][/database]                             one server
    redis+sentinel://[user:password@]host[:port],host[:port],.../service[/database]     the primary that Sentinel names
    redis+cluster://[user:password@]host[:port],host[:port],...                a cluster, found from any of these nodes

`rediss` instead of `redis` is TLS. User and password are those of the servers with data; Sentinels that want their own
have them behind the question mark (`sentinel_username`, `sentinel_password`).

What must stay true: no message holds any part of the URL but its scheme, since every other part may be a password.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

TLS_OPTIONS: Final = frozenset({"ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile"})
"""What a rediss URL may say behind a question mark."""
SENTINEL_OPTIONS: Final = frozenset({"sentinel_username", "sentinel_password"})
REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379


class Topology(Enum):
    """How the servers behind a URL belong together."""

    SINGLE = ""
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisUrl:
    """A REDIS_URL, taken apart.

    Attributes:
        hosts: of the server, of the Sentinels, or of some nodes of the cluster; at least one.
        service: the name under which the Sentinels watch the primary; otherwise empty.
        options: what stands behind the question mark.
    """

    topology: Topology
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    service: str = ""
    database: int = 0
    options: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def address(self) -> str:
        """Where it is, without user or password."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        path = "".join(f"/{part}" for part in (self.service, self.database or "") if part)
        return f"{self.topology.value}{' ' if self.topology.value else ''}{hosts}{path}"


_SCHEMES: Final = {
    f"redis{'s' * tls}{'+' * bool(topology.value)}{topology.value}": (topology, bool(tls))
    for topology in Topology
    for tls in (0, 1)
}


def parse_redis_url(url: str) -> RedisUrl:
    """Takes a URL apart; ValueError says what is wrong without showing it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("is not a URL such as redis://host:6379 or rediss://user:password@host:6379/0") from None
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"must begin with {', '.join(f'{scheme}://' for scheme in sorted(_SCHEMES))}")
    topology, tls = _SCHEMES[parts.scheme]
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    service, database = _path(parts.path.strip("/"), topology)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    allowed = (TLS_OPTIONS if tls else frozenset()) | (
        SENTINEL_OPTIONS if topology is Topology.SENTINEL else frozenset()
    )
    if not options.keys() <= allowed:
        raise ValueError(
            f"may have no options but, with rediss://, {', '.join(sorted(TLS_OPTIONS))} "
            f"and, with Sentinel, {', '.join(sorted(SENTINEL_OPTIONS))}"
        )
    return RedisUrl(
        topology=topology,
        tls=tls,
        hosts=_hosts(hosts, topology, parts.scheme),
        username=unquote(user) or None,
        password=unquote(password) or None,
        service=service,
        database=database,
        options=options,
    )


def _path(path: str, topology: Topology) -> tuple[str, int]:
    """The service and the number of the database."""
    if topology is Topology.CLUSTER:
        if path:
            raise ValueError("must end behind the hosts: a cluster has one database")
        return "", 0
    service, database = "", path
    if topology is Topology.SENTINEL:
        service, _, database = path.partition("/")
        if not service:
            raise ValueError("must end with the name of the service, such as redis+sentinel://host:26379/mymaster")
    if database and not (database.isascii() and database.isdecimal()):
        raise ValueError("must end with the number of a database or nothing behind host:port")
    return unquote(service), int(database or 0)


def _hosts(netloc: str, topology: Topology, scheme: str) -> tuple[tuple[str, int], ...]:
    default = SENTINEL_PORT if topology is Topology.SENTINEL else REDIS_PORT
    texts = netloc.split(",")
    if len(texts) > 1 and topology is Topology.SINGLE:
        raise ValueError("names several hosts: say redis+sentinel:// or redis+cluster:// for them")
    found = []
    for text in texts:
        try:
            one = urlsplit(f"//{text}")
            host, port = one.hostname, one.port
        except ValueError:
            host, port = None, None
        if not host or port == 0:
            raise ValueError(f"names no host or port, such as {scheme}://host:{default}")
        found.append((host, port or default))
    return tuple(found)
