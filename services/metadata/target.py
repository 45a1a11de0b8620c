"""Where the database is: the embedded one's socket, or what ``DATABASE_URL`` says; known without any driver.

What must stay true: the URL, which holds the password, is in no ``repr`` and in no error; ``address`` shows hosts and
database only.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

DEFAULT_PORT = 5432
MAX_HOSTS = 8
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SESSION_ATTRIBUTES = ("any", "primary", "read-write", "standby", "prefer-standby", "read-only")
_PARAMETER_NAMES = (
    "host port user password passfile dbname database application_name search_path target_session_attrs sslmode "
    "sslnegotiation sslrootcert sslcert sslkey sslpassword sslcrl ssl_min_protocol_version "
    "ssl_max_protocol_version krbsrvname gsslib"
)
PARAMETERS = frozenset(_PARAMETER_NAMES.split())
_HOST = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%\w-]+)\]|(?P<name>[^\[\]:/@\s]+|(?=:|$)))(?::(?P<port>\d{1,5}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseTarget:
    """A database to connect to.

    Attributes:
        role: ``embedded`` (run by us) or ``primary`` (yours).
        hosts: (host or socket folder, port), tried in order until one takes writes.
        options: further arguments of the driver's ``connect``; may hold the password.
        address: for people; without user and password.
        disk: a folder on the disk the database writes to, where that is this machine's.
        secrets: what must never be written down.
    """

    role: Literal["embedded", "primary"]
    hosts: tuple[tuple[str, int], ...]
    options: dict[str, Any] = field(repr=False)
    address: str
    disk: Path | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)


def target_of_url(url: str) -> DatabaseTarget:
    """Parses ``postgresql://user:password@host1:5432,host2/database?sslmode=require``.

    Raises:
        ValueError: it is not one. The message quotes nothing of it, since a password with an unescaped ``@``, ``/`` or
            ``?`` may turn up in any of its parts.
    """
    try:
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
    except ValueError:
        raise ValueError("is not a URL; characters such as @ : / ? # in a password must be percent-encoded") from None
    if parts.scheme not in {"postgresql", "postgres"}:
        raise ValueError("must begin with postgresql://")
    if parts.netloc.count("@") > 1 or parts.fragment:
        raise ValueError("has a user or password with an @ or # in it: write %40 or %23")
    if not query.keys() <= PARAMETERS:
        raise ValueError(f"has a parameter that is not one of {', '.join(sorted(PARAMETERS))}")
    _check_choice(query, "sslmode", SSL_MODES)
    _check_choice(query, "target_session_attrs", SESSION_ATTRIBUTES)
    hosts = _hosts(parts.netloc.rpartition("@")[2], query)
    database = unquote(parts.path.removeprefix("/")) or query.get("dbname") or query.get("database", "")
    options: dict[str, Any] = {"dsn": url}
    if "target_session_attrs" not in query:
        options["target_session_attrs"] = "read-write"
    shown = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts)
    return DatabaseTarget(
        role="primary",
        hosts=hosts,
        options=options,
        address=f"{shown}/{database}" if database else shown,
        secrets=_secrets(parts, query),
    )


def _check_choice(query: dict[str, str], name: str, allowed: tuple[str, ...]) -> None:
    if name in query and query[name] not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}")


def _hosts(hostspec: str, query: dict[str, str]) -> tuple[tuple[str, int], ...]:
    texts = (hostspec or query.get("host", "")).split(",")
    ports = query.get("port", "").split(",") if query.get("port") else []
    if len(texts) > MAX_HOSTS:
        raise ValueError(f"names more than {MAX_HOSTS} hosts")
    if len(ports) not in {0, 1, len(texts)}:
        raise ValueError("must give one port, or one for each host")
    hosts = []
    for index, text in enumerate(texts):
        default = ports[index % len(ports)] if ports else str(DEFAULT_PORT)
        decoded = unquote(text)
        if decoded.startswith("/"):
            name, _, written = decoded.partition(":")
            port = written or default
        else:
            match = _HOST.fullmatch(decoded)
            if match is None or not (match["six"] or match["name"]):
                raise ValueError("must name a host: postgresql://user:password@host:port/database")
            name, port = match["six"] or match["name"], match["port"] or default
        if not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise ValueError("has a port outside 1 to 65535")
        hosts.append((name, int(port)))
    return tuple(hosts)


def _secrets(parts: SplitResult, query: dict[str, str]) -> tuple[str, ...]:
    written = parts.netloc.rpartition("@")[0].partition(":")[2]
    texts = {written, unquote(written), query.get("password", ""), query.get("sslpassword", "")}
    return tuple(text for text in texts if text)
